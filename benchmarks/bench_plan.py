"""Planning 256 branches of 8,192 tokens against the attention of one layer at that size, which every layer repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import Call, compare

import tts_kernels as tk

HEADS = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}


@pytest.mark.parametrize("kind", ["fresh", "refilled", "page table"])
def test_plan(benchmark: Any, kind: str) -> None:
    """7,936 tokens are shared, 256 private; bfloat16."""
    forest = tk.KVForest(8192)
    root = forest.add_root()
    forest.append([root], [7936])
    branches = forest.fork([root] * 256)
    forest.free([root])
    forest.append(branches, [256] * 256)
    cache = tk.KVCache(1, forest.stats().pages_total, 8, 128, 16, torch.bfloat16)
    for pages in (cache.k[0], cache.v[0]):
        pages.normal_()
    q = torch.randn(256, 32, 128).to(torch.bfloat16)
    plan = forest.plan(branches, **HEADS)
    table, kv_lens = forest.page_table(branches)
    calls: dict[str, Call] = {
        "fresh": lambda: forest.plan(branches, **HEADS),
        "refilled": lambda: forest.plan(branches, **HEADS, out=plan),
        "page table": lambda: tk.plan_attention(table, kv_lens, page_size=16, **HEADS),
    }
    layer = lambda: tk.tree_attention(q, cache.k[0], cache.v[0], plan)  # noqa: E731
    benchmark.group = "planning, 256 branches of 8192"
    compare(benchmark, calls[kind], {"one layer's attention": layer}, rounds=7)
