"""Decode steps while other processes want the machine's cores.

    python benchmarks/bench_neighbour.py --checkpoint PATH --neighbours 0 1 4
    python benchmarks/bench_neighbour.py --checkpoint PATH --levels avx512 avx512_bf16 --neighbours 0

A neighbour is a process of normal priority in its own session. With T threads on T cores and K neighbours, a step takes
at least (T + K) / T times as long: this is the bound of the ratio. Each case runs `bench_decode.py` in a process of its
own, in turn: each of ``--neighbours`` at each of ``--levels`` (instruction sets) with each of ``--weights``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import record

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


def main() -> None:
    """Measure, print and, if asked to, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a checkpoint; by default random weights of SmolLM2-135M's shape")
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--levels", nargs="+", default=[tk.backend_info().cpu_isa])
    parser.add_argument("--weights", nargs="+", default=["none"], choices=["none", "int8", "int4"], help="quantised")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no neighbour is left behind

    cases = list(itertools.product(options.neighbours, options.levels, options.weights))
    found: dict[tuple[int, str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(options.repeats):
        for number, level, weights in cases:
            with neighbours(number):
                found[number, level, weights].append(steps(options, level, weights))
    table: dict[str, dict[str, str | int | float]] = {}
    for (number, level, weights), runs in found.items():
        row: dict[str, str | int | float] = {"neighbours": number, "level": level, "weights": weights}
        row |= {f"N={n}, ms": round(statistics.median(run[n] for run in runs), 1) for n in runs[0]}
        table[f"{number} beside, {level}, {weights}"] = row
        print(row)
    if options.record:
        record.write(
            options.record,
            what="Median milliseconds of a decode step of SmolLM2-135M's shape in bfloat16 beside busy processes",
            command=" ".join(["python benchmarks/bench_neighbour.py", *sys.argv[1:]]),
            beside="as each row says",
            tables={"steps": table},
        )


if __name__ == "__main__":
    main()
