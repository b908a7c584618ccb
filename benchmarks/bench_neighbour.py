"""Decode steps while other processes want the machine's cores.

    python benchmarks/bench_neighbour.py --checkpoint PATH --neighbours 0 1 4
    python benchmarks/bench_neighbour.py --checkpoint PATH --levels avx512 avx512_bf16 --neighbours 0
    python benchmarks/bench_neighbour.py --checkpoint PATH --work prefill verifier demo

A neighbour is a process of normal priority in its own session. Where Linux gives each session the same share of the
machine (sched_autogroup), K neighbours leave a process with as many threads as cores 1 / (1 + K) of it; without, T
threads on T cores keep T / (T + K). Each case runs `bench_decode.py` in a process of its
own, in turn: each of ``--neighbours`` at each of ``--levels`` (instruction sets) with each of ``--weights``.

Other ``--work``: a prefill of 2,048 tokens; a forward of a verifier that reads 32 new tokens of each of 64 candidates
on 512 shared ones; `tts-search demo` with five problems of each level; and "share", two threads that never wait for
anything, whose ratio is what the scheduler takes away.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import record
from bench_decode import checkpoint_of_shape
from tts_search.models.loading import load_decoder
from tts_search.models.sizing import pool_for

import tts_kernels as tk

HERE = Path(__file__).parent


@contextmanager
def neighbours(number: int) -> Iterator[None]:
    """Processes that do nothing but run."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) for _ in range(number)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def steps(options: argparse.Namespace, level: str, weights: str) -> dict[str, float]:
    """Median milliseconds of a step, by number of branches."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / "bench_decode.py"), "--json", str(out), "--repeats", "1"]
        command += ["--prefix", str(options.prefix), "--branches", *map(str, options.branches), "--quantize", weights]
        command += ["--checkpoint", options.checkpoint] if options.checkpoint else []
        subprocess.run(command, env={**os.environ, "TTS_KERNELS_CPU_ISA": level}, check=True, capture_output=True)
        return {str(row["N"]): row["step, ms"] for row in json.loads(out.read_text())}


def forwards(checkpoint: str | None, weights: str, shared: int, branches: int, new: int) -> Callable[[], float]:
    """Return a function that gives the median milliseconds of seven forwards of so many new tokens."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint or checkpoint_of_shape(folder, "bfloat16")
        quantize = None if weights == "none" else weights
        decoder = load_decoder(path, dtype="bfloat16", quantize=quantize, self_test=False)
    pool = pool_for(decoder, "512MiB")
    root = pool.forest.add_root()
    if shared:
        decoder.hidden(pool.pack([root], [[7] * shared]), pool.kv)

    def run() -> float:
        taken = []
        for _ in range(7):
            leaves = pool.forest.fork([root] * branches)
            begin = time.perf_counter()
            decoder.hidden(pool.pack(leaves, [[7] * new] * branches), pool.kv)
            taken.append(1000 * (time.perf_counter() - begin))
            pool.forest.free(leaves)
        return statistics.median(taken)

    return run


def share() -> float:
    """Milliseconds of two threads that compute without a lock and without each other."""
    data = bytes(1 << 20)

    def hashed() -> None:
        for _ in range(1000):
            hashlib.sha256(data).digest()

    begin = time.perf_counter()
    threads = [threading.Thread(target=hashed) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1000 * (time.perf_counter() - begin)


def demo() -> float:
    """Milliseconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = ["tts-search", "demo", "--problems", "5", "--out", folder]
        subprocess.run(command, check=True, capture_output=True)
        return 1000 * (time.perf_counter() - begin)


def works(options: argparse.Namespace) -> dict[str, dict[str, str | int | float]]:
    """A row for each work and number of neighbours."""
    weights = options.weights[0]
    prepare = {
        "prefill": lambda: forwards(options.checkpoint, weights, 0, 1, 2048),
        "verifier": lambda: forwards(options.checkpoint, weights, 512, 64, 32),
        "demo": lambda: demo,
        "share": lambda: share,
    }
    table: dict[str, dict[str, str | int | float]] = {}
    for work in options.work:
        run = prepare[work]()
        taken: dict[int, list[float]] = {number: [] for number in options.neighbours}
        for _ in range(options.repeats):
            for number, found in taken.items():
                with neighbours(number):
                    found.append(run())
        quiet = statistics.median(taken[options.neighbours[0]])
        for number, found in taken.items():
            ms = statistics.median(found)
            row: dict[str, str | int | float] = {"work": work, "weights": weights, "neighbours": number}
            row |= {"ms": round(ms, 1), "of alone": round(ms / quiet, 2)}
            table[f"{work}, {number} beside"] = row
            print(row, flush=True)
    return table


def main() -> None:
    """Measure, print and, if asked to, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a checkpoint; by default random weights of SmolLM2-135M's shape")
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--levels", nargs="+", default=[tk.backend_info().cpu_isa])
    parser.add_argument("--weights", nargs="+", default=["none"], choices=["none", "int8", "int4"], help="quantised")
    parser.add_argument(
        "--work", nargs="+", choices=["prefill", "verifier", "demo", "share"], help="this instead of decode steps"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no neighbour is left behind

    if options.work:
        table = works(options)
        if options.record:
            write(options.record, "Prefill, a verifier's forward and the demo beside busy processes", {"times": table})
        return
    cases = list(itertools.product(options.neighbours, options.levels, options.weights))
    found: dict[tuple[int, str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(options.repeats):
        for number, level, weights in cases:
            with neighbours(number):
                found[number, level, weights].append(steps(options, level, weights))
    table = {}
    for (number, level, weights), runs in found.items():
        row: dict[str, str | int | float] = {"neighbours": number, "level": level, "weights": weights}
        row |= {f"N={n}, ms": round(statistics.median(run[n] for run in runs), 1) for n in runs[0]}
        table[f"{number} beside, {level}, {weights}"] = row
        print(row)
    if options.record:
        what = "Median milliseconds of a decode step of SmolLM2-135M's shape in bfloat16 beside busy processes"
        write(options.record, what, {"steps": table})


def write(name: str, what: str, tables: dict[str, dict[str, dict[str, str | int | float]]]) -> None:
    command = " ".join(["python benchmarks/bench_neighbour.py", *map(record.hidden, sys.argv[1:])])
    record.write(name, what=what, command=command, beside="as each row says", tables=tables)


if __name__ == "__main__":
    main()
