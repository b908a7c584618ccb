"""Tasks: problems with known answers, from a file or from the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tts_search.errors import require
from tts_search.search.answers import boxed

__all__ = ["DATASETS", "Task", "load_tasks"]


@dataclass(frozen=True, slots=True)
class Task:
    """A problem with the answer that counts as right; `level` is whatever the data set calls its difficulty."""

    id: str
    problem: str
    answer: str
    level: str = ""


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

_ANSWERS = ("answer", "expected_answer", "extracted_groundtruth")


def load_tasks(source: str | Path, limit: int | None = None) -> list[Task]:
    r"""Read tasks.

    Parameters
    ----------
    source : str or Path
        A JSONL file; ``"MATH-500"``, ``"AIME24"`` or ``"GSM8K"``; or a data set of the hub as ``owner/name``,
        ``owner/name:split`` or ``owner/name:config:split``.
    limit : int or None
        At most so many, the first ones.

    Returns
    -------
    list of Task
        An entry has a ``problem`` (or ``question``), an ``answer`` (or ``expected_answer``, ``extracted_groundtruth``,
        or a ``solution`` with a ``\boxed`` answer) and, if it likes, ``level`` and ``id`` (or ``unique_id``; by default
        its number). Of a GSM8K solution, the answer is what follows ``####``.

    Raises
    ------
    ValueError
        If the source is neither, or an entry is no such object; the message names it.
    MissingExtraError
        If a data set of the hub is asked for and ``datasets`` is not installed.
    """
    entries = _lines(Path(source)) if Path(source).is_file() else _rows(str(source))
    return [_task(entry, number, source) for number, entry in islice(entries, limit)]


def _lines(path: Path) -> Iterable[tuple[int, Any]]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError:
                    yield number, None


def _rows(name: str) -> Iterable[tuple[int, Any]]:
    source = next((known for key, known in DATASETS.items() if key.lower() == name.lower()), None)
    if source is None:
        path, *rest = name.split(":")
        if path.count("/") != 1 or len(rest) > 2:
            raise ValueError(f"source: expected a file, one of {', '.join(DATASETS)}, or owner/name, got {name!r}")
        source = _Source(path, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "test")
    datasets = require("datasets", "data")
    return enumerate(datasets.load_dataset(source.path, source.config, split=source.split))


def _task(entry: Any, number: int, source: str | Path) -> Task:
    try:
        problem = entry["problem"] if "problem" in entry else entry["question"]
        answer = next((entry[name] for name in _ANSWERS if name in entry), None)
        answer = str(boxed(entry["solution"]) if answer is None else answer).rpartition("####")[2].strip()
        if not isinstance(problem, str) or not answer:
            raise TypeError
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source}, line {number + 1}: expected an object with problem and answer") from error
    identity = entry.get("id", entry.get("unique_id", number))
    return Task(str(identity), problem, answer, str(entry.get("level") or "").removeprefix("Level "))
