"""Reads problems and solutions from the texts that frameworks send to a process reward model, and scores them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tts_search.search.config import SearchConfig
from tts_search.search.moves import Algorithm, Moves, score
from tts_search.search.result import SearchResult
from tts_search.search.run import Branch, Run
from tts_search.search.steps import split_steps
from tts_search.search.types import Completion, Step
from tts_search.serve.errors import ApiError
from tts_search.serve.searching import found
from tts_search.serve.service import Service

__all__ = [
    "ScoredSolutions",
    "Solution",
    "read_all",
    "scores_tokens",
    "solution_of_input",
    "solution_of_messages",
    "solution_of_pair",
    "solution_of_text",
]

Solution = tuple[str, tuple[str, ...]]
"""A problem and the steps of its solution."""


@dataclass(frozen=True, slots=True)
class ScoredSolutions:
    """Solutions with their scores.

    Attributes
    ----------
    completions : list of Completion
        One for each solution, in order.
    tokens, cached_tokens : int
        Number of tokens that were read for them, and that were in the cache.
    """

    completions: list[Completion]
    tokens: int
    cached_tokens: int


_DELIMITER = "\n\n"


def solution_of_pair(service: Service, problem: str, text: str) -> Solution:
    """A problem and a solution. The verifier's tag ends a step; if there is no tag, a blank line does.

    Raises
    ------
    ApiError
        If there is no step.
    """
    tag = _tag(service)
    if tag in text:
        steps = tuple(piece for piece in text.split(tag) if piece.strip())
    else:
        steps, _ = split_steps(text, _DELIMITER)
    if not steps:
        raise ApiError(400, "expected a solution of at least one step, got an empty one")
    return problem, steps


def solution_of_messages(service: Service, messages: Sequence[Any]) -> Solution:
    """A conversation: the user states the problem, the assistant solves it.

    Or the user does both, with one step in each message. After each, the assistant has a mark, at whose place the
    verifier scores. The first message then contains the problem and the first step.

    Raises
    ------
    ApiError
        If it is neither, or if it has texts for the verifier that are not in its format.
    """
    said = [(each.role, each.content) for each in messages]
    entry = getattr(service.verifier, "format", None)
    own = [text for role, text in entry.chat if role == "system"] if entry is not None else []
    if said[0][0] == "system":
        if said[0][1] not in own:
            raise ApiError(400, "messages: expected the system message of the verifier's format, or none", "messages")
        said = said[1:]
    roles = [role for role, _ in said]
    if roles == ["user", "assistant"]:
        return solution_of_pair(service, said[0][1], said[1][1])
    if entry is not None and entry.reply and roles == ["user", "assistant"] * (len(said) // 2):
        first, *others = (text for role, text in said if role == "user")
        problem, steps = solution_of_text(service, first)
        return problem, (*steps, *others)
    raise ApiError(400, "messages: expected a user's problem and the assistant's solution", "messages")


def solution_of_text(service: Service, text: str) -> Solution:
    """A text with both. Formats put a space between them, so the place of the cut does not change the tokens."""
    problem, _, solution = text.partition(" ")
    return solution_of_pair(service, problem, solution)


def solution_of_input(service: Service, given: str | Sequence[int]) -> Solution:
    """A whole text or its tokens in the verifier's format, with prompt, steps and marks, written by the client.

    Raises
    ------
    ApiError
        If it is not in the verifier's format, or the format has no mark after each step.
    """
    parsed = getattr(service.verifier, "parsed", None)
    if parsed is None:
        raise ApiError(400, "input: this server's verifier reads messages only", "input")
    if not isinstance(given, str):
        service.texts_of(service.settings.verifier_names[0]).check(given)
    try:
        problem, steps = parsed(given)
    except ValueError as error:
        raise ApiError(400, f"input: {error}", "input") from error
    return problem, steps


def scores_tokens(service: Service) -> bool:
    """Whether the verifier has no format of steps, so that each token of a text is scored."""
    return getattr(getattr(service.verifier, "format", None), "score_at", "") == "token"


async def read_all(service: Service, solutions: Sequence[Solution], aggregate: str = "last") -> ScoredSolutions:
    """Score solutions, all at once. Solutions of one problem share its KV.

    Raises
    ------
    ApiError
        If there is no verifier, or a solution cannot be read.
    """
    if service.verifier is None:
        raise ApiError(404, "this server has no verifier")
    if len(solutions) > service.settings.max_n:
        raise ApiError(400, f"expected at most {service.settings.max_n} solutions, got {len(solutions)}")
    numbers: dict[str, list[int]] = {}
    for number, (problem, _) in enumerate(solutions):
        numbers.setdefault(problem, []).append(number)
    tasks = [
        asyncio.ensure_future(_read(service, problem, [solutions[number][1] for number in own], aggregate))
        for problem, own in numbers.items()
    ]
    try:
        results = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    completions: dict[int, Completion] = {}
    for own, result in zip(numbers.values(), results, strict=True):
        completions.update(zip(own, result.completions, strict=True))
    return ScoredSolutions(
        [completions[number] for number in range(len(solutions))],
        sum(result.stats.verifier_tokens for result in results),
        sum(result.stats.cached_tokens for result in results),
    )


async def _read(service: Service, problem: str, solutions: Sequence[tuple[str, ...]], aggregate: str) -> SearchResult:
    """Score solutions of one problem. If one of them cannot be read, all fail."""
    result = await found(service, problem, SearchConfig(_reading(solutions), n=len(solutions), aggregate=aggregate))
    if why := next((node.why for node in result.tree.nodes if node.why), None):
        raise ApiError(400, why)
    return result


def _reading(solutions: Sequence[tuple[str, ...]]) -> Algorithm:
    """A search that scores these steps, and samples nothing."""

    def reading(run: Run) -> Moves[list[Branch]]:
        run.round = 1
        branches = [run.add_child(run.root) for _ in solutions]
        for branch, steps in zip(branches, solutions, strict=True):
            run.grow(branch, Step("".join(steps), finished=True), run.config.delimiter, last=True)
            branch.steps = steps
        yield from score(run, branches, last=True)
        return branches

    return reading


def _tag(service: Service) -> str:
    """The mark after a step in texts for the verifier."""
    entry = getattr(service.verifier, "format", None)
    boundary: str = entry.boundary if entry is not None else ""
    return boundary.strip() or boundary or _DELIMITER
