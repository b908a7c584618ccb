"""Attention over keys and values of 8 and 4 bits compared with bfloat16, with the same branches and plan; block caches.

    python benchmarks/bench_kv_memory.py [--write NAME]
    python benchmarks/bench_kv_memory.py --blocks [--write NAME]
    python benchmarks/bench_kv_memory.py --room [--write NAME]
    python benchmarks/bench_kv_memory.py --wide {pages,blocks} [--write NAME]

A run reads the caches of all layers of a model once, so that, as in a decode step, data comes from memory. Formats take
turns, and a number is the median of the runs. The bound is reading the stored bytes once at the rate of a large sum.

With --blocks, a block cache makes keys and values of 2,048 shared tokens for 1, 16 and 64 branches, on random weights
of SmolLM2-135M's shape. For an X cache the time is compared with the arithmetic's estimate in multiples of the
attention's time: d / (g^2 M), with d elements in a hidden state, g query heads for each KV head, and M branches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from typing import Any, get_args
from unittest.mock import patch

import record
import torch
from bench_decode import checkpoint_of_shape, median_rate
from bench_tree_attention import grow
from tts_search import Engine, HFPolicy
from tts_search.models.block_cache import BlockPool, Kept
from tts_search.models.block_layers import BLOCK, KINDS
from tts_search.models.decoder import Batch, KvDtype, KVPool
from tts_search.models.llama import LlamaDecoder
from tts_search.models.loading import load_decoder
from tts_search.models.sizing import pool_for
from tts_search.search.protocol import Generate, GenerateParams

import tts_kernels as tk

MODELS = {"SmolLM2-135M": (30, 9, 3, 64), "Qwen2.5-1.5B": (28, 12, 2, 128)}  # layers, heads, KV heads, size
TREES = {
    "64 branches, 2048 + 64": ([1, 64], [2048, 64]),
    "64 private tails of 512": ([64], [512]),
}
FORMATS = ("bfloat16", "int8", "int4")
SHARED = 2048  # tokens
WIDE: tuple[tuple[KvDtype | None, int], ...] = (
    (None, 41), (None, 84), ("int8", 84), (None, 157), ("int4", 157)
)  # fmt: skip
# Block caches: the most that fit, and as many in bfloat16 and int8.
WIDE_BLOCKS: tuple[tuple[KvDtype | None, int], ...] = ((None, 52), ("int8", 52), ("int4-channel", 52), ("xquant-4", 51))


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


def measure_blocks(runs: int) -> dict[str, dict[str, record.Cell]]:
    """A row for each kind and number of branches: making keys and values of all layers, and their attention."""
    decoder = smollm2()
    shape, eps, turns = decoder.shape, decoder.config.eps, decoder.config.cos_sin
    rows: dict[str, dict[str, record.Cell]] = {}
    for kind in KINDS:
        pool = pool_for(decoder, "256MiB", kv_dtype=kind)
        assert isinstance(pool, BlockPool)
        root = pool.forest.add_root()
        for begin in range(0, SHARED, BLOCK):
            decoder.hidden(pool.pack([root], [[10 + begin + i for i in range(BLOCK)]]), pool.kv)
        for branches in (1, 16, 64):
            leaves = pool.forest.fork([root] * branches)
            batch = pool.pack(leaves, [[7]] * branches)
            kept = batch.kept
            assert isinstance(kept, Kept)
            q = torch.randn(branches, shape.num_q_heads, shape.head_dim).bfloat16()
            made, attended = [], []
            for _ in range(runs):
                begin, before = time.perf_counter(), None
                for number, keeps in enumerate(pool.kv.layers):
                    before = pool.kv.restore(number, keeps, kept, turns, eps, before)
                middle = time.perf_counter()
                for _ in pool.kv.layers:
                    tk.tree_attention(q, *pool.kv.pages, batch.plan)
                made.append(1000 * (middle - begin))
                attended.append(1000 * (time.perf_counter() - middle))
            pool.forest.free(leaves)
            make, attend = statistics.median(made), statistics.median(attended)
            group = shape.num_q_heads // shape.num_kv_heads
            rows[f"{kind}, {branches}"] = {
                "kv": kind,
                "branches": branches,
                "making, ms": round(make, 2),
                "attention, ms": round(attend, 2),
                "of attention": round(make / attend, 1),
                "d over (g^2 M)": round(decoder.hidden_size / (group**2 * branches), 1) if "xquant" in kind else None,
            }
    return rows


def most_branches(pool: KVPool, shared: int, own: int) -> int:
    """The most branches of so many own tokens on shared ones that a pool has room for, asked of its forest."""
    forest = pool.forest

    def fits(branches: int) -> bool:
        root = forest.add_root()
        for _ in range(0, shared, pool.block or shared):
            forest.append([root], [pool.block or shared])
        leaves = forest.fork([root] * branches)
        forest.free([root])
        try:
            for _ in range(0, own, pool.block or own):
                forest.append(leaves, [pool.block or own] * branches)
        except tk.OutOfPages:
            return False
        finally:
            forest.free(leaves)
        return True

    low, high = 0, 1024
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measure_room(memory: str = "512MiB") -> dict[str, dict[str, record.Cell]]:
    """By kv_dtype, how many branches of 512 and of 2,048 tokens on 2,048 shared ones SmolLM2-135M has room for."""
    decoder = smollm2()
    kinds: list[KvDtype | None] = [None, *(kind for kind in get_args(KvDtype) if kind != "fp8")]  # that is for GPUs
    rows: dict[str, dict[str, record.Cell]] = {}
    for kind in kinds:
        pool, name = pool_for(decoder, memory, kv_dtype=kind), kind or "bfloat16"
        most = {f"n, {own} tokens": most_branches(pool, SHARED, own) for own in (512, 2048)}
        rows[name] = {"kv": name, "tokens": pool.num_tokens, **most}
    return rows


def wide_search(kind: KvDtype | None, branches: int, memory: str = "512MiB") -> dict[str, record.Cell]:
    """Time of so many texts of 512 tokens on 2,048 shared ones, random weights of SmolLM2-135M's shape."""
    with tempfile.TemporaryDirectory() as folder:
        policy = HFPolicy(checkpoint_of_shape(folder, "bfloat16"), dtype="bfloat16", kv_memory=memory, kv_dtype=kind)
    request = Generate(
        tuple(range(10, 10 + SHARED)), GenerateParams(max_tokens=512, ignore_eos=True), branches, tuple(range(branches))
    )
    forwarded = 0

    def counted(decoder: LlamaDecoder, batch: Batch, *rest: Any) -> torch.Tensor:
        nonlocal forwarded
        forwarded += len(batch.tokens)
        return logits(decoder, batch, *rest)

    logits = LlamaDecoder.logits
    with patch.object(LlamaDecoder, "logits", counted), Engine(policy, None) as engine:
        begin = time.perf_counter()
        made = sum(len(part.tokens) for part in engine.generate(request).events())
        seconds = time.perf_counter() - begin
    again = forwarded - (SHARED + made - branches)  # the last token of a text is not forwarded
    numbers = {"seconds": round(seconds, 1), "tokens a second": round(made / seconds), "read again": again}
    return {"kv": kind or "bfloat16", "n": branches, **numbers}


def smollm2() -> LlamaDecoder:
    """Random weights of its shape."""
    with tempfile.TemporaryDirectory() as folder:
        decoder = load_decoder(checkpoint_of_shape(folder, "bfloat16"), decoder="lean", self_test=False)
    assert isinstance(decoder, LlamaDecoder)
    return decoder


def measure_wide(kinds: Iterable[tuple[KvDtype | None, int]]) -> dict[str, dict[str, record.Cell]]:
    """A row for each kind and number of texts."""
    return {f"{kind or 'bfloat16'}, {n}": wide_search(kind, n) for kind, n in kinds}


def measure_attention(runs: int) -> dict[str, dict[str, record.Cell]]:
    """A row for each model, tree and format."""
    block = torch.zeros(2**28, dtype=torch.uint8).view(torch.int64)
    read_rate = median_rate(block.sum, 2**28)
    rows = (measure(model, tree, runs, read_rate) for model in MODELS for tree in TREES)
    return {name: row for one in rows for name, row in one.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", help="the name of a measurement in benchmarks/results")
    parser.add_argument("--beside", default="nothing")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--blocks", action="store_true", help="only how long block caches take to make keys and values")
    only.add_argument("--room", action="store_true", help="only how many branches 512 MiB have room for")
    only.add_argument("--wide", choices=["pages", "blocks"], help="only a wide generation in 512 MiB")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.blocks:
        name, option, table = "made", " --blocks", measure_blocks(options.runs)
        what = "Keys and values of 2,048 tokens of SmolLM2-135M's shape made by block caches; medians"
    elif options.room:
        name, option, table = "room", " --room", measure_room()
        what = "The most branches on 2,048 shared tokens that a KV pool of 512 MiB of SmolLM2-135M has room for"
    elif options.wide:
        kinds = WIDE_BLOCKS if options.wide == "blocks" else WIDE
        name, option, table = "wide", f" --wide {options.wide}", measure_wide(kinds)
        what = "n texts of 512 tokens behind 2,048 shared ones, SmolLM2-135M's shape, 512 MiB: seconds with the prompt"
    else:
        name, option, table = "attention", "", measure_attention(options.runs)
        what = "Attention of all layers over keys and values of few bits; medians"
    print(*table.values(), sep="\n")
    if options.write:
        command = f"python benchmarks/bench_kv_memory.py{option}"
        record.write(options.write, what=what, command=command, beside=options.beside, tables={name: table})


if __name__ == "__main__":
    main()
