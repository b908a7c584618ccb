"""Attention over keys and values of 8 and 4 bits, beside bfloat16: the same branches, the same plan.

    python benchmarks/bench_kv_memory.py [--write NAME]

A run goes through the caches of as many layers as a model has, each read once, so that what comes from memory in a
decode step comes from memory here. Formats take turns, and a number is the median of the runs. The bound is reading the
stored bytes once at the rate of a large sum.
"""

from __future__ import annotations

import argparse
import statistics
import time

import record
import torch
from bench_decode import median_rate
from bench_tree_attention import grow

import tts_kernels as tk

MODELS = {"SmolLM2-135M": (30, 9, 3, 64), "Qwen2.5-1.5B": (28, 12, 2, 128)}  # layers, heads, KV heads, size
TREES = {
    "64 branches, 2048 + 64": ([1, 64], [2048, 64]),
    "64 private tails of 512": ([64], [512]),
}
FORMATS = ("bfloat16", "int8", "int4")


def filled(layers: int, pages: int, kv_heads: int, head_dim: int, kind: str) -> tk.KVCache:
    """Random keys and values in every slot."""
    cache = tk.KVCache(layers, pages, kv_heads, head_dim, dtype=torch.bfloat16 if kind == "bfloat16" else kind)
    new = torch.randn(2, pages * 16, kv_heads, head_dim).bfloat16()
    for layer in range(layers):
        cache.append(layer, new[0], new[1], torch.arange(pages * 16))
    return cache


def measure(model: str, tree: str, runs: int, read_rate: float) -> dict[str, dict[str, record.Cell]]:
    """A row for each format."""
    layers, heads, kv_heads, head_dim = MODELS[model]
    forest, leaves = grow(*TREES[tree])
    plan = forest.plan(leaves, num_q_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    q = torch.randn(len(leaves), heads, head_dim).bfloat16()
    stats = forest.stats()
    caches = {kind: filled(layers, stats.pages_total, kv_heads, head_dim, kind) for kind in FORMATS}
    times: dict[str, list[float]] = {kind: [] for kind in FORMATS}
    for _ in range(runs):
        for kind, cache in caches.items():
            beside = [cache.beside(layer) for layer in range(layers)]
            begin = time.perf_counter()
            for k, v, scales in zip(cache.k, cache.v, beside, strict=True):
                tk.tree_attention(q, k, v, plan, **scales)
            times[kind].append(1000 * (time.perf_counter() - begin))
    plain = statistics.median(times["bfloat16"])
    share = stats.unique_tokens / (stats.pages_total * 16)
    return {
        f"{model}, {tree}, {kind}": {
            "model": model,
            "branches": tree,
            "kv": kind,
            "ms": round(statistics.median(taken), 2),
            "of bfloat16": round(statistics.median(taken) / plain, 2),
            "bound, ms": round(1000 * caches[kind].nbytes * share / read_rate, 2),
            "MiB": round(caches[kind].nbytes * share / 2**20, 1),
        }
        for kind, taken in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", help="the name of a measurement in benchmarks/results")
    parser.add_argument("--beside", default="nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    block = torch.zeros(2**28, dtype=torch.uint8).view(torch.int64)
    read_rate = median_rate(block.sum, 2**28)
    table = {}
    for model in options.models:
        for tree in TREES:
            rows = measure(model, tree, options.runs, read_rate)
            print(*(f"{name}: {row}" for name, row in rows.items()), sep="\n", flush=True)
            table.update(rows)
    if options.write:
        record.write(
            options.write,
            what="Attention of all layers over keys and values of few bits; medians",
            command="python benchmarks/bench_kv_memory.py",
            beside=options.beside,
            tables={"attention": table},
        )


if __name__ == "__main__":
    main()
