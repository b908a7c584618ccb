"""The common part of the engines' scripts: they read jobs as JSON lines from stdin and write results to stdout."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Engines print where they like, from their import on: all of it goes to stderr.
OUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


@dataclass(frozen=True)
class Job:
    """Sample ``tokens`` tokens in each of ``branches`` continuations of one prompt.

    ``temperature`` 0 is greedy. ``fresh`` numbers the prompt: none is seen twice, so no engine can keep its cache.
    """

    prefix: int
    branches: int
    tokens: int
    temperature: float
    top_p: float
    fresh: int

    def prompt(self) -> list[int]:
        """The ids [prefix] of the prompt, which mean nothing."""
        return [100 + (7919 * self.fresh + 7 * i) % 40000 for i in range(self.prefix)]


def serve(run: Callable[[Job], Sequence[Sequence[int]]]) -> None:
    """Answer jobs until stdin ends: seconds, the length of each continuation, the first one's ids, peak memory."""

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        begin = time.perf_counter()
        continuations = run(Job(**job))
        return {
            "seconds": time.perf_counter() - begin,
            "lengths": sorted({len(tokens) for tokens in continuations}),
            "count": len(continuations),
            "first": [int(token) for token in continuations[0]],
        }

    answer_lines(answer)


def answer_lines(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer each line of stdin until it ends, and say how much memory it took so far."""
    print(json.dumps({"ready": True}), file=OUT, flush=True)
    for line in sys.stdin:
        print(json.dumps({**answer(json.loads(line)), "peak_mb": peak_megabytes()}), file=OUT, flush=True)


def peak_megabytes() -> int:
    """Most memory this process and its children ever had resident, in MB."""
    total = 0
    for pid in [str(os.getpid()), *children(str(os.getpid()))]:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) // 1024
    return total


def children(pid: str) -> list[str]:
    """All descendants of a process."""
    below: list[str] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            below += [child, *children(child)]
    return below
