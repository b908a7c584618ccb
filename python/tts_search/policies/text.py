"""Policies and verifiers made of a function over text: a server's API, a script, another framework."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tts_search.policies.background import wait_for
from tts_search.search.checks import unused
from tts_search.search.protocol import Expand, Score, Usage
from tts_search.search.types import Messages, Step, StepRequest

__all__ = ["TextPolicy", "TextVerifier"]

PolicyFn = Callable[[list[StepRequest]], "Sequence[Sequence[Step]] | Awaitable[Sequence[Sequence[Step]]]"]
VerifierFn = Callable[
    [list[tuple[str, tuple[str, ...]]]], "Sequence[Sequence[float]] | Awaitable[Sequence[Sequence[float]]]"
]


class _TextDriver:
    """The common part of both classes: the problems' texts, and calling the function."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        if not callable(fn):
            raise TypeError(f"fn: expected a function, got {fn!r:.200}")
        self._fn = fn
        self._texts: dict[int, str] = {}

    def begin(self, problem: int, text: str | Messages) -> None:
        """Announce a problem.

        Raises
        ------
        TypeError
            If it is a conversation.
        ValueError
            If the number belongs to a problem in flight.
        """
        if not isinstance(text, str):
            raise TypeError(f"problem: a {type(self).__name__} takes a text, got messages")
        unused(problem, self._texts, self)
        self._texts[problem] = text

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Do nothing: a function over text keeps no branches."""

    def _ask(self, problems: Sequence[int], items: list[Any]) -> list[Any]:
        """Call the function once for all. If that fails, call it for each problem, so that only faulty ones fail."""
        try:
            return _call(self._fn, items)
        except Exception as error:
            if len(set(problems)) == 1:
                return [error] * len(items)
        answers: list[Any] = [None] * len(items)
        for problem in dict.fromkeys(problems):
            own = [index for index, other in enumerate(problems) if other == problem]
            for index, answer in zip(own, self._ask([problem] * len(own), [items[i] for i in own]), strict=True):
                answers[index] = answer
        return answers


class TextPolicy(_TextDriver):
    """A policy made of a function from requests to steps.

    Parameters
    ----------
    fn : callable
        ``fn(requests: list[StepRequest]) -> list[list[Step]]``, with one list of ``num_samples`` steps for each
        request; sync or async. It is called in the thread of the search, never twice at once, with all requests that
        wait at that time; those of a problem are in candidate order. If it raises an error, it is called again for each
        problem, and a problem whose own call raises an error fails.

    Raises
    ------
    TypeError
        If `fn` is no function.

    Examples
    --------
    >>> policy = TextPolicy(lambda requests: [[Step("42", finished=True)] * r.num_samples for r in requests])
    """

    def __init__(self, fn: PolicyFn) -> None:
        super().__init__(fn)
        self._tokens: dict[int, int] = {}

    def begin(self, problem: int, text: str | Messages) -> None:
        """Announce a problem.

        Raises
        ------
        TypeError
            If it is a conversation.
        ValueError
            If the number belongs to a problem in flight.
        """
        super().begin(problem, text)
        self._tokens[problem] = 0

    def expand(self, requests: Sequence[Expand]) -> Sequence[Sequence[Step] | Exception]:
        """Answer requests of any number of problems by one call of the function."""
        answers = self._ask([request.problem for request in requests], [self._asked(request) for request in requests])
        return self._counted(requests, answers)

    def _asked(self, request: Expand) -> StepRequest:
        """A request in the words of a function of text."""
        return StepRequest(
            self._texts[request.problem],
            request.steps,
            len(request.children),
            request.branch,
            request.seeds,
            request.params,
        )

    def _counted(self, requests: Sequence[Expand], answers: list[Any]) -> list[Any]:
        """The answers, whose tokens are counted."""
        for request, steps in zip(requests, answers, strict=True):
            if not isinstance(steps, Exception):
                self._tokens[request.problem] += sum(step.num_tokens for step in steps if isinstance(step, Step))
        return answers

    def usage(self, problem: int) -> Usage:
        """Return the cost of the problem so far: the `num_tokens` of its steps."""
        return Usage(tokens=self._tokens.get(problem, 0))

    def end(self, problem: int) -> Usage:
        """Forget the problem. Its cost is the number of tokens that its steps report."""
        self._texts.pop(problem, None)
        return Usage(tokens=self._tokens.pop(problem, 0))


class TextVerifier(_TextDriver):
    """A verifier made of a function from texts to scores.

    Parameters
    ----------
    fn : callable
        ``fn(branches: list[tuple[str, tuple[str, ...]]]) -> list[list[float]]``: for each (problem, steps) one score
        for each step; sync or async. It is called like the function of a :class:`TextPolicy`. A search asks about a
        text once, even if several of its branches have this text.

    Raises
    ------
    TypeError
        If `fn` is no function.

    Examples
    --------
    >>> verifier = TextVerifier(lambda branches: [[0.5] * len(steps) for _, steps in branches])
    """

    def __init__(self, fn: VerifierFn) -> None:
        super().__init__(fn)

    def score(self, requests: Sequence[Score]) -> Sequence[Sequence[float] | Exception]:
        """Answer requests of any number of problems by one call of the function."""
        items = [(self._texts[request.problem], request.steps + request.lookahead) for request in requests]
        return self._ask([request.problem for request in requests], items)

    def end(self, problem: int) -> Usage:
        """Forget the problem; its cost is not known."""
        self._texts.pop(problem, None)
        return Usage()


def _call(fn: Callable[[list[Any]], Any], items: list[Any]) -> list[Any]:
    target = fn if inspect.isroutine(fn) else getattr(fn, "__call__", fn)  # noqa: B004
    is_async = inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(target)
    answers = fn(items)
    if is_async or inspect.isawaitable(answers):
        answers = wait_for(answers)
    answers = list(answers)
    if len(answers) != len(items):
        raise ValueError(f"fn: expected {len(items)} lists, one per request, got {len(answers)}")
    return answers
