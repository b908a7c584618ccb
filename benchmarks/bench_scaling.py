"""How the cost of a round grows: attention with branches and prefix, `fork` with length, memory with branches.

Hq 32, Hkv 8, D 128, bfloat16. Each test times one series; its exponent is the slope of log(time) over log(size) where
size matters, fitted by least squares. Attention over a shared prefix should grow with branches x prefix in arithmetic
but less at few branches, where reading the prefix dominates; a fork must not grow with length at all; memory must
grow with the unique tokens and less than a page per branch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import seconds

import tts_kernels as tk

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
OWN = 64  # tokens that a branch has for itself


def grow(prefix: int, branches: int, own: int = OWN) -> tuple[tk.KVForest, list[int]]:
    """A star: ``branches`` with ``own`` tokens each on ``prefix`` shared ones."""
    forest = tk.KVForest(prefix // PAGE + 2 + branches * (own // PAGE + 2), PAGE)
    root = forest.add_root()
    forest.append([root], [prefix])
    leaves = forest.fork([root] * branches)
    forest.append(leaves, [own] * branches)
    return forest, leaves


def attention(prefix: int, branches: int) -> Callable[[], object]:
    """One layer's decode attention."""
    forest, leaves = grow(prefix, branches)
    pages = forest.stats().pages_total
    k, v = (torch.randn(pages, PAGE, KV_HEADS, HEAD_DIM).bfloat16() for _ in range(2))
    q = torch.randn(branches, Q_HEADS, HEAD_DIM).bfloat16()
    plan = forest.plan(leaves, num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    return lambda: tk.tree_attention(q, k, v, plan)


def fork(length: int, branches: int = 64) -> Callable[[], object]:
    """Fork 64 branches of their own ``length`` tokens, append a token to each child and free the children."""
    forest, leaves = grow(0, branches, length)

    def work() -> None:
        children = forest.fork(leaves)
        forest.append(children, [1] * branches)
        forest.free(children)

    return work


def exponent(sizes: list[int], times: list[float]) -> float:
    """The slope of log(time) over log(size)."""
    xs, ys = [math.log(size) for size in sizes], [math.log(time) for time in times]
    return statistics.linear_regression(xs, ys).slope


SERIES: dict[str, tuple[list[int], Callable[[int], Callable[[], object]]]] = {
    "attention, branches on 2048 tokens": ([1, 4, 16, 64, 256, 1024], lambda n: attention(2048, n)),
    "attention, prefix under 64 branches": ([512, 2048, 8192, 32768], lambda n: attention(n, 64)),
    "fork + append, tokens of each of 64 branches": ([128, 512, 2048, 8192, 32768], fork),
}


@pytest.mark.parametrize("series", SERIES)
def test_time(benchmark: Any, series: str) -> None:
    sizes, make = SERIES[series]
    calls = [make(size) for size in sizes]
    times: list[list[float]] = [[] for _ in sizes]
    for _ in range(7):
        for call, samples in zip(calls, times, strict=True):
            samples.append(seconds(call))
    medians = [statistics.median(samples) for samples in times]
    benchmark.group = "scaling"
    benchmark.pedantic(calls[-1], rounds=3)
    points = {str(size): round(1e6 * median, 1) for size, median in zip(sizes, medians, strict=True)}
    benchmark.extra_info.update({"series": series, "us": points, "exponent": round(exponent(sizes, medians), 3)})
    print(f"\n{series}: {points}, exponent {benchmark.extra_info['exponent']}")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="looks at the memory of a process, not of a GPU")
def test_memory(benchmark: Any) -> None:
    """256 branches of 2,048 shared and 64 own tokens in a pool that could hold them all unshared."""
    branches, prefix = 256, 2048
    forest = tk.KVForest(branches * (prefix + OWN) // PAGE, PAGE)
    cache = tk.KVCache(4, forest.stats().pages_total, KV_HEADS, HEAD_DIM, PAGE, dtype=torch.bfloat16)
    before = resident()

    def write(names: list[int], count: int) -> None:
        rows = torch.randn(len(names) * count, KV_HEADS, HEAD_DIM).bfloat16()
        slots = forest.append(names, [count] * len(names)).slots.to(rows.device)
        for k, v in zip(cache.k, cache.v, strict=True):
            tk.append_kv_(k, v, rows, rows, slots)

    def work() -> None:
        root = forest.add_root()
        write([root], prefix)
        write(forest.fork([root] * branches), OWN)

    benchmark.group = "scaling"
    benchmark.pedantic(work, rounds=1)
    token = 2 * 4 * KV_HEADS * HEAD_DIM * 2  # k and v, four layers, two bytes
    stats = forest.stats()
    info = {
        "MB resident": round((resident() - before) / 1e6),
        "MB unique": round(stats.unique_tokens * token / 1e6),
        "MB unshared": round(stats.logical_tokens * token / 1e6),
    }
    benchmark.extra_info.update(info)
    print(f"\n{info}")
