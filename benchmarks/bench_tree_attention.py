"""`tree_attention` against torch's CPU flash attention with every shared level read once, merged by log-sum-exp.

In the baseline, each level's keys and values are contiguous, heads first (the best case for torch's op), and the
queries that read a level are grouped by KV head. Ours reads pages of 16 tokens in the order of a forest. The number of
rows for each KV head decides the bound: reading each key and value once, or 4 D operations for each query head, key and
row.

    python benchmarks/bench_tree_attention.py [--write attention]

prints the table of RESULTS.md, and writes it. Its last column is the memory that a call allocates in addition to its
results, measured in a separate process.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import costs
import pytest
import record
import torch
from measure import Bound, Call, compare, last_cache_bytes, medians, peak_bytes
from torch import Tensor

import tts_kernels as tk

HEADS, KV_HEADS, DIM = 32, 8, 128
GROUP = HEADS // KV_HEADS
PAGE_SIZE = 16


class Case:
    """A tree whose nodes of one level have ``lengths[level]`` tokens and ``fan_out[level]`` nodes in all."""

    def __init__(self, fan_out: list[int], lengths: list[int], dtype: torch.dtype) -> None:
        self.fan_out, self.lengths, self.dtype = fan_out, lengths, dtype
        self.branches = fan_out[-1]
        self.forest, self.leaves = grow(fan_out, lengths)
        self.plan = self.forest.plan(self.leaves, num_q_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)
        self.q = torch.randn(self.branches, HEADS, DIM).to(dtype)

    def tokens(self) -> int:
        return sum(n * length for n, length in zip(self.fan_out, self.lengths, strict=True))

    def bound(self) -> Bound:
        reads = self.branches * sum(self.lengths)
        return costs.tree_attention(self.tokens(), reads, HEADS, KV_HEADS, DIM, self.dtype)

    def layer(self) -> tuple[Call, Call]:
        """Ours and torch's, over one layer's caches of their own."""
        cache = tk.KVCache(1, self.forest.stats().pages_total, KV_HEADS, DIM, PAGE_SIZE, self.dtype)
        table, _ = self.forest.page_table(self.leaves)
        levels = []
        k_all, v_all = (torch.randn(2, self.branches, sum(self.lengths), KV_HEADS, DIM)).to(self.dtype)
        for nodes, begin, end in self._spans():
            shared = k_all.view(nodes, -1, *k_all.shape[1:])[:, :1], v_all.view(nodes, -1, *v_all.shape[1:])[:, :1]
            for all_, first in zip((k_all, v_all), shared, strict=True):  # the branches of a node have the same tokens
                all_.view(nodes, -1, *all_.shape[1:])[:, :, begin:end] = first[:, :, begin:end].clone()
            levels.append(tuple(x[:, 0, begin:end].transpose(1, 2).contiguous() for x in shared))
        for b in range(self.branches):
            pages = table[b, : math.ceil(sum(self.lengths) / PAGE_SIZE)]
            for cached, values in ((cache.k[0], k_all), (cache.v[0], v_all)):
                padded = torch.nn.functional.pad(values[b], (0, 0, 0, 0, 0, len(pages) * PAGE_SIZE - values.shape[1]))
                cached[pages] = padded.view(-1, PAGE_SIZE, KV_HEADS, DIM)
        ours = partial(tk.tree_attention, self.q, cache.k[0], cache.v[0], self.plan)
        torchs = partial(flash_by_level, self.q, levels)
        torch.testing.assert_close(ours(), torchs(), rtol=0.05, atol=0.01)
        return ours, torchs

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        ends = list(itertools.accumulate(self.lengths))
        return zip(self.fan_out, [0, *ends[:-1]], ends, strict=True)


def grow(fan_out: list[int], lengths: list[int]) -> tuple[tk.KVForest, list[int]]:
    pages = sum(n * (length // PAGE_SIZE + 1) for n, length in zip(fan_out, lengths, strict=True))
    forest = tk.KVForest(pages + fan_out[-1], PAGE_SIZE)
    nodes = [forest.add_root() for _ in range(fan_out[0])]
    for level, length in enumerate(lengths):
        if level:
            children = forest.fork([node for node in nodes for _ in range(fan_out[level] // len(nodes))])
            forest.free(nodes)
            nodes = children
        for begin in range(0, length, PAGE_SIZE):  # turn by turn, as tokens are decoded: no branch's pages lie together
            forest.append(nodes, [min(PAGE_SIZE, length - begin)] * len(nodes))
    return forest, nodes


def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's fused attention with its log-sum-exp; a GPU's flash attention takes no float32."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if q.dtype == torch.float32:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
        return out, lse[..., : q.shape[2]]
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def flash_by_level(q: Tensor, levels: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One call of torch's flash attention a level [nodes, Hkv, L, D], merged pair by pair."""
    rows = q.shape[0]
    out = lse = None
    for k, v in levels:
        nodes = k.shape[0]
        grouped = q.view(nodes, rows // nodes, KV_HEADS, GROUP, DIM).transpose(1, 2).reshape(nodes, KV_HEADS, -1, DIM)
        part, part_lse = flash(grouped, k, v)
        part = part.view(nodes, KV_HEADS, -1, GROUP, DIM).transpose(1, 2).reshape(rows, HEADS, DIM)
        part_lse = part_lse.view(nodes, KV_HEADS, -1, GROUP).transpose(1, 2).reshape(rows, HEADS, 1)
        if out is None:
            out, lse = part, part_lse
        else:
            out = torch.lerp(out, part, torch.sigmoid(part_lse - lse).to(q.dtype))
            lse = torch.logaddexp(lse, part_lse)
    return out


DECODE = {
    "64 branches, 2048 + 64": ([1, 64], [2048, 64]),
    "16 branches, 2048 + 64": ([1, 16], [2048, 64]),
    "16 branches, 4096 + 128": ([1, 16], [4096, 128]),
    "8 x 8 branches, 256 + 512 + 128": ([1, 8, 64], [256, 512, 128]),
}


ONE = "1 branch, 2048 tokens"
PREFILL = "prefill of 32,768 tokens"
TREES = {**DECODE, ONE: ([1], [2048]), PREFILL: ([1], [32768])}


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", DECODE)
def test_decode(benchmark: Any, name: str, dtype: torch.dtype) -> None:
    case = Case(*DECODE[name], dtype)
    ours, torchs = case.layer()
    benchmark.group = f"tree_attention, {str(dtype)[6:]}"
    compare(benchmark, ours, {"torch flash by level": torchs}, rounds=15, bound=case.bound())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_one_branch(benchmark: Any, dtype: torch.dtype) -> None:
    """2048 tokens, from memory: each call reads another layer, and the layers fill four times the last cache."""
    case = Case(*TREES[ONE], dtype)
    bound = case.bound()
    layers = layers_of_one(case)
    calls = [case.layer() for _ in range(layers)]
    benchmark.group = f"tree_attention, {str(dtype)[6:]}"

    def all_layers(which: int) -> None:
        for layer in calls:
            layer[which]()

    whole = Bound(layers * bound.bytes)
    compare(benchmark, lambda: all_layers(0), {"torch grouped": lambda: all_layers(1)}, rounds=9, bound=whole)
    benchmark.extra_info["layers"] = layers


def layers_of_one(case: Case) -> int:
    """As many as fill four times the last cache."""
    return max(2, math.ceil(4 * last_cache_bytes() / case.bound().bytes))


# ---- the table of RESULTS.md -----------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def row(name: str, kind: str, runs: int) -> dict[str, record.Cell]:
    """A tree's layer of decode, from memory for one branch: ours, torch's and the machine's rates in turn."""
    found: dict[str, record.Cell] = {"what": name, "dtype": kind}
    if name != PREFILL:
        found |= timed(Case(*TREES[name], DTYPES[kind]), runs, many=name == ONE)
    return {**found, "MiB beside the results": workspace_in_a_process(name, kind)}


def timed(case: Case, runs: int, *, many: bool) -> dict[str, record.Cell]:
    layers = [case.layer() for _ in range(layers_of_one(case) if many else 1)]
    bound = case.bound()
    work = Bound(len(layers) * bound.bytes, 0 if many else bound.operations, bound.dtype)
    rates = work.rates()
    turns: dict[str, Call] = {name: call for name, (call, _) in rates.items()}
    for i, name in enumerate(("ours", "torch")):
        turns[name] = partial(all_of, [layer[i] for layer in layers])
    times = medians(turns, runs)
    least = work.seconds({name: amount / times[name] for name, (_, amount) in rates.items()})
    return {
        "ours, ms": round(1000 * times["ours"] / len(layers), 2),
        "torch, ms": round(1000 * times["torch"] / len(layers), 2),
        "times faster": round(times["torch"] / times["ours"], 1),
        "of gemm": None if many else round(least["gemm"] / times["ours"], 2),
        "of memory": round(least["memory"] / times["ours"], 2),
        "of both in turn": round(sum(least.values()) / times["ours"], 2),
    }


def all_of(calls: list[Call]) -> None:
    for call in calls:
        call()


def workspace(name: str, kind: str) -> float:
    """MiB that a call allocates beside its results."""
    forest, leaves = grow(*TREES[name])
    q_len = forest.length(leaves[0]) if name == PREFILL else 1
    shape: dict[str, int] = {"num_q_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM}
    plan = forest.plan(leaves, [q_len] * len(leaves), **shape)
    pages, dtype = forest.stats().pages_total, DTYPES[kind]
    q = torch.randn(q_len * len(leaves), HEADS, DIM).to(dtype)
    k, v = (torch.randn(pages, PAGE_SIZE, KV_HEADS, DIM).to(dtype) for _ in range(2))
    first = forest.plan(leaves[:1], **shape)
    tk.tree_attention(q[:1], k, v, first)  # threads, and what is loaded on use
    results = q.nbytes + 4 * q.shape[0] * HEADS
    return (peak_bytes(lambda: tk.tree_attention(q, k, v, plan)) - results) / 2**20


def workspace_in_a_process(name: str, kind: str) -> float:
    command = [sys.executable, __file__, "--workspace", name, kind, "--threads", str(torch.get_num_threads())]
    command += ["--device", torch.get_default_device().type]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return round(max(0.0, float(done.stdout)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", help="the name of a measurement in benchmarks/results")
    parser.add_argument("--beside", default="nothing")
    parser.add_argument("--workspace", nargs=2, metavar=("TREE", "DTYPE"), help="print what one call allocates, in MiB")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device != "cpu":
        torch.set_default_device(options.device)
    if options.workspace:
        print(workspace(*options.workspace))
        return
    table = {}
    for kind in DTYPES:
        for name in TREES:
            table[f"{name}, {kind}"] = row(name, kind, options.runs)
            print(table[f"{name}, {kind}"], flush=True)
    if options.write:
        record.write(
            options.write,
            what="Attention of one decode layer over a tree: Hq 32, Hkv 8, D 128; medians, ours and torch's in turn",
            command="python benchmarks/bench_tree_attention.py",
            beside=options.beside,
            tables={"layers": table},
        )


if __name__ == "__main__":
    main()
