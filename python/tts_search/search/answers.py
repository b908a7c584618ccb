r"""Answers: taking them out of a text (``\boxed{...}``), and which of them count as one.

Spellings of one number are one answer, and so are texts up to variants of LaTeX that change nothing. Whether two
answers mean the same beyond that is for whoever searches to say: see :mod:`tts_search.domains.mathematics`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

__all__ = ["Equality", "Equivalence", "boxed", "canonical_form", "normalize", "same"]

Equality = Callable[[str, str], bool]
"""Whether two answers, of which the first is known, mean the same."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"(?<!\\)[{}]")
_WORD = re.compile(r"[^\s${}]{1,500}")
_NUMBER = re.compile(r"[+-]?(\d{1,40}|\d{1,3}(,\d{3}){1,12})(\.\d{1,40})?", re.ASCII)
_REWRITES = (
    (re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;: ]|~"), ""),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(text|mathrm|mbox)\{([^{}]*)\}"), r"\2"),
    (re.compile(r"\^\{?\\circ\}?|\\%|\\\$"), ""),
    (re.compile(r"\s+"), ""),
)


def boxed(text: str) -> str:
    r"""Return what the last ``\boxed{...}`` (or ``\boxed x``, ``\fbox{...}``) of a text holds; empty if there is none.

    A box that is not closed holds nothing. O(len(text)).

    Examples
    --------
    >>> boxed(r"so it is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    boxes = {match.end() for match in _BOX.finditer(text)}
    groups = {end: word for end in boxes if (word := _word(text, end))}
    open_braces: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif open_braces:
            start = open_braces.pop()
            if start in boxes:
                groups[start] = text[start + 1 : brace.start()]
    return groups[max(groups)].strip() if groups else ""


def _word(text: str, start: int) -> str:
    r"""Return what a command without braces takes, as in ``\boxed 12.``: one word."""
    match = _WORD.match(text, start)
    return match[0].rstrip(".,;") if match else ""


def normalize(answer: str) -> str:
    """Return an answer's text without what carries no meaning: white space, dollars, sizes of brackets, degrees."""
    answer = answer.strip().strip("$").rstrip(".")
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer


def canonical_form(answer: str) -> str | Fraction:
    """Return what all answers of one number, or of one normalized text, have in common."""
    text = normalize(answer)
    return Fraction(text.replace(",", "")) if _NUMBER.fullmatch(text) else text


def same(gold: str, answer: str) -> bool:
    """Whether two answers are one number, or one text; an empty answer is never right."""
    return bool(answer.strip()) and canonical_form(gold) == canonical_form(answer)


class Equivalence:
    """Classes of answers that mean the same, each known by the spelling that came first.

    Spellings of one number, or of one normalized text, are one answer. Another one is compared with the first spelling
    of each class: at most classes x answers comparisons by `equal`.
    """

    def __init__(self, equal: Equality = same) -> None:
        self._equal = equal
        self._first: dict[str | Fraction, str] = {}  # of every form seen so far, the first spelling of its class

    def first(self, answer: str) -> str:
        """Return the first spelling of the answer's class; a new class begins with `answer` itself."""
        form = canonical_form(answer)
        if form not in self._first:
            classes = dict.fromkeys(self._first.values())
            self._first[form] = next((known for known in classes if self._equal(known, answer)), answer)
        return self._first[form]
