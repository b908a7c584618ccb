"""The scheduler: runs the algorithms of many problems, each at its own pace, over one policy and one verifier."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

from tts_search.engine.drivers import Driver, Lifted, Opened, lift, rests
from tts_search.engine.sharing import SharedVerifier
from tts_search.engine.speculation import AUTO_ROWS, Speculation, can_speculate
from tts_search.errors import SearchError
from tts_search.search.algorithms import algorithm_of
from tts_search.search.answers import Equality
from tts_search.search.checks import integer
from tts_search.search.config import SearchConfig
from tts_search.search.moves import Moves
from tts_search.search.protocol import (
    Expand,
    Generate,
    Generated,
    Load,
    Policy,
    Release,
    Request,
    Score,
    ScoreAndPrune,
    Usage,
    Verifier,
    usage_of,
)
from tts_search.search.result import SearchResult, build_result
from tts_search.search.run import Branch, Run
from tts_search.search.stats import SearchStats
from tts_search.search.types import Messages

__all__ = ["Costs", "Scheduler", "SearchOutcome", "Speculate"]

MAX_ROWS: Final = 1024

Costs = Callable[[], tuple[Usage, Usage]]
"""Returns the cost of a problem so far, for the policy and for the verifier."""

SearchOutcome = tuple[int, "SearchResult | SearchError"]
Speculate = Literal["auto"] | bool


@dataclass(eq=False)
class _Flight:
    """A problem in flight: its algorithm, and the requests that it waits for."""

    run: Run
    text: str
    prompt: str | Messages  # the problem for the policy
    moves: Moves[list[Branch]]
    started: float
    on_change: Callable[[Run, Costs], None]
    begun: list[Driver] = field(default_factory=list)  # the drivers that were told of it, the policy first
    ended: list[Usage] = field(default_factory=list)  # the costs for drivers that have ended it
    requests: Sequence[Request] = ()
    answers: dict[int, Any] = field(default_factory=dict)  # by the identity of the request

    @property
    def unanswered(self) -> list[Request]:
        """The requests that it waits for."""
        return [request for request in self.requests if id(request) not in self.answers]

    def costs(self) -> tuple[Usage, Usage]:
        """Return the cost so far, for the policy and for the verifier."""
        costs = [*self.ended, *(usage_of(driver, self.run.problem) for driver in self.begun)]
        policy, verifier, *_ = *costs, Usage(), Usage()
        return policy, verifier


@dataclass(eq=False)
class _Generation:
    """A request for text in progress."""

    request: Generate
    on_news: Callable[[Generated | Exception], None]
    num_left: int  # samples that have not ended


class Scheduler:
    """Searches many problems at the same time. No problem waits for another.

    A problem advances when its own requests are answered. The models take steps in turn; a step is a forward of a local
    model. A policy that answers batches is called until no problem waits for it, and only then the verifier, so that
    batches are as large as possible. A step of a model on a server takes the answers that have come, and never waits;
    the caller waits for `wake` while `is_idle`. A verifier gets equal texts of a problem only once.

    If a failure belongs to one problem, only that problem ends. If a driver raises an error, all problems that wait for
    it fail.

    Parameters
    ----------
    policy : Policy
        Generates steps.
    verifier : Verifier or None
        Scores them.
    extract_answer : callable
        Takes the answer out of a completion's text.
    equal : callable
        Whether two answers mean the same.
    max_rows : int or None
        There is room for a problem while fewer than this many steps run or wait at the policy, and fewer than this many
        candidates at the verifier; by default 1024. Ended steps take no room if the policy reports its running rows.
    max_in_flight : int or None
        There is room only while fewer than this many problems are in flight.
    prefix_cache : bool
        Whether models reuse the KV of earlier texts. This and `max_rows` are set on drivers that have these attributes.
    speculate : {"auto"} or bool
        Whether a local policy samples ahead (:class:`~tts_search.engine.speculation.Speculation`). True: with at most
        `max_rows` rows. "auto": if both models are local, while few rows run.

    Raises
    ------
    SearchError
        If a bound is no int of at least 1, or `speculate` neither "auto" nor a bool.

    Attributes
    ----------
    num_streams, num_candidates : int
        Steps and texts that run or wait at the policy, and candidates at the verifier.
    wake : Condition
        Notified when a server has answered.
    """

    def __init__(
        self,
        policy: Policy,
        verifier: Verifier | None,
        extract_answer: Callable[[str], str | None],
        equal: Equality,
        *,
        max_rows: int | None = None,
        max_in_flight: int | None = None,
        prefix_cache: bool = True,
        speculate: Speculate = "auto",
    ) -> None:
        for name, bound in (("max_rows", max_rows), ("max_in_flight", max_in_flight)):
            if bound is not None:
                integer(name, bound, at_least=1)
        if speculate not in ("auto", True, False):
            raise SearchError(f"speculate: expected 'auto', True or False, got {speculate!r}")
        self.max_rows = max_rows or MAX_ROWS
        self.max_in_flight = max_in_flight
        options = {"max_rows": self.max_rows, "prefix_cache": prefix_cache}
        for driver in (policy, verifier):
            for name, value in options.items():
                if hasattr(driver, name):
                    setattr(driver, name, value)
        self._driver = policy
        self.policy = lift(policy)
        self.verifier = None if verifier is None else lift(SharedVerifier(verifier))
        self.wake = threading.Condition()
        drivers: tuple[object, ...] = (self.policy, getattr(self.verifier, "verifier", None))
        self._opened = [driver for driver in drivers if isinstance(driver, Opened)]
        for opened in self._opened:
            opened.on_arrival = self._ring
        self.speculation: Speculation | None = None
        if self.verifier is not None and can_speculate(policy, verifier, speculate):
            rows = min(self.max_rows, AUTO_ROWS) if speculate == "auto" else self.max_rows
            self.policy = self.speculation = Speculation(policy, self.verifier, rows)
        self.extract_answer = extract_answer
        self.equal = equal
        self.num_streams = self.num_candidates = 0
        self._flights: dict[int, _Flight] = {}
        self._generations: dict[int, _Generation] = {}

    @property
    def num_problems(self) -> int:
        """Number of problems in flight and requests for text."""
        return len(self._flights) + len(self._generations)

    @property
    def has_room(self) -> bool:
        """Whether another problem should be started."""
        load, streams = self.load, self.num_streams
        if load is not None:  # a request's ended samples take no room
            streams = min(streams, load.rows + load.waiting)
        waiting = max(streams, self.num_candidates)
        return waiting < self.max_rows and self.num_problems < (self.max_in_flight or math.inf)

    @property
    def is_idle(self) -> bool:
        """Whether a step would bring nothing, since only servers are at work."""
        if not self._opened or (self.speculation is not None and self.speculation.is_busy):
            return False
        return rests(self.policy, self.num_streams) and (
            self.verifier is None or rests(self.verifier, self.num_candidates)
        )

    @property
    def load(self) -> Load | None:
        """The policy's load, if it is a local model."""
        load: Load | None = getattr(self._driver, "load", None)
        return load

    def start(
        self,
        number: int,
        problem: str | Messages,
        config: SearchConfig,
        *,
        seed_text: str | None = None,
        on_change: Callable[[Run, Costs], None] = lambda *_: None,
    ) -> Iterator[SearchOutcome]:
        """Start a problem under a number that is unique among those in flight; yield its outcome if it is known.

        `seed_text` replaces the problem in the hash of the draws. `on_change` is called each time the search advances;
        its second argument returns the costs at this time.
        """
        try:
            text = _text_of(problem)
        except SearchError as error:
            yield number, SearchError(error.message, number, 0)
            return
        if seed_text is None:
            seed_text = problem if isinstance(problem, str) else json.dumps(problem, ensure_ascii=False)
        run = Run(
            number,
            seed_text,
            config,
            scored=self.verifier is not None,
            extract_answer=self.extract_answer,
            equal=self.equal,
        )
        moves = algorithm_of(config)(run)
        if not isinstance(moves, Generator):
            name, kind = config.method_name, type(moves).__name__
            message = f"method: expected a generator function of a Run, got {name}, which returned a {kind}"
            yield number, SearchError(message, number, 0)
            return
        flight = _Flight(run, text, problem, moves, time.perf_counter(), on_change)
        self._flights[number] = flight
        yield from self._guarded(flight, partial(self._begin, flight))

    def generate(self, request: Generate, on_news: Callable[[Generated | Exception], None]) -> None:
        """Let a local model generate text. `on_news` gets all parts of all samples, or an error as the last part.

        The request's `problem` is a number that is unique among those in flight.
        """
        self._generations[request.problem] = _Generation(request, on_news, request.num_samples)
        self.num_streams += request.num_samples
        try:
            self.policy.submit([request])
        except Exception as error:
            self._tell(request, error)

    def step(self) -> Iterator[SearchOutcome]:
        """Let each model take a step; yield the outcomes of problems that its answers end."""
        yield from self._serve(self.policy)
        while isinstance(self.policy, Lifted) and self.num_streams:
            yield from self._serve(self.policy)
        if self.verifier is not None:
            yield from self._serve(self.verifier)

    def cancel(self, number: int) -> None:
        """End the problem or request with this number, if it is in flight, and free its memory at once."""
        if number in self._flights:
            self._close(self._flights[number])
        elif number in self._generations:
            self.num_streams -= self._generations.pop(number).num_left
            with suppress(Exception):
                self.policy.cancel(number)

    def close(self) -> None:
        """End everything that is in flight, and the threads of drivers."""
        for number in [*self._flights, *self._generations]:
            self.cancel(number)
        for opened in self._opened:
            opened.close()

    def _ring(self) -> None:
        with self.wake:
            self.wake.notify_all()

    def _serve(self, driver: Driver) -> Iterator[SearchOutcome]:
        """Let a driver take a step, and continue the algorithms that have all their answers."""
        try:
            answered = driver.step()
        except Exception as error:
            waiting = [request for flight in self._flights.values() for request in flight.unanswered]
            mine = driver is self.policy
            answered = [(request, error) for request in waiting if isinstance(request, Expand) == mine]
            answered += [(each.request, error) for each in self._generations.values() if mine]
            for number in {request.problem for request, _ in answered}:
                driver.cancel(number)
        ripe = []
        for request, answer in answered:
            if self.speculation is not None and self.speculation.heard(request, answer):
                continue
            if isinstance(request, Generate):
                self._tell(request, answer)
                continue
            flight = self._flights[request.problem]
            flight.answers[id(request)] = answer
            self._count([request], -1)
            if len(flight.answers) == len(flight.requests):
                ripe.append(flight)
        for flight in ripe:
            if self._flights.get(flight.run.problem) is flight:  # it was not cancelled in the meantime
                yield from self._guarded(flight, partial(self._answer, flight))

    def _tell(self, request: Generate, news: Generated | Exception) -> None:
        """Pass on the news of a request for text."""
        generation = self._generations[request.problem]
        if isinstance(news, Exception) or news.reason is not None:
            ended = generation.num_left if isinstance(news, Exception) else 1
            generation.num_left -= ended
            self.num_streams -= ended
        if not generation.num_left:
            del self._generations[request.problem]
        generation.on_news(news)

    def _begin(self, flight: _Flight) -> SearchResult | None:
        if self.speculation is not None:
            self.speculation.follow(flight.run)
        for driver, problem in ((self.policy, flight.prompt), (self.verifier, flight.text)):
            if driver is not None:
                driver.begin(flight.run.problem, problem)
                flight.begun.append(driver)
        return self._advance(flight, None)

    def _answer(self, flight: _Flight) -> SearchResult | None:
        answers = [flight.answers[id(request)] for request in flight.requests]
        for request, answer in zip(flight.requests, answers, strict=True):
            if isinstance(answer, Exception) and not isinstance(request, Score):  # algorithms handle a candidate's
                raise answer
        return self._advance(flight, answers)

    def _advance(self, flight: _Flight, answers: Sequence[Any] | None) -> SearchResult | None:
        """Send answers to an algorithm, and carry out its releases, until it requests work of a model or returns."""
        try:
            flight.requests, flight.answers = flight.moves.send(answers), {}  # type: ignore[arg-type]  # None starts it
            while isinstance(flight.requests[0], Release):
                for request in flight.requests:
                    if isinstance(request, Release):
                        self._release(flight, request.branches)
                flight.requests = flight.moves.send([None] * len(flight.requests))
        except StopIteration as stop:
            return self._finish(flight, stop.value)
        driver = self.policy if isinstance(flight.requests[0], Expand) else self.verifier
        assert driver is not None, "an algorithm asked for scores without a verifier"
        driver.submit(flight.requests)
        self._count(flight.requests, 1)
        return None

    def _release(self, flight: _Flight, branches: Sequence[int]) -> None:
        problem = flight.run.problem
        self.policy.release(problem, branches)
        if self.verifier is not None:
            self.verifier.release(problem, branches)

    def _finish(self, flight: _Flight, branches: list[Branch]) -> SearchResult:
        while flight.begun:
            flight.ended.append(flight.begun.pop(0).end(flight.run.problem))
        stats = SearchStats.of(
            *flight.costs(),
            wall_s=time.perf_counter() - flight.started,
            rounds=flight.run.round,
            branches=len(flight.run.branches) - 1,
            path_tokens=sum(branch.path_tokens for branch in flight.run.branches),
        )
        return build_result(flight.run, flight.text, branches, self.extract_answer, stats)

    def _guarded(self, flight: _Flight, action: Callable[[], SearchResult | None]) -> Iterator[SearchOutcome]:
        """Run an action of a problem. Yield its result if that ended it, or its error."""
        outcome: SearchResult | SearchError | None
        try:
            outcome = action()
            flight.on_change(flight.run, flight.costs)
        except SearchError as error:
            outcome = error
        except Exception as error:
            run = flight.run
            outcome = SearchError(f"{type(error).__name__}: {error}", run.problem, run.round)
            outcome.__cause__ = error
        if outcome is not None:
            self._close(flight)
            yield flight.run.problem, outcome

    def _count(self, requests: Sequence[Request], sign: int) -> None:
        """Count requests that start (1) or end (-1)."""
        for request in requests:
            if isinstance(request, Expand):
                self.num_streams += sign * len(request.children)
            elif isinstance(request, ScoreAndPrune):
                self.num_candidates += sign * sum(isinstance(each, Score) for each in request.candidates)
            else:
                self.num_candidates += sign

    def _close(self, flight: _Flight) -> None:
        number = flight.run.problem
        del self._flights[number]
        self._count(flight.unanswered, -1)
        flight.moves.close()
        while flight.begun:
            driver = flight.begun.pop(0)
            with suppress(Exception):  # the problem already has its result or its error
                driver.cancel(number)
                flight.ended.append(driver.end(number))


def _text_of(problem: str | Messages) -> str:
    """A problem's text for a verifier: its text, or the last message of a conversation."""
    text: object = problem
    if isinstance(problem, Sequence) and not isinstance(problem, str):
        whole = all(isinstance(each, Mapping) and isinstance(each.get("content"), str) for each in problem)
        if not problem or not whole or problem[-1].get("role") != "user":
            raise SearchError(f"messages: expected texts with roles, a user's last, got {problem!r:.200}")
        text = problem[-1]["content"]
    if not isinstance(text, str) or not text.strip():
        raise SearchError(f"expected a problem that is not empty, got {problem!r:.200}")
    return text
