"""Science: numbers with units and a tolerance, and multiple choice.

There are readers for the published shapes, each in its own fields: GPQA, MMLU-Pro, SciBench, ChemBench; and for tasks
that name their grader. An answer stands in ``[ANSWER]`` tags, as in ChemBench, in a box, or after "answer is" or
"Answer:".
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tts_search.domains.shapes import Shapes
from tts_search.search.answers import boxed, normalize

__all__ = ["QUESTIONS", "ChoiceGrader", "NumericGrader", "Quantity", "ScienceTask", "answer_in", "quantity"]

_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TAGGED: Final = re.compile(r"\[ANSWER\](.*?)\[/ANSWER\]", re.DOTALL | re.IGNORECASE)
_SAID: Final = re.compile(r"\banswer(?:\s+is\b:?|\**:\**)[ \t]*", re.IGNORECASE)
_ASKED: Final = "End with it in tags: [ANSWER]your answer[/ANSWER]."


@dataclass(frozen=True, slots=True)
class ScienceTask:
    """A question of science.

    Attributes
    ----------
    id, problem, answer : str
        Its name, the text for the policy, and the right answer: letters such as ``"A"`` or ``"A,C"``, or a number.
    grader : str
        ``"choice"`` or ``"numeric"``.
    details : mapping
        For a choice the texts of the ``options``; for a number its ``unit`` and the relative ``tolerance``.
    level : str
        The field or difficulty, as the data set names it.
    """

    id: str
    problem: str
    answer: str
    grader: str
    details: Mapping[str, Any] = field(default_factory=dict)
    level: str = ""


def answer_in(text: str) -> str:
    r"""Return what a text says the answer is, by the last of its tags, else boxes, else sentences; empty if nothing.

    Examples
    --------
    >>> answer_in("It is [ANSWER] 3.2 kJ [/ANSWER], not \\boxed{4}."), answer_in("The answer is (B).")
    ('3.2 kJ', '(B).')
    """
    if tagged := _TAGGED.findall(text):
        return str(tagged[-1]).strip()
    *_, said = [None, *_SAID.finditer(text)]
    return boxed(text) or ("" if said is None else text[said.end() : said.end() + 200].partition("\n")[0].strip())


class ChoiceGrader:
    """Multiple choice: an answer is a set of letters.

    Parameters
    ----------
    gold : str
        The right letters, ``"A"`` or ``"A,C"``.
    options : sequence of str
        Texts of the options, A first. The exact text of an option counts as its letter.

    Raises
    ------
    ValueError
        If `gold` is not of this form, or names an option that does not exist.
    """

    def __init__(self, gold: str, options: Sequence[str]) -> None:
        self._options = {
            normalize(option).casefold(): letter for option, letter in zip(options, _LETTERS, strict=False)
        }
        self._known = _LETTERS[: len(options)]
        self._gold = self._letters(gold)
        if not self._gold:
            raise ValueError(f"answer: expected letters up to {self._known[-1:]}, got {gold!r}")

    def extract(self, text: str) -> str:
        """Return the letters of a completion, in order; empty if it names none."""
        return self._letters(answer_in(text))

    def equal(self, one: str, other: str) -> bool:
        """Whether two answers are the same letters."""
        return self._letters(one) == self._letters(other) != ""

    def correct(self, answer: str) -> bool:
        """Whether an answer is all of the right letters and no other."""
        return self._letters(answer) == self._gold

    def _letters(self, text: str) -> str:
        text = normalize(text)
        if (word := self._options.get(text.rstrip(".").casefold())) is not None:
            return word
        found = _CHOSEN.match(text)
        letters = sorted(set(re.findall(r"[A-Z]", found[1]))) if found else []
        return ",".join(letters) if set(letters) <= set(self._known) else ""


# Letters, followed by nothing or by the end of a label: "A force acts" chooses nothing.
_CHOSEN: Final = re.compile(r"\W*([A-Z]\)?(?:\s*(?:[,;&]|and)\s*\(?[A-Z]\)?)*)(?:[.:)]|\W*$)")


class NumericGrader:
    """A number that is right within a relative tolerance. Numbers in other units are converted.

    Parameters
    ----------
    gold : str
        The right number, perhaps with its unit.
    unit : str
        The unit, if `gold` has none. An answer without a unit is assumed to have this unit.
    tolerance : float
        Relative to the larger of two numbers (``math.isclose``). In a vote, numbers within a tenth of it count as
        equal.

    Raises
    ------
    ValueError
        If `gold` is no number or `tolerance` not in [0, 1).

    Notes
    -----
    Other units than the expected one need pint (extra ``science``). Without pint, an answer in such a unit is wrong.
    """

    def __init__(self, gold: str, unit: str = "", tolerance: float = 0.01) -> None:
        known = quantity(gold)
        if known is None:
            raise ValueError(f"answer: expected a number, got {gold!r}")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance: expected a number in [0, 1), got {tolerance!r}")
        self._gold = known if known.unit else Quantity(known.value, unit_of(unit))
        self._tolerance = tolerance

    def extract(self, text: str) -> str:
        """Return the number of a completion with its unit, as it was written; empty if it says none."""
        answer = answer_in(text)
        return answer if quantity(answer) is not None else ""

    def equal(self, one: str, other: str) -> bool:
        """Whether two answers are equal numbers."""
        return self._close(quantity(one), quantity(other), self._tolerance / 10)

    def correct(self, answer: str) -> bool:
        """Whether an answer is right within the tolerance."""
        return self._close(quantity(answer), self._gold, self._tolerance)

    def _close(self, one: Quantity | None, other: Quantity | None, tolerance: float) -> bool:
        values = [None if each is None else each.in_unit(self._gold.unit) for each in (one, other)]
        if values[0] is None or values[1] is None:
            return False
        return math.isclose(values[0], values[1], rel_tol=tolerance)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with a unit in pint's spelling, or without a unit."""

    value: float
    unit: str = ""

    def in_unit(self, unit: str) -> float | None:
        """Return the number in another unit; None if the units do not match, or pint is missing."""
        if not self.unit or not unit or self.unit == unit:
            return self.value
        return _converted(self.value, self.unit, unit)


@functools.lru_cache(4096)
def _converted(value: float, unit: str, wanted: str) -> float | None:
    if importlib.util.find_spec("pint") is None:
        return None
    import pint

    try:
        return float(_units().Quantity(value, unit).to(wanted).magnitude)
    except pint.DimensionalityError:
        return None
    except Exception:  # not a unit: words after the number
        return value


@functools.cache
def _units() -> Any:
    import pint

    return pint.UnitRegistry()


_EXPONENT: Final = r"\s*(?:\^|\*\*)\s*\{?\s*([-+−–]?\d{1,3})\s*\}?"
_FLOAT: Final = r"[-+−–]?\s*(?:\d{1,3}(?:,\d{3})+|\d{1,40})?(?:\.\d{1,40})?"
_INTEGER: Final = r"[-+−–]?\d{1,20}"
_NUMBER: Final = re.compile(
    rf"([-+−–]?)\s*\\[dt]?frac\{{(\d{{1,20}})\}}\{{(\d{{1,20}})\}}"
    rf"|({_INTEGER})\s*/\s*(\d{{1,20}})"
    rf"|10{_EXPONENT}"
    rf"|({_FLOAT})(?:[eE]([-+−–]?\d{{1,3}})|\s*(?:\\times|\\cdot|[x×*·⋅])\s*10{_EXPONENT})?"
)
_LEAD: Final = re.compile(
    r"^\s*(?:(?:[A-Za-z\\][\w\\{}]*\s*)?(?:=|\\approx|≈|~)\s*|about |approximately )?", re.IGNORECASE
)


def quantity(text: str) -> Quantity | None:
    r"""Return the number at the beginning of a text and the unit after it; None if there is no number.

    Examples
    --------
    >>> quantity(r"E = 1.5 \times 10^{-3} \mathrm{~kJ} \mathrm{~mol}^{-1}"), quantity("1,200"), quantity("B")
    (Quantity(value=0.0015, unit='kJ*mol**-1'), Quantity(value=1200.0, unit=''), None)
    """
    text = text.strip().strip("$").replace("\\,", "").replace("{,}", ",")
    start = _LEAD.match(text)
    found = _NUMBER.match(text, start.end() if start else 0)
    if found is None or not any(letter.isdigit() for letter in found[0]):
        return None
    value = _value(found)
    return None if value is None else Quantity(value, unit_of(text[found.end() :]))


def _value(found: re.Match[str]) -> float | None:
    sign, top, bottom, whole, part, power, number, exponent, times = found.groups()
    ratio = (f"{sign}{top}", bottom) if top else (whole, part)
    try:
        if ratio[0]:
            return float(_plain(ratio[0])) / float(ratio[1])
        return float(f"{'1' if number is None else _plain(number)}e{_plain(power or exponent or times or '0')}")
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return re.sub(r"[−–]", "-", text).replace(",", "").replace(" ", "")


_UNIT_WORDS: Final = (
    (r"\\(?:mathrm|mathit|mathbf|text|rm|operatorname|mbox|hbox)\b", ""),
    (r"\\(?:mu|upmu)(?![A-Za-z])\s*|[µμ]", "u"),
    (r"\\Omega(?![A-Za-z])|[ΩΩ]", "ohm"),
    (r"(?:\^?\{?\\circ\}?|\\degree|°|º)\s*([CF])\b", r"deg\1"),
    (r"(?:\^?\{?\\circ\}?|\\degree|°|º)", "degree"),
    (r"\\AA(?![A-Za-z])|[ÅÅ]", "angstrom"),
    (r"\\?%", "percent"),
    (r"\\cdot(?![A-Za-z])|\\times(?![A-Za-z])|[·⋅×]", "*"),
    (r"[~$]|\\[,;: ]", " "),
    (r"\*\*|\^", "^"),
    (r"[−–⁻]", "-"),
    (r"²", "^2"),
    (r"³", "^3"),
    (r"[{}]", ""),
)
_UNIT: Final = re.compile(
    r"[A-Za-z]+(?:\s*\^\s*-?\d{1,2}|-?\d{1,2}(?![\d.]))?(?:\s*[*/ ]\s*\(?[A-Za-z]+(?:\s*\^\s*-?\d{1,2}|-?\d{1,2})?\)?)*"
)


def unit_of(text: str) -> str:
    r"""Return a unit in pint's spelling; empty if the text is no unit.

    Only words, products, quotients and small powers are allowed, so that evaluation is fast.

    Examples
    --------
    >>> unit_of(r"$\mathrm{m} \mathrm{~s}^{-2}$"), unit_of("J/(mol K)"), unit_of("= 3, so")
    ('m*s**-2', 'J/(mol*K)', '')
    """
    for pattern, word in _UNIT_WORDS:
        text = re.sub(pattern, word, text)
    text = " ".join(text.split()).rstrip(".,;:")
    if len(text) > 60 or not _UNIT.fullmatch(text) or text.count("(") != text.count(")"):
        return ""
    text = re.sub(r"([A-Za-z])(-?\d)", r"\1^\2", text)
    text = re.sub(r"\s*([*/^])\s*", r"\1", text)
    return re.sub(r" +", "*", text).replace("^", "**")


def _own(entry: Mapping[str, Any], number: str) -> ScienceTask:
    name, text = str(entry.get("id", number)), entry.get("problem") or entry["question"]
    if entry["grader"] == "choice":
        return _choice(name, text, entry["options"], str(entry["answer"]), str(entry.get("level") or ""))
    return _number(
        name, text, str(entry["answer"]), str(entry.get("unit") or ""), float(entry.get("tolerance", 0.01)),
        str(entry.get("level") or ""),
    )  # fmt: skip


def _gpqa(entry: Mapping[str, Any], number: str) -> ScienceTask:
    """A hash of their texts orders the options, because the data set has no order."""
    wrong = [entry[f"Incorrect Answer {place}"] for place in (1, 2, 3)]
    options = sorted((str(option).strip() for option in (entry["Correct Answer"], *wrong)), key=_hash)
    gold = _LETTERS[options.index(str(entry["Correct Answer"]).strip())]
    return _choice(
        str(entry.get("Record ID", number)), entry["Question"], options, gold, str(entry.get("Subdomain") or "")
    )


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def _mmlu_pro(entry: Mapping[str, Any], number: str) -> ScienceTask:
    name, level = str(entry.get("question_id", number)), str(entry.get("category") or "")
    return _choice(name, entry["question"], entry["options"], str(entry["answer"]), level)


def _scibench(entry: Mapping[str, Any], number: str) -> ScienceTask:
    name, level = str(entry.get("problemid") or number).strip(), str(entry.get("source") or "")
    return _number(name, entry["problem_text"], str(entry["answer_number"]), str(entry.get("unit") or ""), 0.05, level)


def _chembench(entry: Mapping[str, Any], number: str) -> ScienceTask:
    """One example of a task: its target, or scores of options. The options with score 1 are right."""
    example, name = entry["examples"][0], str(entry.get("uuid") or entry.get("name") or number)
    scores = example.get("target_scores")
    if scores is None:
        tolerance = float(entry.get("relative_tolerance") or 0.01)
        return _number(name, example["input"], str(example["target"]), "", tolerance, "")
    right = [letter for letter, score in zip(_LETTERS, scores.values(), strict=False) if float(score) == 1]
    return _choice(name, example["input"], list(scores), ",".join(right), "")


def _choice(name: str, text: str, options: Sequence[str], gold: str, level: str) -> ScienceTask:
    if not 2 <= len(options) <= len(_LETTERS):
        raise ValueError(f"options: expected 2 to {len(_LETTERS)} of them, got {len(options)}")
    options = [str(option).strip() for option in options]
    ChoiceGrader(gold, options)
    several = "all letters that are right, separated by commas" if "," in gold else "the letter of the right option"
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
    problem = f"{text.strip()}\n\n{listed}\n\nThe answer is {several}. {_ASKED}"
    return ScienceTask(name, problem, gold, "choice", {"options": options}, level)


def _number(name: str, text: str, gold: str, unit: str, tolerance: float, level: str) -> ScienceTask:
    NumericGrader(gold, unit, tolerance)
    hint = f" The unit of the answer is {unit.strip()}." if unit.strip() else ""
    problem = f"{text.strip()}{hint}\n\nThe answer is a number. {_ASKED}"
    return ScienceTask(name, problem, gold, "numeric", {"unit": unit, "tolerance": tolerance}, level)


QUESTIONS: Final = Shapes(
    "a question of science",
    "GPQA, MMLU-Pro, SciBench or ChemBench, or a grader",
    (
        (("grader:choice",), _own),
        (("grader:numeric",), _own),
        (("Question", "Correct Answer"), _gpqa),
        (("problem_text", "answer_number"), _scibench),
        (("examples", "preferred_score"), _chembench),
        (("question", "options", "answer"), _mmlu_pro),
    ),
)
"""Questions of science in files, and tasks that name one of its graders."""
