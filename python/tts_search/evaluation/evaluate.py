"""Runs searches over tasks with known answers; every finished task is on disk before the next one is waited for."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from tts_search.api import search_iter
from tts_search.domains.mathematics import equivalent
from tts_search.errors import SearchError
from tts_search.evaluation.tasks import Task
from tts_search.search.config import SearchConfig
from tts_search.search.protocol import Policy, Verifier
from tts_search.search.result import SearchResult
from tts_search.search.voting import VOTES, canonical
from tts_search.strategy import estimate_pass_rate

__all__ = [
    "Experiment",
    "Record",
    "Runner",
    "evaluate",
    "latest",
    "read_configs",
    "read_record",
    "read_records",
    "run_here",
    "write_manifest",
]


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
        The models. Without a policy it can run elsewhere only, where both are loaded
        (:mod:`tts_search.evaluation.ray`).
    names : tuple of str
        What tells these models from others, such as their paths: a record of other models or another config is not
        taken for one of this experiment.
    keep_trees : bool
        Whether records hold the search tree.
    nested : tuple of int
        Of a best-of-N: record these smaller budgets, too, from the same samples. ``{n}`` in the label is the budget.
    timed : bool
        Whether its time says anything: not if it takes samples that another experiment has paid for.
    """

    label: str
    config: SearchConfig
    policy: Policy | None
    verifier: Verifier | None
    names: tuple[str, ...] = ()
    keep_trees: bool = False
    nested: tuple[int, ...] = ()
    timed: bool = True

    @property
    def variants(self) -> list[Experiment]:
        """The experiment for each budget, the nested ones first."""
        sizes = [size for size in sorted({*self.nested, self.config.n}) if size <= self.config.n]
        return [
            replace(
                self,
                label=self.label.replace("{n}", str(size)),
                config=replace(self.config, n=size),
                keep_trees=self.keep_trees and size == self.config.n,
                nested=(),
                timed=self.timed and size == self.config.n,
            )
            for size in sizes
        ]

    @property
    def key(self) -> str:
        """The label, and a hash of everything that can change the outcome."""
        facts = json.dumps([self.config.as_dict(), self.names], sort_keys=True)
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
    method, n, seed, models
        Of the search: `models` are the experiment's names.
    answers : dict
        The answer that each vote elects.
    correct : dict
        Whether it is right.
    solved : bool
        Whether any completion is right (pass@n).
    num_completions, num_correct : int
        How many there are, and how many of them are right.
    pass_estimate : float or None
        The policy's pass@1 by the verifier's scores (:func:`~tts_search.strategy.estimate_pass_rate`).
    best : str
        Text of the best completion.
    score : float or None
        Its score.
    stats : dict
        Fields of :class:`~tts_search.SearchStats`.
    seconds : float or None
        Its share of the experiment's time: since the task before it was done. Tasks run side by side, so a search
        itself takes longer (``stats["wall_s"]``). None: not known.
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
    method: str = ""
    n: int = 0
    seed: int = 0
    models: tuple[str, ...] = ()
    answers: dict[str, str] = field(default_factory=dict)
    correct: dict[str, bool] = field(default_factory=dict)
    solved: bool = False
    num_completions: int = 0
    num_correct: int = 0
    pass_estimate: float | None = None
    best: str = ""
    score: float | None = None
    stats: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    tree: str | None = None
    error: str | None = None

    @property
    def pass_rate(self) -> float:
        """Share of the completions that are right."""
        return self.num_correct / self.num_completions if self.num_completions else 0.0

    def is_correct(self, vote: str) -> bool:
        """Whether a vote elects the right answer; without a verifier, every vote is the majority's.

        Raises
        ------
        ValueError
            If there is no such vote.
        """
        name = canonical(vote)
        return self.correct.get("majority" if set(self.correct) == {"majority"} else name, False)


Runner = Callable[[Experiment, Sequence[Task]], Iterable[Record]]
"""Runs an experiment over tasks and yields records as tasks finish, in any order."""


def evaluate(
    tasks: Sequence[Task],
    experiments: Sequence[Experiment],
    path: str | Path,
    *,
    also: Sequence[str | Path] = (),
    progress: bool = True,
    max_in_flight: int | None = None,
    run: Runner | None = None,
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
    also : sequence of str or Path
        Other results files: what they hold is not run again either.
    progress : bool
        Show a progress bar.
    max_in_flight : int or None
        Problems searched side by side, as in :func:`~tts_search.search_iter`.
    run : callable or None
        Runs an experiment; by default :func:`run_here`. :func:`tts_search.evaluation.ray.on_ray` makes one for a
        cluster.

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
    run = run or partial(run_here, progress=progress, max_in_flight=max_in_flight)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [*also, path]
    records = latest(record for file in files for record in read_records(file))
    with _open_to_append(path) as results:
        for experiment in experiments:
            variants = experiment.variants
            todo = [task for task in tasks if not all(_is_done(records, one, task) for one in variants)]
            for record in run(experiment, todo):
                results.write(json.dumps(asdict(record), allow_nan=False) + "\n")
                results.flush()
                records[record.experiment, record.task, record.problem] = record
    variants = [variant for experiment in experiments for variant in experiment.variants]
    return [records[variant.key, task.id, task.problem] for variant in variants for task in tasks]


def latest(records: Iterable[Record]) -> dict[tuple[str, str, str], Record]:
    """Return, by experiment, task and problem, the last record that is no error; if all are, the last one.

    The problem's text tells data sets apart whose tasks have the same ids.
    """
    found: dict[tuple[str, str, str], Record] = {}
    for record in records:
        key = (record.experiment, record.task, record.problem)
        if record.error is None or key not in found or found[key].error is not None:
            found[key] = record
    return found


def _is_done(records: Mapping[tuple[str, str, str], Record], experiment: Experiment, task: Task) -> bool:
    record = records.get((experiment.key, task.id, task.problem))
    return record is not None and not record.error and record.gold == task.answer


def run_here(
    experiment: Experiment, tasks: Sequence[Task], *, progress: bool = True, max_in_flight: int | None = None
) -> Iterator[Record]:
    """Run an experiment in this process; yield the records of a task (one a budget) as it finishes.

    Raises
    ------
    ValueError
        If the experiment has no policy.
    """
    if experiment.policy is None:
        raise ValueError(f"experiment {experiment.label!r}: expected a policy, got None")
    outcomes = search_iter(
        [task.problem for task in tasks],
        experiment.policy,
        experiment.verifier,
        experiment.config,
        progress=progress,
        max_in_flight=max_in_flight,
    )
    begin = time.perf_counter()
    for index, outcome in outcomes:
        begin, seconds = time.perf_counter(), time.perf_counter() - begin
        for variant in experiment.variants:
            own = outcome
            if isinstance(outcome, SearchResult) and variant.config.n < experiment.config.n:
                own = outcome.first(variant.config.n)
            yield replace(_record(variant, tasks[index], own), seconds=seconds if variant.timed else None)


def _record(experiment: Experiment, task: Task, outcome: SearchResult | SearchError) -> Record:
    config = experiment.config
    names = (
        *(experiment.key, task.id, experiment.label, task.level, task.problem, task.answer),
        *(config.method_name, config.n, config.seed, experiment.names),
    )
    if isinstance(outcome, SearchError):
        return Record(*names, error=str(outcome))
    votes = VOTES if experiment.verifier is not None else ("majority",)
    answers = {vote: outcome.answer(vote) for vote in votes}
    score = outcome.best.score
    right = Counter(one.answer for one in outcome.completions)
    num_correct = sum(count for answer, count in right.items() if equivalent(task.answer, answer))
    return Record(
        *names,
        answers=answers,
        correct={vote: equivalent(task.answer, answer) for vote, answer in answers.items()},
        solved=num_correct > 0,
        num_completions=len(outcome.completions),
        num_correct=num_correct,
        pass_estimate=estimate_pass_rate(outcome),
        best=outcome.best.text,
        score=score if math.isfinite(score) else None,
        stats={name: value for name, value in asdict(outcome.stats).items() if math.isfinite(value)},
        tree=outcome.tree.to_json() if experiment.keep_trees else None,
    )


def read_records(path: str | Path) -> list[Record]:
    """Read a results file, oldest first; what a crash left half-written is passed over. No file is no records."""
    if not Path(path).exists():
        return []
    records = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                records.append(read_record(line))
            except (json.JSONDecodeError, AttributeError, TypeError):
                continue
    return records


def read_record(line: str) -> Record:
    """Read a line of a results file.

    Raises
    ------
    json.JSONDecodeError, AttributeError, TypeError
        If it is no record.
    """
    entry: dict[str, Any] = json.loads(line)
    known = {one.name for one in fields(Record)}
    record = Record(**{name: value for name, value in entry.items() if name in known})
    return replace(record, models=tuple(record.models))


def _open_to_append(path: Path) -> IO[str]:
    """Open a results file, beginning a new line if the last one was not finished."""
    results = open(path, "a", encoding="utf-8")  # noqa: SIM115  # the caller closes it
    if results.tell() > 0:
        with open(path, "rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                results.write("\n")
    return results


def write_manifest(path: str | Path, experiments: Sequence[Experiment], data: str | Path, **facts: object) -> None:
    """Write what an evaluation ran with: versions, data, models, configs. What an earlier manifest knew is kept.

    Parameters
    ----------
    path : str or Path
        The file, such as ``manifest.json`` beside the results.
    experiments : sequence of Experiment
        Added to those that it holds, by key.
    data : str or Path
        Where the tasks come from.
    **facts
        Anything else that JSON can hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in ("tts-kernels", "torch", "transformers", "math-verify")},
        "data": str(data),
        **facts,
    }
    variants = [variant for one in experiments for variant in one.variants]
    entries = {one.key: {"models": one.names, "config": one.config.as_dict()} for one in variants}
    manifest = {"runs": [*known.get("runs", ()), run], "experiments": {**known.get("experiments", {}), **entries}}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)  # a kill leaves the old manifest or the new one


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def read_configs(path: str | Path) -> dict[str, SearchConfig]:
    """Read the configs of a manifest by the key of their experiment."""
    manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    return {key: SearchConfig(**entry["config"]) for key, entry in manifest["experiments"].items()}
