"""Planning and forking through Python, and a plan against the attention of one layer, which every layer repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import Call, compare

import tts_kernels as tk

HEADS = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}


def grow(branches: int, tokens: int, shared: int) -> tuple[tk.KVForest, list[int]]:
    """Branches of so many tokens, of which they share the first."""
    own = tokens - shared
    forest = tk.KVForest(shared // 16 + branches * (own // 16 + 2), 16)
    root = forest.add_root()
    forest.append([root], [shared])
    leaves = forest.fork([root] * branches)
    forest.free([root])
    forest.append(leaves, [own] * branches)
    return forest, leaves


@pytest.mark.parametrize("kind", ["fresh plan", "plan into an old one's buffers", "plan of a page table"])
def test_beside_attention(benchmark: Any, kind: str) -> None:
    """256 branches of 8,192 tokens, 7,936 of them shared; bfloat16."""
    forest, branches = grow(256, 8192, 7936)
    cache = tk.KVCache(1, forest.stats().pages_total, 8, 128, 16, torch.bfloat16)
    for pages in (cache.k[0], cache.v[0]):
        pages.normal_()
    q = torch.randn(256, 32, 128).to(torch.bfloat16)
    plan = forest.plan(branches, **HEADS)
    layer = lambda: tk.tree_attention(q, cache.k[0], cache.v[0], plan)  # noqa: E731
    benchmark.group = "256 branches of 8192 tokens, 7936 of them shared"
    compare(benchmark, _plans(forest, branches)[kind], {"one layer's attention": layer}, rounds=7)


@pytest.mark.parametrize("shared", [0, 31_000])
@pytest.mark.parametrize("kind", ["fresh plan", "plan into an old one's buffers", "fork", "fork and append"])
def test_large(benchmark: Any, kind: str, shared: int) -> None:
    """10,000 branches. A fork of each is freed again, with a token in each child or without."""
    forest, branches = grow(10_000, 32_000, shared)

    def fork(count: int) -> None:
        children = forest.fork(branches)
        if count:
            forest.append(children, [count] * len(children))
        forest.free(children)

    calls = _plans(forest, branches) | {"fork": lambda: fork(0), "fork and append": lambda: fork(1)}
    benchmark.group = f"10000 branches of 32000 tokens, {shared} of them shared"
    compare(benchmark, calls[kind], {}, rounds=7)


def _plans(forest: tk.KVForest, branches: list[int]) -> dict[str, Call]:
    plan = forest.plan(branches, **HEADS)

    def of_table() -> object:
        table, kv_lens = forest.page_table(branches)
        return tk.plan_attention(table, kv_lens, page_size=16, **HEADS)

    return {
        "fresh plan": lambda: forest.plan(branches, **HEADS),
        "plan into an old one's buffers": lambda: forest.plan(branches, **HEADS, out=plan),
        "plan of a page table": of_table,
    }
