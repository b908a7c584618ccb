"""Runs searches over tasks with known answers; every finished task is on disk before the next one is waited for."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from tts_search.answers import boxed, equivalent
from tts_search.api import search_iter
from tts_search.config import SearchConfig
from tts_search.errors import SearchError
from tts_search.protocol import Policy, Verifier
from tts_search.result import SearchResult
from tts_search.voting import VOTES

__all__ = ["Experiment", "Record", "Task", "evaluate", "load_tasks", "read_records"]


@dataclass(frozen=True, slots=True)
class Task:
    """A problem with the answer that counts as right; `level` is whatever the data set calls its difficulty."""

    id: str
    problem: str
    answer: str
    level: str = ""


@dataclass(frozen=True)
class Experiment:
    """One way to search that is run over all tasks.

    Attributes
    ----------
    label : str
        Its name in tables.
    config : SearchConfig
        How to search.
    policy, verifier
        The models.
    names : tuple of str
        What tells these models from others, such as their paths: a record of other models or another config is not
        taken for one of this experiment.
    keep_trees : bool
        Whether records hold the search tree.
    """

    label: str
    config: SearchConfig
    policy: Policy
    verifier: Verifier | None
    names: tuple[str, ...] = ()
    keep_trees: bool = False

    @property
    def key(self) -> str:
        """The label, and a hash of everything that can change the outcome."""
        facts = json.dumps([asdict(self.config), self.names], sort_keys=True)
        return f"{self.label} #{hashlib.blake2b(facts.encode(), digest_size=4).hexdigest()}"


@dataclass(frozen=True)
class Record:
    """What became of one task in one experiment: a line of the results file.

    Attributes
    ----------
    experiment, task : str
        Key of the experiment, id of the task.
    label, level, problem, gold : str
        For tables.
    answers : dict
        The answer that each vote elects.
    correct : dict
        Whether it is right.
    solved : bool
        Whether any completion is right (pass@n).
    num_completions : int
        How many there are.
    best : str
        Text of the best completion.
    score : float or None
        Its score.
    stats : dict
        Fields of :class:`~tts_search.SearchStats`.
    tree : str or None
        The search tree as JSON.
    error : str or None
        Why the search failed; the fields above are empty then.
    """

    experiment: str
    task: str
    label: str
    level: str
    problem: str
    gold: str
    answers: dict[str, str] = field(default_factory=dict)
    correct: dict[str, bool] = field(default_factory=dict)
    solved: bool = False
    num_completions: int = 0
    best: str = ""
    score: float | None = None
    stats: dict[str, float] = field(default_factory=dict)
    tree: str | None = None
    error: str | None = None

    def is_correct(self, vote: str) -> bool:
        """Whether a vote elects the right answer; without a verifier, or after an error, only what there is can."""
        return self.correct.get(vote, self.correct.get("majority", False))


def load_tasks(path: str | Path, limit: int | None = None) -> list[Task]:
    r"""Read tasks from a JSONL file.

    A line is an object with ``problem`` (or ``question``), ``answer`` (or a ``solution`` with a ``\boxed`` answer) and,
    if it likes, ``level`` and ``id`` (or ``unique_id``; by default its number).

    Raises
    ------
    ValueError
        If a line is no such object; the message names it.
    """
    tasks: list[Task] = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if limit is not None and len(tasks) >= limit:
                break
            if line.strip():
                tasks.append(_task(line, number, path))
    return tasks


def _task(line: str, number: int, path: str | Path) -> Task:
    try:
        entry = json.loads(line)
        problem = entry["problem"] if "problem" in entry else entry["question"]
        answer = entry["answer"] if "answer" in entry else boxed(entry["solution"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}, line {number + 1}: expected an object with problem and answer") from error
    identity = entry.get("id", entry.get("unique_id", number))
    return Task(str(identity), problem, str(answer), str(entry.get("level", "")))


def evaluate(
    tasks: Sequence[Task],
    experiments: Sequence[Experiment],
    path: str | Path,
    *,
    progress: bool = True,
    max_in_flight: int | None = None,
) -> list[Record]:
    """Run experiments over tasks; append a line to a results file for each task as it finishes.

    Tasks that the file already holds a result for are not run again, so an evaluation that was interrupted goes on
    where it was; one that failed is tried again. Even a kill loses at most the problems in flight.

    Parameters
    ----------
    tasks : sequence of Task
        With different ids.
    experiments : sequence of Experiment
        Run one after the other.
    path : str or Path
        The results file (JSONL, append-only).
    progress : bool
        Show a progress bar.
    max_in_flight : int or None
        Problems searched side by side, as in :func:`~tts_search.search_iter`.

    Returns
    -------
    list of Record
        One for each task and experiment, those from earlier runs included; experiments in order, tasks in order.

    Raises
    ------
    ValueError
        If two tasks have the same id.
    """
    if len({task.id for task in tasks}) != len(tasks):
        raise ValueError("tasks: expected different ids")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    records = {(record.experiment, record.task): record for record in read_records(path)}
    with _open_to_append(path) as results:
        for experiment in experiments:
            done = {task for key, task in records if key == experiment.key and not records[key, task].error}
            todo = [task for task in tasks if task.id not in done]
            for record in _run(experiment, todo, progress=progress, max_in_flight=max_in_flight):
                results.write(json.dumps(asdict(record), allow_nan=False) + "\n")
                results.flush()
                records[record.experiment, record.task] = record
    return [records[experiment.key, task.id] for experiment in experiments for task in tasks]


def _run(
    experiment: Experiment, tasks: Sequence[Task], *, progress: bool, max_in_flight: int | None
) -> Iterator[Record]:
    outcomes = search_iter(
        [task.problem for task in tasks],
        experiment.policy,
        experiment.verifier,
        experiment.config,
        progress=progress,
        max_in_flight=max_in_flight,
    )
    for index, outcome in outcomes:
        yield _record(experiment, tasks[index], outcome)


def _record(experiment: Experiment, task: Task, outcome: SearchResult | SearchError) -> Record:
    names = (experiment.key, task.id, experiment.label, task.level, task.problem, task.answer)
    if isinstance(outcome, SearchError):
        return Record(*names, error=str(outcome))
    votes = VOTES if experiment.verifier is not None else ("majority",)
    answers = {vote: outcome.answer(vote) for vote in votes}
    score = outcome.best.score
    return Record(
        *names,
        answers=answers,
        correct={vote: equivalent(task.answer, answer) for vote, answer in answers.items()},
        solved=any(equivalent(task.answer, answer) for answer in {one.answer for one in outcome.completions}),
        num_completions=len(outcome.completions),
        best=outcome.best.text,
        score=score if math.isfinite(score) else None,
        stats=asdict(outcome.stats),
        tree=outcome.tree.to_json() if experiment.keep_trees else None,
    )


def read_records(path: str | Path) -> list[Record]:
    """Read a results file, oldest first; what a crash left half-written is passed over. No file is no records."""
    if not Path(path).exists():
        return []
    known = {one.name for one in fields(Record)}
    records = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry: dict[str, Any] = json.loads(line)
                records.append(Record(**{name: value for name, value in entry.items() if name in known}))
            except (json.JSONDecodeError, AttributeError, TypeError):
                continue
    return records


def _open_to_append(path: Path) -> IO[str]:
    """Open a results file, beginning a new line if the last one was not finished."""
    results = open(path, "a", encoding="utf-8")  # noqa: SIM115  # the caller closes it
    if results.tell() > 0:
        with open(path, "rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                results.write("\n")
    return results
