"""The engine: drives the algorithms of many problems side by side and merges what they ask for into full batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from tts_search.engine.sharing import SharedVerifier
from tts_search.errors import SearchError
from tts_search.search.algorithms import algorithm_of
from tts_search.search.answers import Equality
from tts_search.search.config import SearchConfig
from tts_search.search.moves import Moves
from tts_search.search.protocol import Expand, Policy, Release, Request, Score, ScoreAndPrune, Usage, Verifier
from tts_search.search.result import SearchResult, build_result
from tts_search.search.run import Branch, Run
from tts_search.search.stats import SearchStats

__all__ = ["Engine"]

Outcome = tuple[int, "SearchResult | SearchError"]


class _Driver(Protocol):
    def begin(self, problem: int, text: str) -> None: ...
    def release(self, problem: int, branches: Sequence[int]) -> None: ...
    def end(self, problem: int) -> Usage: ...


@dataclass(eq=False)
class _Task:
    """A problem in flight: its algorithm, and what that waits for."""

    run: Run
    text: str
    moves: Moves[list[Branch]]
    started: float
    begun: list[_Driver] = field(default_factory=list)  # the drivers that know of it
    requests: Sequence[Request] = ()


class Engine:
    """Searches problems, up to `max_in_flight` of them at a time.

    A round of all problems in flight is one call of the policy (one more for each step of lookahead) and one of the
    verifier, which reads equal texts once. A problem whose search ends makes room for the next one. A problem's draws
    depend on nothing but the seed, its text and the path in its tree. What stands beside it in a batch can change the
    last bit of its attention: another token by that is rare in bfloat16 (one in thousands) and was not seen in float32.

    A failure that belongs to one problem ends that one. If a driver raises, all problems of that call fail.
    """

    def __init__(
        self,
        policy: Policy,
        verifier: Verifier | None,
        config: SearchConfig,
        extract_answer: Callable[[str], str | None],
        max_in_flight: int,
        equal: Equality,
    ) -> None:
        self.policy = policy
        self.verifier = None if verifier is None else SharedVerifier(verifier)
        self.config = config
        self.algorithm = algorithm_of(config)
        self.extract_answer = extract_answer
        self.max_in_flight = max_in_flight
        self.equal = equal
        self._tasks: list[_Task] = []

    def run(self, problems: Iterable[str]) -> Iterator[Outcome]:
        """Yield (index, result or error) as problems finish. Closing the iterator ends the problems in flight."""
        waiting = enumerate(problems)
        try:
            while True:
                yield from self._admit(waiting)
                if not self._tasks:
                    return
                while any(isinstance(task.requests[0], Expand) for task in self._tasks):  # again for each lookahead
                    yield from self._serve(Expand, self.policy.expand)
                if self.verifier is not None:
                    yield from self._serve(Score, self.verifier.score)
                    yield from self._serve(ScoreAndPrune, self.verifier.score_and_prune)
        finally:
            for task in list(self._tasks):
                self._close(task)

    def _admit(self, waiting: Iterator[tuple[int, str]]) -> Iterator[Outcome]:
        while len(self._tasks) < self.max_in_flight:
            index, text = next(waiting, (None, ""))
            if index is None:
                return
            if not isinstance(text, str) or not text.strip():
                yield index, SearchError(f"expected a problem that is not empty, got {text!r:.200}", index, 0)
                continue
            run = Run(
                index,
                text,
                self.config,
                scored=self.verifier is not None,
                extract_answer=self.extract_answer,
                equal=self.equal,
            )
            moves = self.algorithm(run)
            if not isinstance(moves, Generator):
                name, kind = self.config.method_name, type(moves).__name__
                message = f"method: expected a generator function of a Run, got {name}, which returned a {kind}"
                yield index, SearchError(message, index, 0)
                continue
            task = _Task(run, text, moves, time.perf_counter())
            self._tasks.append(task)
            yield from self._guarded(task, partial(self._begin, task))

    def _begin(self, task: _Task) -> SearchResult | None:
        for driver in (self.policy, self.verifier):
            if driver is not None:
                driver.begin(task.run.problem, task.text)
                task.begun.append(driver)
        return self._advance(task, None)

    def _serve(self, kind: type, call: Callable[[Any], Sequence[Any]]) -> Iterator[Outcome]:
        """Answer every request of one kind by one call, and let the algorithms go on."""
        tasks = [task for task in self._tasks if isinstance(task.requests[0], kind)]
        requests = [request for task in tasks for request in task.requests]
        if not requests:
            return
        try:
            answers = call(requests)
            if len(answers) != len(requests):
                raise ValueError(f"expected {len(requests)} answers, one a request, got {len(answers)}")
        except Exception as error:
            answers = [error] * len(requests)
        begin = 0
        for task in tasks:
            end = begin + len(task.requests)
            own = answers[begin:end]
            yield from self._guarded(task, partial(self._answer, task, own))
            begin = end

    def _answer(self, task: _Task, answers: Sequence[Any]) -> SearchResult | None:
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return self._advance(task, answers)

    def _advance(self, task: _Task, answers: Sequence[Any] | None) -> SearchResult | None:
        """Send answers to an algorithm and carry out its releases, until it wants a model or returns."""
        try:
            task.requests = task.moves.send(answers)  # type: ignore[arg-type]  # a generator starts with None
            while isinstance(task.requests[0], Release):
                for request in task.requests:
                    if isinstance(request, Release):
                        self._release(task, request.branches)
                task.requests = task.moves.send([None] * len(task.requests))
        except StopIteration as stop:
            return self._finish(task, stop.value)
        return None

    def _release(self, task: _Task, branches: Sequence[int]) -> None:
        problem = task.run.problem
        self.policy.release(problem, branches)
        if self.verifier is not None:
            self.verifier.release(problem, branches)

    def _finish(self, task: _Task, branches: list[Branch]) -> SearchResult:
        usages = [task.begun.pop(0).end(task.run.problem) for _ in range(len(task.begun))]
        policy_usage, verifier_usage = (*usages, Usage())[:2]
        stats = SearchStats.of(
            policy_usage,
            verifier_usage,
            wall_s=time.perf_counter() - task.started,
            rounds=task.run.round,
            branches=len(task.run.branches) - 1,
            path_tokens=sum(branch.path_tokens for branch in task.run.branches),
        )
        return build_result(task.run, task.text, branches, self.extract_answer, stats)

    def _guarded(self, task: _Task, action: Callable[[], SearchResult | None]) -> Iterator[Outcome]:
        """Do something for a problem; yield its result if that ended it, or the error if it failed."""
        outcome: SearchResult | SearchError | None
        try:
            outcome = action()
        except SearchError as error:
            outcome = error
        except Exception as error:
            run = task.run
            outcome = SearchError(f"{type(error).__name__}: {error}", run.problem, run.round)
            outcome.__cause__ = error
        if outcome is not None:
            self._close(task)
            yield task.run.problem, outcome

    def _close(self, task: _Task) -> None:
        self._tasks.remove(task)
        task.moves.close()
        for driver in task.begun:
            with suppress(Exception):  # the problem has its result or its error already
                driver.end(task.run.problem)
