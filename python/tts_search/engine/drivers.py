"""Makes a driver that answers whole batches behave like one that answers request by request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tts_search.search.protocol import Expand, Policy, PruningVerifier, Score, ScoreAndPrune, Usage, Verifier

__all__ = ["Driver", "Lifted", "lift"]


class Driver(Protocol):
    """A policy or a verifier that takes requests in at any time and answers each when it is done.

    `problem` is a number: the same from `begin` to `end`, unique among the problems in flight.
    """

    def begin(self, problem: int, text: Any) -> None:
        """Announce a problem, a text or, to a policy, messages; its root is node 0."""

    def submit(self, requests: Sequence[Any]) -> None:
        """Take requests in."""

    def step(self) -> Sequence[tuple[Any, Any]]:
        """Get on with what was submitted; pairs of a request, the very object, and its answer or an exception."""

    def cancel(self, problem: int) -> None:
        """Forget the requests of a problem that are not answered yet."""

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Forget these branches."""

    def end(self, problem: int) -> Usage:
        """Forget what is left of the problem and say what it cost."""


def lift(driver: Any) -> Driver:
    """A driver as it is if it answers request by request; else `Lifted`."""
    whole = all(hasattr(driver, name) for name in ("submit", "step", "cancel"))
    return driver if whole else Lifted(driver)


class Lifted:
    """Makes a driver of one that answers batches.

    A step is one call with all requests that wait then: those of one kind, in the order in which they came, so a
    problem's are in candidate order. It is called in the caller's thread and never entered twice at once.

    Parameters
    ----------
    driver : Policy or Verifier
        If it raises, or gives another number of answers than it was asked for, that is the answer to all of the call.
    """

    def __init__(self, driver: Policy | Verifier) -> None:
        self.begin, self.release, self.end = driver.begin, driver.release, driver.end
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
            If the driver has no answer to such requests.
        """
        for request in requests:
            if type(request) not in self._calls:
                raise TypeError(
                    f"expected a policy of a local model for a {type(request).__name__}, got another driver"
                )
        self._waiting += requests

    def step(self) -> list[tuple[Any, Any]]:
        """Call the driver, once for each kind of request that waits."""
        waiting, self._waiting = self._waiting, []
        answered: list[tuple[Any, Any]] = []
        for kind, call in self._calls.items():
            if batch := [request for request in waiting if isinstance(request, kind)]:
                answered += zip(batch, _answers(call, batch), strict=True)
        return answered

    def cancel(self, problem: int) -> None:
        """Forget the requests of a problem that are not answered yet."""
        self._waiting = [request for request in self._waiting if request.problem != problem]


def _answers(call: Callable[[Any], Sequence[Any]], batch: list[Any]) -> Sequence[Any]:
    try:
        answers = call(batch)
        if len(answers) != len(batch):
            raise ValueError(f"expected {len(batch)} answers, one per request, got {len(answers)}")
    except Exception as error:
        return [error] * len(batch)
    return answers
