"""Makes drivers that answer whole batches, or on an event loop, behave like ones that answer request by request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

from tts_search.search.protocol import (
    Concurrent,
    Expand,
    Lifetime,
    Policy,
    PruningVerifier,
    Score,
    ScoreAndPrune,
    Stepwise,
    Verifier,
    usage_of,
)

__all__ = ["Driver", "Lifted", "Opened", "lift", "rests"]


class Driver(Lifetime, Stepwise[Any], Protocol):
    """A policy or a verifier that takes requests at any time, and answers each when it is done."""


def lift(driver: Any) -> Driver:
    """A driver unchanged, if it answers request by request; else `Opened` or `Lifted`."""
    if all(hasattr(driver, name) for name in ("submit", "step", "cancel")):
        return driver  # type: ignore[no-any-return]
    return Opened(driver) if getattr(driver, "is_concurrent", False) else Lifted(driver)


def rests(driver: Driver, num_waiting: int) -> bool:
    """Whether a step of a driver with so many requests would bring nothing, since its answers come from elsewhere."""
    says: bool = getattr(driver, "is_idle", not num_waiting)
    return says


class Lifted:
    """Makes a driver from a policy or verifier that answers batches.

    A step is one call with all requests of one kind that wait at that time, in the order in which they came. So a
    problem's requests are in candidate order. The call is made in the caller's thread, and never twice at once.

    Parameters
    ----------
    driver : Policy or Verifier
        If it raises an error, or returns a wrong number of answers, the error is the answer to all requests of the
        call.
    """

    def __init__(self, driver: Policy | Verifier) -> None:
        self.begin, self.release, self.end = driver.begin, driver.release, driver.end
        self.usage = partial(usage_of, driver)
        self._calls: dict[type, Callable[[Any], Sequence[Any]]] = {}
        if isinstance(driver, Policy):
            self._calls[Expand] = driver.expand
        if isinstance(driver, Verifier):
            self._calls[Score] = driver.score
        if isinstance(driver, PruningVerifier):
            self._calls[ScoreAndPrune] = driver.score_and_prune
        self._waiting: list[Any] = []

    def submit(self, requests: Sequence[Any]) -> None:
        """Take requests in.

        Raises
        ------
        TypeError
            If the driver cannot answer such requests.
        """
        _refuse(requests, self._calls)
        self._waiting += requests

    def step(self) -> list[tuple[Any, Any]]:
        """Call the driver, once for each kind of waiting request."""
        waiting, self._waiting = self._waiting, []
        answered: list[tuple[Any, Any]] = []
        for kind, call in self._calls.items():
            if batch := [request for request in waiting if isinstance(request, kind)]:
                answered += zip(batch, _answers(call, batch), strict=True)
        return answered

    def cancel(self, problem: int) -> None:
        """Forget the unanswered requests of a problem."""
        self._waiting = [request for request in self._waiting if request.problem != problem]


class Opened:
    """Makes a driver of one that keeps many requests open on an event loop, in a thread that runs until `close`.

    What is submitted is under way at once. A policy's requests are answered apart. Those of a problem to a verifier,
    which may compete, are answered together.

    Parameters
    ----------
    driver : Concurrent
        If it raises, or gives another number of answers than it was asked for, that is the answer to these requests.

    Attributes
    ----------
    on_arrival : callable or None
        Called when there is an answer, from any thread; `step` never waits then. None: it waits for one.
    """

    def __init__(self, driver: Concurrent) -> None:
        self.begin, self.release, self.end = driver.begin, driver.release, driver.end
        self.usage = partial(usage_of, driver)
        self.on_arrival: Callable[[], None] | None = None
        self._driver = driver
        self._kinds = [kind for kind, its in ((Expand, Policy), (Score, Verifier)) if isinstance(driver, its)]
        from tts_search.policies.background import LoopThread  # only for those who call servers

        self._loop = LoopThread(driver.hang_up)
        self._open: dict[Future[Sequence[Any]], list[Any]] = {}  # what each call is to answer
        self._arrived: SimpleQueue[Future[Sequence[Any]]] = SimpleQueue()

    @property
    def is_idle(self) -> bool:
        """Whether a step would bring nothing now."""
        return self._arrived.empty()

    def submit(self, requests: Sequence[Any]) -> None:
        """Take requests in.

        Raises
        ------
        TypeError
            If the driver has no answer to such requests.
        """
        _refuse(requests, self._kinds)
        for batch in _batches(requests):
            call = asyncio.run_coroutine_threadsafe(self._driver.answer(batch), self._loop.get())
            self._open[call] = batch
            call.add_done_callback(self._arrive)

    def step(self) -> list[tuple[Any, Any]]:
        """What has been answered, in the order in which the answers came."""
        answered: list[tuple[Any, Any]] = []
        while not self._arrived.empty() or (self.on_arrival is None and self._open and not answered):
            call = self._arrived.get()
            if (batch := self._open.pop(call, None)) is not None:  # or it was cancelled
                answered += zip(batch, _answers(partial(_result, call), batch), strict=True)
        return answered

    def cancel(self, problem: int) -> None:
        """Break off the requests of a problem that are not answered yet."""
        for call in [call for call, batch in self._open.items() if batch[0].problem == problem]:
            del self._open[call]
            call.cancel()

    def close(self) -> None:
        """Break off all requests; end the thread. Another request starts it again."""
        for call in self._open:
            call.cancel()
        self._open.clear()
        self._loop.close()

    def _arrive(self, call: Future[Sequence[Any]]) -> None:
        self._arrived.put(call)
        if self.on_arrival is not None:
            self.on_arrival()


def _result(call: Future[Sequence[Any]], _: Any) -> Sequence[Any]:
    return call.result()


def _batches(requests: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield the requests that are answered together."""
    problems: dict[int, list[Any]] = {}
    for request in requests:
        if isinstance(request, Expand):
            yield [request]
        else:
            problems.setdefault(request.problem, []).append(request)
    yield from problems.values()


def _refuse(requests: Sequence[Any], kinds: Container[type]) -> None:
    """Raise the error of a request that is of none of these kinds."""
    for request in requests:
        if type(request) not in kinds:
            raise TypeError(f"expected a policy of a local model for a {type(request).__name__}, got another driver")


def _answers(call: Callable[[Any], Sequence[Any]], batch: list[Any]) -> Sequence[Any]:
    try:
        answers = call(batch)
        if len(answers) != len(batch):
            raise ValueError(f"expected {len(batch)} answers, one per request, got {len(answers)}")
    except Exception as error:
        return [error] * len(batch)
    return answers
