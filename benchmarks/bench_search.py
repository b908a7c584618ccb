"""Many problems in the engine at once: the total time, the latency of a problem, the use of the policy's rows.

    python benchmarks/bench_search.py --policy PATH --verifier PATH --format yes_no --tasks FILE [--record NAME]
    python benchmarks/bench_search.py ... --engines "64 rows" --turns "in turn" "verifier first" ...

Each engine searches the same problems in turn, ``--rounds`` times; a number is the median of its runs. The lock-step
baseline works like a loop over a batching server: all problems in flight wait for the longest step and for the last
score of each round. It has the same models and kernels, but a call returns only when everything has been answered. A
problem's latency is counted from its admission, its end from the start of the run. Slot use counts a decode step's rows
until the last problem was admitted; if all start at once, there is no such time.

``--turns`` compares rules for the model that takes the next step. "In turn" is the engine's: a step of the policy, a
step of the verifier. "Verifier first" reads all that waits before the policy samples its next token. "Verifier in
batches" lets the verifier wait until 16 candidates are there, or until the policy has nothing to do; "policy first",
until the policy has nothing to do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import record
from tts_search import HFPolicy, HFVerifier, SearchConfig, SearchError, search_iter
from tts_search.engine.scheduler import Scheduler, SearchOutcome
from tts_search.evaluation.tasks import load_tasks

import tts_kernels as tk


class Policy:
    """A policy in lock-step: nothing of a call is answered before all of it is."""

    def __init__(self, driver: Any) -> None:
        self.begin, self.release, self.end = driver.begin, driver.release, driver.end
        self.expand = driver.expand


class Verifier:
    """A verifier in lock-step."""

    def __init__(self, driver: Any) -> None:
        self.begin, self.release, self.end = driver.begin, driver.release, driver.end
        self.score = driver.score


COUNTS = {"decode steps", "tokens", "speculated"}
ENGINES: dict[str, dict[str, Any]] = {
    "64 rows": {"max_rows": 64},
    "64 rows, no speculation": {"max_rows": 64, "speculate": False},
    "4 problems": {"max_in_flight": 4},
    "as many as there is room for": {},
    "lock-step, 4 problems": {"max_in_flight": 4},
    "lock-step, all problems": {},
}
BATCH = 16  # candidates


def verifier_first(scheduler: Scheduler) -> Iterator[SearchOutcome]:
    """Read all that waits, then sample a token."""
    assert scheduler.verifier is not None
    while scheduler.num_candidates:
        yield from scheduler._serve(scheduler.verifier)
    yield from scheduler._serve(scheduler.policy)


def policy_until(enough: float) -> Callable[[Scheduler], Iterator[SearchOutcome]]:
    """Sample tokens until so many candidates wait, or nothing is left to sample; then read all of them."""

    def step(scheduler: Scheduler) -> Iterator[SearchOutcome]:
        assert scheduler.verifier is not None
        yield from scheduler._serve(scheduler.policy)
        if scheduler.num_candidates >= enough or not scheduler.num_streams:
            while scheduler.num_candidates:
                yield from scheduler._serve(scheduler.verifier)

    return step


TURNS: dict[str, Callable[[Scheduler], Iterator[SearchOutcome]]] = {
    "in turn": Scheduler.step,
    "verifier first": verifier_first,
    "verifier in batches": policy_until(BATCH),
    "policy first": policy_until(math.inf),
}


def run(
    models: tuple[HFPolicy, HFVerifier], problems: Sequence[str], config: SearchConfig, engine: str, turns: str
) -> tuple[dict[str, float | None], list[str]]:
    """Search them all: the numbers, and the trees."""
    rows: list[tuple[float, int]] = []
    sample = tk.sample

    def counted(logits: Any, *args: Any, **options: Any) -> Any:
        rows.append((time.perf_counter(), logits.shape[0]))
        return sample(logits, *args, **options)

    admitted: dict[int, float] = {}

    def entries() -> Iterator[str]:
        for number, problem in enumerate(problems):
            admitted[number] = time.perf_counter()
            yield problem

    policy, verifier = models
    for model in models:
        model.max_rows = 1024
    drivers = (Policy(policy), Verifier(verifier)) if engine.startswith("lock-step") else models
    ends: dict[int, float] = {}
    results = {}
    begin = time.perf_counter()
    with patch.object(tk, "sample", counted), patch.object(Scheduler, "step", TURNS[turns]):
        for number, result in search_iter(entries(), *drivers, config, progress=False, **ENGINES[engine]):
            if isinstance(result, SearchError):
                raise result
            ends[number] = time.perf_counter()
            results[number] = result
    last = max(admitted.values())
    most = ENGINES[engine].get("max_rows") or ENGINES[engine].get("max_in_flight", len(problems)) * config.n
    before = [min(1.0, count / most) for when, count in rows if when < last]
    tokens = sum(count for _, count in rows)
    numbers: dict[str, float | None] = {
        "seconds": ends[max(ends, key=ends.__getitem__)] - begin,
        "latency, s": statistics.median(ends[number] - admitted[number] for number in ends),
        "end, s": statistics.median(end - begin for end in ends.values()),
        "slot use": statistics.mean(before) if len(before) > 1 else None,
        "decode steps": len(rows),
        "rows of a step": tokens / len(rows),
        "tokens": tokens,
        "speculated": sum(result.stats.speculated_tokens for result in results.values()),
    }
    return numbers, [results[number].tree.to_json() for number in sorted(results)]


def main() -> None:
    """Measure, print and, if asked to, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--verifier", required=True)
    parser.add_argument("--format", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--tasks", default="MATH-500")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--method", default="beam_search")
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=8)
    parser.add_argument("--max-step-tokens", type=int, default=256)
    parser.add_argument("--kv-memory", default="3GiB", help="of each model")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--turns", nargs="+", choices=list(TURNS), default=["in turn"], metavar="RULE")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--record", help="write benchmarks/results/NAME.json")
    parser.add_argument("--beside", default="other work", help="what else ran, for --record")
    options = parser.parse_args()

    def load() -> tuple[HFPolicy, HFVerifier]:
        """New models: what a run has left in the prefix caches must not serve the next one."""
        common = {"dtype": options.dtype, "kv_memory": options.kv_memory, "quantize": options.quantize}
        return HFPolicy(options.policy, **common), HFVerifier(options.verifier, format=options.format, **common)

    config = SearchConfig(
        method=options.method, n=options.n, max_steps=options.max_steps, max_step_tokens=options.max_step_tokens
    )
    problems = [task.problem for task in load_tasks(options.tasks, options.limit)]
    run(load(), problems[:1], config, "64 rows", "in turn")  # whatever is done once
    cases = list(itertools.product(options.engines, options.turns))
    found: dict[tuple[str, str], list[dict[str, float | None]]] = {case: [] for case in cases}
    first: list[str] = []
    for _ in range(options.rounds):
        for engine, turns in cases:
            numbers, trees = run(load(), problems, config, engine, turns)
            first = first or trees
            if trees != first:
                raise SystemExit(f"{engine}, {turns}: another result than the first engine's")
            found[engine, turns].append(numbers)
            print(json.dumps({"engine": engine, "turns": turns, **numbers}), flush=True)
    if options.record:
        record.write(
            options.record,
            what=f"{len(problems)} problems of MATH-500: {options.method}, n = {options.n}, at most "
            f"{options.max_steps} steps of {options.max_step_tokens} tokens, SmolLM2-135M-Instruct as policy and as "
            f"yes/no verifier, {options.quantize or options.dtype}",
            command="python benchmarks/bench_search.py --policy PATH --verifier PATH --format yes_no --tasks FILE "
            f"--limit {options.limit} --method {options.method} --n {options.n}"
            + (f" --quantize {options.quantize}" if options.quantize else ""),
            beside=options.beside,
            tables={"engines": {name(*case): medians(case, runs) for case, runs in found.items()}},
        )


def name(engine: str, turns: str) -> str:
    """Of a row: the rule only where it is not the engine's own."""
    return engine if turns == "in turn" else f"{engine}, {turns}"


def medians(case: tuple[str, str], runs: Sequence[dict[str, float | None]]) -> dict[str, record.Cell]:
    """A row of the table."""
    row: dict[str, record.Cell] = dict(zip(("engine", "turns"), case, strict=True))
    for name in runs[0]:
        values = [value for each in runs if (value := each[name]) is not None]
        median = float(f"{statistics.median(values):.4g}") if values else None
        row[name] = int(median) if median is not None and name in COUNTS else median
    return row


if __name__ == "__main__":
    main()
