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
class _Flight:
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
        self._flights: list[_Flight] = []

    def run(self, problems: Iterable[str]) -> Iterator[Outcome]:
        """Yield (index, result or error) as problems finish. Closing the iterator ends the problems in flight."""
        waiting = enumerate(problems)
        try:
            while True:
                yield from self._admit(waiting)
                if not self._flights:
                    return
                while any(
                    isinstance(flight.requests[0], Expand) for flight in self._flights
                ):  # again for each lookahead
                    yield from self._serve(Expand, self.policy.expand)
                if self.verifier is not None:
                    yield from self._serve(Score, self.verifier.score)
                    yield from self._serve(ScoreAndPrune, self.verifier.score_and_prune)
        finally:
            for flight in list(self._flights):
                self._close(flight)

    def _admit(self, waiting: Iterator[tuple[int, str]]) -> Iterator[Outcome]:
        while len(self._flights) < self.max_in_flight:
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
            flight = _Flight(run, text, moves, time.perf_counter())
            self._flights.append(flight)
            yield from self._guarded(flight, partial(self._begin, flight))

    def _begin(self, flight: _Flight) -> SearchResult | None:
        for driver in (self.policy, self.verifier):
            if driver is not None:
                driver.begin(flight.run.problem, flight.text)
                flight.begun.append(driver)
        return self._advance(flight, None)

    def _serve(self, kind: type, call: Callable[[Any], Sequence[Any]]) -> Iterator[Outcome]:
        """Answer every request of one kind by one call, and let the algorithms go on."""
        flights = [flight for flight in self._flights if isinstance(flight.requests[0], kind)]
        requests = [request for flight in flights for request in flight.requests]
        if not requests:
            return
        try:
            answers = call(requests)
            if len(answers) != len(requests):
                raise ValueError(f"expected {len(requests)} answers, one a request, got {len(answers)}")
        except Exception as error:
            answers = [error] * len(requests)
        begin = 0
        for flight in flights:
            end = begin + len(flight.requests)
            own = answers[begin:end]
            yield from self._guarded(flight, partial(self._answer, flight, own))
            begin = end

    def _answer(self, flight: _Flight, answers: Sequence[Any]) -> SearchResult | None:
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return self._advance(flight, answers)

    def _advance(self, flight: _Flight, answers: Sequence[Any] | None) -> SearchResult | None:
        """Send answers to an algorithm and carry out its releases, until it wants a model or returns."""
        try:
            flight.requests = flight.moves.send(answers)  # type: ignore[arg-type]  # a generator starts with None
            while isinstance(flight.requests[0], Release):
                for request in flight.requests:
                    if isinstance(request, Release):
                        self._release(flight, request.branches)
                flight.requests = flight.moves.send([None] * len(flight.requests))
        except StopIteration as stop:
            return self._finish(flight, stop.value)
        return None

    def _release(self, flight: _Flight, branches: Sequence[int]) -> None:
        problem = flight.run.problem
        self.policy.release(problem, branches)
        if self.verifier is not None:
            self.verifier.release(problem, branches)

    def _finish(self, flight: _Flight, branches: list[Branch]) -> SearchResult:
        usages = [flight.begun.pop(0).end(flight.run.problem) for _ in range(len(flight.begun))]
        policy_usage, verifier_usage = (*usages, Usage())[:2]
        stats = SearchStats.of(
            policy_usage,
            verifier_usage,
            wall_s=time.perf_counter() - flight.started,
            rounds=flight.run.round,
            branches=len(flight.run.branches) - 1,
            path_tokens=sum(branch.path_tokens for branch in flight.run.branches),
        )
        return build_result(flight.run, flight.text, branches, self.extract_answer, stats)

    def _guarded(self, flight: _Flight, action: Callable[[], SearchResult | None]) -> Iterator[Outcome]:
        """Do something for a problem; yield its result if that ended it, or the error if it failed."""
        outcome: SearchResult | SearchError | None
        try:
            outcome = action()
        except SearchError as error:
            outcome = error
        except Exception as error:
            run = flight.run
            outcome = SearchError(f"{type(error).__name__}: {error}", run.problem, run.round)
            outcome.__cause__ = error
        if outcome is not None:
            self._close(flight)
            yield flight.run.problem, outcome

    def _close(self, flight: _Flight) -> None:
        self._flights.remove(flight)
        flight.moves.close()
        for driver in flight.begun:
            with suppress(Exception):  # the problem has its result or its error already
                driver.end(flight.run.problem)
