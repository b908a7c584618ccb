"""A round of beam search on the KV cache: 16 survivors become 64 branches, each of which gets a token, in 32 layers.

Ours forks, appends, copies the partly filled tail pages and writes the new tokens in every layer. Torch gives each
branch a row of the cache and selects rows by parent; one layer is measured and multiplied by 32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import compare, seconds

import tts_kernels as tk

LAYERS, KV_HEADS, DIM = 32, 8, 128
SURVIVORS, BRANCHES = 16, 64


@pytest.mark.parametrize("length", [1024, 8192, 8197])
def test_fork_and_append(benchmark: Any, length: int) -> None:
    """A length that is not a multiple of 16, the page size, makes 64 copies of last pages in each cache."""
    forest = tk.KVForest(2048)
    root = forest.add_root()
    forest.append([root], [length - 512])
    survivors = forest.fork([root] * SURVIVORS)
    forest.free([root])
    forest.append(survivors, [512] * SURVIVORS)
    parents = [survivors[b // (BRANCHES // SURVIVORS)] for b in range(BRANCHES)]
    cache = tk.KVCache(LAYERS, forest.stats().pages_total, KV_HEADS, DIM, 16, torch.bfloat16)
    caches = [*cache.k, *cache.v]
    table, _ = forest.page_table(survivors)
    for pages in caches:
        pages[table[:, -1]] = 1.0  # the tails exist in memory
    k, v = torch.randn(2, BRANCHES, KV_HEADS, DIM).to(torch.bfloat16)

    def ours() -> None:
        children = forest.fork(parents)
        slots, copy_src, copy_dst = (t.to(k.device) for t in forest.append(children, [1] * BRANCHES))
        tk.copy_pages_(caches, copy_src, copy_dst)
        for layer in range(LAYERS):
            tk.append_kv_(cache.k[layer], cache.v[layer], k, v, slots)
        forest.free(children)

    dense = torch.randn(BRANCHES, KV_HEADS, 64, DIM).to(torch.bfloat16).repeat(1, 1, length // 64, 1)
    rows = torch.arange(BRANCHES) // (BRANCHES // SURVIVORS)
    one_layer = lambda: [dense.index_select(0, rows) for _ in "kv"]  # noqa: E731
    seconds(one_layer)
    layer = min(seconds(one_layer) for _ in range(3))
    benchmark.group = "fork 64 branches + append one token each, 32 layers, bfloat16"
    compare(benchmark, ours, {}, rounds=15)
    info = benchmark.extra_info
    info["us torch index_select"] = 1e6 * LAYERS * layer
    info["times faster than torch index_select"] = info["us torch index_select"] / info["us"]
    print(f"{benchmark.name}: times faster than torch index_select {info['times faster than torch index_select']:.4g}")
