"""Graders: each decides whether an answer is right. A task names its grader."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final, Protocol

__all__ = ["GRADERS", "Grader", "grader_of"]

GRADERS: Final = ("mathematics", "code", "choice", "numeric")


class Grader(Protocol):
    """Extracts answers from completions, and judges them."""

    def extract(self, text: str) -> str | None:
        """Return the answer in a completion's text, empty if it has none; None: keep the search's own answer."""

    def equal(self, one: str, other: str) -> bool:
        """Whether two answers count as one in a vote."""

    def correct(self, answer: str) -> bool:
        """Whether an answer is right."""


def grader_of(name: str, gold: str, details: Mapping[str, Any]) -> Grader:
    """Return the grader of a task.

    Parameters
    ----------
    name : str
        One of `GRADERS`.
    gold : str
        The right answer.
    details : mapping
        More data of the task: for a program the fields of its file, for a question of science the grader's arguments.

    Raises
    ------
    ValueError
        If there is no such grader, or a detail is invalid.
    """
    if name == "mathematics":
        return _Mathematics(gold)
    if name == "code":
        from tts_search.domains.code import CodeGrader
        from tts_search.domains.code.tasks import PROGRAMS

        return CodeGrader(PROGRAMS.read(details, ""), _judge())
    if name in ("choice", "numeric"):
        from tts_search.domains.science import ChoiceGrader, NumericGrader

        return ChoiceGrader(gold, **details) if name == "choice" else NumericGrader(gold, **details)
    raise ValueError(f"grader: expected one of {', '.join(GRADERS)}, got {name!r}")


@functools.cache
def _judge() -> Any:
    """One judge for the process: programs of a task come again, in votes and with other budgets."""
    from tts_search.domains.code import ProgramJudge

    return ProgramJudge()


class _Mathematics:
    def __init__(self, gold: str) -> None:
        self._gold = gold

    def extract(self, _text: str) -> str | None:
        return None

    def equal(self, one: str, other: str) -> bool:
        from tts_search.domains.mathematics import equivalent

        return equivalent(one, other)

    def correct(self, answer: str) -> bool:
        return self.equal(self._gold, answer)
