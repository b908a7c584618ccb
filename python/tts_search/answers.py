r"""Answers: taking them out of a text (``\boxed{...}``), and whether two of them mean the same.

Equal numbers are equal answers, whatever is installed. Beyond that, math-verify (extra ``search``) decides; without it
two answers are the same if their texts are, up to spelling variants of LaTeX that change nothing.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from tts_search.judge import Judge

__all__ = ["Equivalence", "boxed", "equivalent", "normalize"]

_JUDGE = Judge(limit_s=5)  # for one answer: sympy can take for ever over a hostile one
_MAX_CHARS = 500  # longer answers are compared as text

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
    """Return what a command without braces takes, as in ``\\boxed 12.``: one word."""
    match = _WORD.match(text, start)
    return match[0].rstrip(".,;") if match else ""


def normalize(answer: str) -> str:
    """Return an answer's text without what carries no meaning: white space, dollars, sizes of brackets, degrees."""
    answer = answer.strip().strip("$").rstrip(".")
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer


def equivalent(gold: str, answer: str) -> bool:
    r"""Whether an answer means the same as the right one.

    Parameters
    ----------
    gold : str
        The right answer, as LaTeX without ``\boxed`` or dollars.
    answer : str
        The answer to judge, likewise. An empty one is never right.

    Notes
    -----
    math-verify works in a process of its own, under a limit of 5 seconds of CPU time; what takes longer is not
    equivalent.
    """
    return bool(answer.strip()) and _equivalent(gold, answer)


@functools.lru_cache(maxsize=65536)
def _equivalent(gold: str, answer: str) -> bool:
    gold_form, answer_form = _form(gold), _form(answer)
    if gold_form == answer_form:
        return True
    if isinstance(gold_form, Fraction) and isinstance(answer_form, Fraction):
        return False
    if max(len(gold), len(answer)) > _MAX_CHARS:
        return False
    return bool(_JUDGE.equal(gold, answer))


def _form(answer: str) -> str | Fraction:
    """What all answers of one number, or of one normalized text, have in common."""
    text = normalize(answer)
    return Fraction(text.replace(",", "")) if _NUMBER.fullmatch(text) else text


class Equivalence:
    """Classes of answers that mean the same, each known by the spelling that came first.

    Spellings of one number, or of one normalized text, are one answer. Another one is compared with the first spelling
    of each class: at most classes x answers comparisons, none of two numbers.
    """

    def __init__(self) -> None:
        self._first: dict[str | Fraction, str] = {}  # of every form seen so far, the first spelling of its class

    def first(self, answer: str) -> str:
        """Return the first spelling of the answer's class; a new class begins with `answer` itself."""
        form = _form(answer)
        if form not in self._first:
            classes = dict.fromkeys(self._first.values())
            self._first[form] = next((known for known in classes if equivalent(known, answer)), answer)
        return self._first[form]
