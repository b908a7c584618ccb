"""Samples of a policy, kept in a file: what a study selects from, drawn once.

A line of the file is a problem: its text, its completions in order, what they cost. The draws are those of a best-of-N
of the same seed, so any smaller budget is the beginning of a larger one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tts_search.engine.drivers import lift
from tts_search.errors import SearchError
from tts_search.search.protocol import Expand, Policy
from tts_search.search.seeds import Seeds
from tts_search.search.types import Step, StepParams

__all__ = ["Drawn", "draw", "read_samples"]


@dataclass(frozen=True)
class Drawn:
    """What was drawn for a problem.

    Attributes
    ----------
    id, problem : str
        Of the task.
    steps : tuple of Step
        The completions, a step each.
    tokens, prefill_tokens : int
        Sampled; of the prompt.
    flops : float
        Of all forwards.
    seconds : float
        Since the problem before it was done: problems are drawn side by side.
    """

    id: str
    problem: str
    steps: tuple[Step, ...]
    tokens: int
    prefill_tokens: int
    flops: float
    seconds: float


def draw(
    policy: Policy,
    problems: Mapping[str, str],
    path: str | Path,
    *,
    n: int,
    seed: int = 0,
    params: StepParams,
    in_flight: int = 2,
) -> list[Drawn]:
    """Draw n completions of each problem into a file; what the file holds already is not drawn again.

    Parameters
    ----------
    policy : Policy
        Samples.
    problems : mapping of str to str
        Texts by id.
    path : str or Path
        JSONL; each problem is on disk as soon as it is done.
    n : int
        Completions of a problem.
    seed : int
        Fixes the draws.
    params : StepParams
        How to sample, without a delimiter.
    in_flight : int
        Problems drawn side by side.

    Returns
    -------
    list of Drawn
        In the problems' order.

    Raises
    ------
    SearchError
        If the policy fails for a problem, or the file holds another text or another number under an id.
    """
    path = Path(path)
    known = {one.id: one for one in read_samples(path)} if path.exists() else {}
    for name, text in problems.items():
        if name in known and (known[name].problem != text or len(known[name].steps) != n):
            raise SearchError(f"{path}: {name}: holds samples of another prompt or another number than {n}")
    todo = {name: text for name, text in problems.items() if name not in known}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for one in _drawn(policy, todo, n, seed, params, in_flight):
            file.write(json.dumps(asdict(one)) + "\n")
            file.flush()
            known[one.id] = one
    return [known[name] for name in problems]


def _drawn(
    policy: Policy, problems: Mapping[str, str], n: int, seed: int, params: StepParams, in_flight: int
) -> Iterator[Drawn]:
    driver = lift(policy)
    names, waiting, running = list(problems), iter(range(len(problems))), set[int]()
    before = time.perf_counter()
    try:
        while True:
            while len(running) < in_flight and (number := next(waiting, None)) is not None:
                text = problems[names[number]]
                seeds = Seeds(seed, text)
                driver.begin(number, text)
                running.add(number)
                children = tuple(range(1, n + 1))
                driver.submit([Expand(number, 0, children, (), tuple(seeds.of((i,)) for i in range(n)), params)])
            if not running:
                return
            for request, answer in driver.step():
                running.remove(request.problem)
                usage = driver.end(request.problem)
                name = names[request.problem]
                if isinstance(answer, Exception):
                    raise SearchError(f"{name}: {type(answer).__name__}: {answer}") from answer
                before, seconds = time.perf_counter(), time.perf_counter() - before
                yield Drawn(
                    name, problems[name], tuple(answer), usage.tokens, usage.prefill_tokens, usage.flops, seconds
                )
    finally:
        for number in running:
            driver.end(number)


def read_samples(path: str | Path) -> list[Drawn]:
    """Read a file of samples; what a crash left half-written at its end is passed over.

    Raises
    ------
    ValueError
        If a line that others follow is no such record.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    found: list[Drawn] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_parsed(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: expected the samples of a problem: {error}") from None
    return found


def _parsed(entry: dict[str, Any]) -> Drawn:
    steps: Sequence[Any] = entry.pop("steps")
    return Drawn(**entry, steps=tuple(Step(**step) for step in steps))
