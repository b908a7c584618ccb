"""Samples of a policy, drawn once and kept in a file; a study selects from them.

The first line of the file has the settings of the draws. Every other line has a few completions of one problem, and
their cost. Completions are drawn in rounds over all problems, so an incomplete file has equally many of each. The draws
are those of a best-of-N with the same seed: any smaller budget is the beginning of a larger one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tts_search.engine.drivers import Opened, lift
from tts_search.errors import SearchError
from tts_search.search.protocol import Expand, Policy
from tts_search.search.seeds import Seeds
from tts_search.search.types import Step, StepParams

__all__ = ["Drawn", "appending", "draw", "read_head", "read_lines", "read_samples"]


@dataclass(frozen=True)
class Drawn:
    """Some completions of a problem.

    Attributes
    ----------
    id : str
        The id of the task.
    first : int
        The number of the first completion here among all completions of the problem.
    steps : tuple of Step
        The completions, one step each.
    tokens, prefill_tokens : int
        Numbers of tokens that were sampled, and of tokens in the prompt.
    flops : float
        Floating-point operations of all forwards.
    seconds : float
        Time since the previous line was done. (Problems are drawn at the same time.)
    """

    id: str
    first: int
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
    about: str = "",
    each: int = 16,
    in_flight: int = 16,
) -> list[Drawn]:
    """Draw n completions of each problem into a file. Completions that are in the file are not drawn again.

    Parameters
    ----------
    policy : Policy
        The policy that samples.
    problems : mapping of str to str
        Texts by id.
    path : str or Path
        JSONL. Each line is on disk as soon as it is done.
    n : int
        Completions of a problem; a multiple of `each`.
    seed : int
        Fixes the draws.
    params : StepParams
        How to sample, without a delimiter.
    about : str
        Everything else that the samples depend on, such as the checkpoint and its precision.
    each : int
        Number of completions in a line.
    in_flight : int
        Number of lines that are drawn at the same time.

    Returns
    -------
    list of Drawn
        The completions of a problem one after the other, in the order of the problems.

    Raises
    ------
    ValueError
        If `each` does not divide `n`, or the file has samples that were drawn differently.
    SearchError
        If the policy fails for a problem.
    """
    if n < 1 or n % each:
        raise ValueError(f"n: expected a multiple of {each}, got {n}")
    path = Path(path)
    head = {"about": about, "seed": seed, "each": each, "params": asdict(params), "problems": dict(problems)}
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {(one.id, one.first): one for one in read_samples(path, head)}
    with appending(path) as write:
        if path.stat().st_size == 0:
            write(head)
        lines = [(name, first) for first in range(0, n, each) for name in problems if (name, first) not in known]
        for one in _drawn(policy, problems, lines, each, seed, params, in_flight):
            write(asdict(one))
            known[one.id, one.first] = one
    return [known[name, first] for name in problems for first in range(0, n, each)]


def _drawn(
    policy: Policy,
    problems: Mapping[str, str],
    lines: Sequence[tuple[str, int]],
    each: int,
    seed: int,
    params: StepParams,
    in_flight: int,
) -> Iterator[Drawn]:
    driver = lift(policy)
    waiting, running = iter(range(len(lines))), set[int]()
    before = time.perf_counter()
    try:
        while True:
            while len(running) < in_flight and (number := next(waiting, None)) is not None:
                name, first = lines[number]
                seeds = Seeds(seed, problems[name])
                driver.begin(number, problems[name])
                running.add(number)
                drawn = tuple(seeds.of((first + child,)) for child in range(each))
                driver.submit([Expand(number, 0, tuple(range(1, each + 1)), (), drawn, params)])
            if not running:
                return
            for request, answer in driver.step():
                running.remove(request.problem)
                usage = driver.end(request.problem)
                name, first = lines[request.problem]
                if isinstance(answer, Exception):
                    raise SearchError(f"{name}: {type(answer).__name__}: {answer}") from answer
                before, seconds = time.perf_counter(), time.perf_counter() - before
                yield Drawn(name, first, tuple(answer), usage.tokens, usage.prefill_tokens, usage.flops, seconds)
    finally:
        for number in running:
            driver.end(number)
        if isinstance(driver, Opened):
            driver.close()


def read_samples(path: str | Path, head: Mapping[str, Any] | None = None) -> list[Drawn]:
    """Read a file of samples. A file that does not exist has none.

    Raises
    ------
    ValueError
        If it was drawn differently than `head` says.
    """
    first, *entries = read_lines(path) or [head]
    if head is not None and first != head:
        differing = [name for name, value in head.items() if first.get(name) != value]
        raise ValueError(f"{path}: expected samples drawn in the same way, got another {', '.join(differing)}")
    return [Drawn(**{**entry, "steps": tuple(Step(**step) for step in entry["steps"])}) for entry in entries]


def read_head(path: str | Path) -> dict[str, Any]:
    """Return how a file's samples were drawn."""
    head: dict[str, Any] = read_lines(path)[0]
    return head


def read_lines(path: str | Path) -> list[Any]:
    """Return the values in the lines of a file. Lines that a crash left incomplete are skipped."""
    values = []
    for line in Path(path).read_text(encoding="utf-8").split("\n") if Path(path).exists() else ():
        with suppress(ValueError):
            values.append(json.loads(line))
    return values


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Any], None]]:
    """Yield a function that appends a value to a file as one line, which is on disk at once."""
    with open(path, "a", encoding="utf-8") as file:
        if path.read_bytes()[-1:] not in (b"", b"\n"):  # an incomplete line
            file.write("\n")

        def write(value: Any) -> None:
            file.write(json.dumps(value) + "\n")
            file.flush()

        yield write
