"""Policies and verifiers for tests: scripted ones, and random trees; they check that the engine keeps the protocol."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tts_search import Step, StepParams, Usage
from tts_search.search.protocol import Expand, Score

StepFn = Callable[[str, tuple[str, ...], int, int, StepParams], Step]  # problem, steps, child number, seed, params
ScoreFn = Callable[[str, tuple[str, ...]], Sequence[float]]


@dataclass
class _Problem:
    text: str
    live: dict[int, tuple[str, ...]]  # branches that may be used, with their steps
    released: set[int] = field(default_factory=set)

    def release(self, branches: Sequence[int]) -> None:
        assert len(set(branches)) == len(branches)
        for branch in branches:
            del self.live[branch]  # a KeyError: released twice, or never made
            self.released.add(branch)


class Driver:
    """Books of what is in flight; every use of a branch that is not live fails."""

    def __init__(self) -> None:
        self.problems: dict[int, _Problem] = {}
        self.ended: list[_Problem] = []
        self.calls: list[list] = []

    def begin(self, problem: int, text: str) -> None:
        assert problem not in self.problems
        self.problems[problem] = _Problem(text, {0: ()})

    def release(self, problem: int, branches: Sequence[int]) -> None:
        self.problems[problem].release(branches)

    def end(self, problem: int) -> Usage:
        self.ended.append(self.problems.pop(problem))
        return Usage()


class ScriptedPolicy(Driver):
    def __init__(self, step_fn: StepFn) -> None:
        super().__init__()
        self.step_fn = step_fn

    def expand(self, requests: Sequence[Expand]) -> list[list[Step]]:
        self.calls.append(list(requests))
        return [self._expand(request) for request in requests]

    def _expand(self, request: Expand) -> list[Step]:
        problem = self.problems[request.problem]
        assert problem.live[request.branch] == request.steps
        assert len(request.children) == len(request.seeds) > 0
        assert all(0 <= seed < 2**63 for seed in request.seeds)
        assert request.params.max_tokens >= 1
        steps = []
        for number, (child, seed) in enumerate(zip(request.children, request.seeds, strict=True)):
            assert child not in problem.live
            assert child not in problem.released
            step = self.step_fn(problem.text, request.steps, number, seed, request.params)
            problem.live[child] = (*request.steps, step.text) if step.text else request.steps
            steps.append(step)
        return steps


class ScriptedVerifier(Driver):
    def __init__(self, score_fn: ScoreFn) -> None:
        super().__init__()
        self.score_fn = score_fn

    def score(self, requests: Sequence[Score]) -> list[Sequence[float]]:
        self.calls.append(list(requests))
        return [self._score(request) for request in requests]

    def _score(self, request: Score) -> Sequence[float]:
        problem = self.problems[request.problem]
        prefix = problem.live[request.parent]
        assert request.steps[: len(prefix)] == prefix
        assert len(request.steps) > len(prefix)
        assert all(step.strip() for step in request.steps + request.lookahead)
        assert request.branch not in problem.live
        assert request.branch not in problem.released
        problem.live[request.branch] = request.steps
        return self.score_fn(problem.text, request.steps + request.lookahead)


# Scripts by name: a branch's name is its path of child numbers, "2.0.1", and that is the text of its last step.


def name_of(text: str) -> str:
    return text.strip().removeprefix("end ")


def names(texts: Sequence[str]) -> list[str]:
    return [name_of(text) for text in texts]


def by_name(finished: Sequence[str] = (), **special: Step) -> StepFn:
    """A policy whose steps are their branches' names; those named in `finished` end the answer."""

    def step(_: str, steps: tuple[str, ...], number: int, __: int, params: StepParams) -> Step:
        name = f"{name_of(steps[-1])}.{number}" if steps else str(number)
        if name in special:
            return special[name]
        if name in finished or params.delimiter is None:
            return Step(f"end {name}", True, 1, reason="eos")
        return Step(f"{name}\n\n", False, 1)

    return step


def score_names(scores: dict[str, float], default: float = 0.0) -> ScoreFn:
    return lambda _, steps: [scores.get(name_of(step), default) for step in steps]


# Random trees: everything follows from the branch's seed, so an oracle that knows the path knows the step.


@dataclass(frozen=True)
class RandomTree:
    """Steps from a small vocabulary (so texts repeat), early ends, lengths, empty steps; scores with many ties."""

    seed: int = 0
    end: float = 0.2
    length: float = 0.0
    empty: float = 0.0
    blank: float = 0.0
    words: int = 3
    marker: str | None = None
    levels: int = 4  # of scores
    answers: tuple[str, ...] = ()  # most answers that end hold one of them in a box

    def step(self, _: str, steps: tuple[str, ...], __: int, seed: int, params: StepParams) -> Step:
        key = f"{self.seed}/{''.join(steps)}" if params.temperature == 0 else f"{self.seed}/{seed}"
        rng = random.Random(key)
        kind, word = rng.random(), f"w{rng.randrange(self.words)}"
        if self.marker is not None and rng.random() < self.end:
            word += self.marker
        if kind < self.end and self.answers and rng.random() < 0.8:
            word += f" \\boxed{{{rng.choice(self.answers)}}}"
        if kind < self.end:
            return Step("" if kind < self.end * self.empty else word, True, 1, reason="eos")
        if kind < self.end + self.length:
            return Step(word, False, 1, reason="length")
        if kind < self.end + self.length + 0.2 * self.empty:
            return Step("", False)
        if rng.random() < self.blank:
            return Step("\n\n", False, 1)
        if params.delimiter is None:
            return Step(f"{word}\n\n{word}", rng.random() < 0.8, 2, reason="eos")
        return Step(word + params.delimiter, False, 1)

    def scores(self, problem: str, steps: tuple[str, ...]) -> list[float]:
        return [self.score(problem, steps[: count + 1]) for count in range(len(steps))]

    def score(self, problem: str, steps: tuple[str, ...]) -> float:
        return random.Random(f"{self.seed}/{problem}/{''.join(steps)}").randrange(self.levels) / self.levels
