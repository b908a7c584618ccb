r"""Answers: taking them out of a text (``\boxed{...}``), and deciding which of them are the same.

By default, different spellings of one number are one answer, and so are texts that differ only in variants of LaTeX
without a meaning. The caller may decide otherwise: see :mod:`tts_search.domains.mathematics`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fractions import Fraction

__all__ = ["Equality", "Equivalence", "boxed", "canonical_form", "normalize", "same"]

Equality = Callable[[str, str], bool]
"""Whether two answers, of which the first is known, mean the same."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # "\\\\" is a line break: the brace behind it is none of its own
_WORD = re.compile(r"[^\s${}]{1,500}")
_NUMBER = re.compile(r"[+-]?(\d{1,40}|\d{1,3}(,\d{3}){1,12}|\d{1,3}( \d{3}){1,12})(\.\d{1,40})?", re.ASCII)
# The parts of LaTeX that change nothing, and first of all line breaks, whose second backslash begins no command.
_PARTS = re.compile(
    r"(?P<kept>\\\\)|\\(?:left|right)(?![a-zA-Z])|\\!|\\\$|\^\{?\\circ\}?|\\[dt](?P<frac>frac)(?![a-zA-Z])"
    r"|\\(?:text|mathrm|mbox)\{(?P<text>[^{}]*)\}|\{(?P<comma>,)\}|\\(?P<percent>%)|(?P<space>\\[,;: ]|~|\s)"
)
_SPACE = re.compile(r"(?P<digits>(?<=\d) +(?=\d))|(?P<command>\\[a-zA-Z]+) +(?=[a-zA-Z])| +")


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
        elif brace[0] == "}" and open_braces:
            start = open_braces.pop()
            if start in boxes:
                groups[start] = text[start + 1 : brace.start()]
    return groups[max(groups)].strip() if groups else ""


def _word(text: str, start: int) -> str:
    r"""Return what a command without braces takes, as in ``\boxed 12.``: one word."""
    match = _WORD.match(text, start)
    return match[0].rstrip(".,;") if match else ""


def normalize(answer: str) -> str:
    """Return an answer's text without what carries no meaning: white space, dollars, sizes of brackets, degrees.

    White space that keeps two digits apart, or a command from a letter, carries some.
    """
    text = _PARTS.sub(_part, answer).strip().strip("$").rstrip(".")
    return _SPACE.sub(_space, text)


def _part(found: re.Match[str]) -> str:
    if found["frac"]:
        return "\\frac"
    if found["space"]:
        return " "
    return found["kept"] or found["text"] or found["comma"] or found["percent"] or ""


def _space(found: re.Match[str]) -> str:
    if found["digits"]:
        return " "
    return f"{found['command']} " if found["command"] else ""


def canonical_form(answer: str) -> str | Fraction:
    """Return what all answers of one number, or of one normalized text, have in common."""
    text = normalize(answer)
    return Fraction(text.replace(",", "").replace(" ", "")) if _NUMBER.fullmatch(text) else text


def same(gold: str, answer: str) -> bool:
    """Whether two answers are one number, or one text; an empty answer is never right."""
    return bool(answer.strip()) and canonical_form(gold) == canonical_form(answer)


class Equivalence:
    """Classes of answers that mean the same, each known by the spelling that came first.

    Answers are of one class if their texts are equal, if `equal` says so in either order, or of both a third one: so
    the classes are those of the answers, in whatever order they come. Spellings of one number, or of one normalized
    text, are asked about first, and where `equal` takes them for one answer they are compared with nothing else; it
    alone knows what white space means: in a program, much. At most (distinct answers)^2 comparisons by `equal`.
    """

    def __init__(self, equal: Equality = same) -> None:
        self._equal = equal
        self._known_by: dict[str, str] = {}  # of every answer so far, one of its class that came first, or itself
        self._compared: dict[str | Fraction, list[str]] = {}  # by their forms, those that were compared with all

    def first(self, answer: str) -> str:
        """Return the first spelling of the answer's class; a new class begins with `answer` itself."""
        return self.firsts([answer])[0]

    def firsts(self, answers: Iterable[str]) -> list[str]:
        """Return the first spelling of each answer's class, when all of them are known."""
        given = list(answers)
        for answer in given:
            if answer not in self._known_by:
                self._add(answer)
        return [self._class(answer) for answer in given]

    def _add(self, answer: str) -> None:
        alike = self._compared.setdefault(canonical_form(answer), [])
        spelled = next((other for other in alike if self._means(other, answer)), answer)
        self._known_by[answer] = spelled
        if spelled != answer:
            return
        for other in [each for own in self._compared.values() if own is not alike for each in own]:
            if self._class(other) != self._class(answer) and self._means(other, answer):
                self._join(other, answer)
        alike.append(answer)

    def _means(self, known: str, answer: str) -> bool:
        return self._equal(known, answer) or self._equal(answer, known)

    def _class(self, answer: str) -> str:
        while (first := self._known_by[answer]) != answer:
            answer = first
        return answer

    def _join(self, one: str, other: str) -> None:
        """Make two classes one, known by the answer that came first."""
        heads = {self._class(one), self._class(other)}
        first, second = [answer for answer in self._known_by if answer in heads]
        self._known_by[second] = first
