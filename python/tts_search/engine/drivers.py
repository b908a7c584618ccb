"""Makes a driver that answers whole batches behave like one that answers request by request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from tts_search.search.protocol import (
    Expand,
    Policy,
    PruningVerifier,
    Score,
    ScoreAndPrune,
    Usage,
    Verifier,
    usage_of,
)

__all__ = ["Driver", "Lifted", "lift"]


class Driver(Protocol):
    """A policy or a verifier that takes requests at any time, and answers each when it is done.

    `problem` is a number: the same from `begin` to `end`, unique among the problems in flight.
    """

    def begin(self, problem: int, text: Any) -> None:
        """Announce a problem: a text or, for a policy, messages. Its root is node 0."""

    def submit(self, requests: Sequence[Any]) -> None:
        """Take requests in."""

    def step(self) -> Sequence[tuple[Any, Any]]:
        """Advance the work; return pairs of a request (the same object) and its answer or an exception."""

    def cancel(self, problem: int) -> None:
        """Forget the unanswered requests of a problem."""

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Forget these branches."""

    def end(self, problem: int) -> Usage:
        """Forget what is left of the problem, and return its cost."""


def lift(driver: Any) -> Driver:
    """A driver unchanged, if it answers request by request; else `Lifted`."""
    whole = all(hasattr(driver, name) for name in ("submit", "step", "cancel"))
    return driver if whole else Lifted(driver)


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
        for request in requests:
            if type(request) not in self._calls:
                raise TypeError(
                    f"expected a policy of a local model for a {type(request).__name__}, got another driver"
                )
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


def _answers(call: Callable[[Any], Sequence[Any]], batch: list[Any]) -> Sequence[Any]:
    try:
        answers = call(batch)
        if len(answers) != len(batch):
            raise ValueError(f"expected {len(batch)} answers, one per request, got {len(answers)}")
    except Exception as error:
        return [error] * len(batch)
    return answers
