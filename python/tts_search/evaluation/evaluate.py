"""Runs searches over tasks with known answers. Each finished task is on disk before the next one is waited for."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tts_search.api import search_iter
from tts_search.domains.grading import Grader
from tts_search.engine.scheduler import Speculate
from tts_search.errors import SearchError
from tts_search.evaluation.experiment import Experiment, instruction_set
from tts_search.evaluation.manifest import read_configs, write_manifest
from tts_search.evaluation.records import Journal, Record, Stored, read_records
from tts_search.evaluation.smaller_n import with_smaller_n
from tts_search.evaluation.tasks import Task, Tasks
from tts_search.search.result import SearchResult
from tts_search.search.types import Completion
from tts_search.search.voting import VOTES
from tts_search.strategy import estimate_pass_rate

__all__ = [
    "Experiment",
    "Record",
    "Runner",
    "evaluate",
    "read_configs",
    "read_records",
    "run_here",
    "write_manifest",
]

Runner = Callable[[Experiment, Tasks], Iterable[Record]]
"""Runs an experiment over tasks and yields records as tasks finish, in any order."""


def evaluate(
    tasks: Tasks,
    experiments: Sequence[Experiment],
    path: str | Path,
    *,
    also: Sequence[str | Path] = (),
    progress: bool = True,
    max_in_flight: int | None = None,
    run: Runner | None = None,
) -> Stored:
    """Run experiments over tasks; append a line to a results file for each task as it finishes.

    Tasks whose result is already in the file are not run again, so an interrupted evaluation continues where it
    stopped. A task that failed is tried again. Even if the process is killed, at most the problems in flight are lost.

    Tasks are read when there is room for them, and records stay in the file. The memory used is that of the problems in
    flight, and a few hundred bytes for each task.

    Parameters
    ----------
    tasks : sequence of Task, or TaskFile
        With different ids. They are read several times.
    experiments : sequence of Experiment
        Run one after the other.
    path : str or Path
        The results file (JSONL, append-only).
    also : sequence of str or Path
        Other results files. Tasks with a result in them are not run again either.
    progress : bool
        Show a progress bar.
    max_in_flight : int or None
        Problems searched at the same time, as in :func:`~tts_search.search_iter`.
    run : callable or None
        Runs an experiment; by default :func:`run_here`. :func:`tts_search.evaluation.ray.on_ray` makes one for a
        cluster.

    Returns
    -------
    Stored
        One record for each task and experiment, including those from earlier runs, in the order of experiments and then
        of tasks. Each is read from the file when it is asked for.

    Raises
    ------
    ValueError
        If two tasks have the same id; if the results of an experiment are of another instruction-set level.
    OSError
        If the results cannot be written.
    """
    if len({task.id for task in tasks}) != len(tasks):
        raise ValueError("tasks: expected different ids")
    run = run or partial(run_here, progress=progress, max_in_flight=max_in_flight)
    with Journal(path, also) as journal:
        for experiment in experiments:
            if experiment.policy is not None:  # else it runs elsewhere, and the records say on what
                for variant in experiment.variants:
                    journal.check_level(variant.key, instruction_set())
            for record in run(experiment, _Unfinished(tasks, experiment, journal)):
                journal.append(record)
        keys = [variant.key for experiment in experiments for variant in experiment.variants]
        return journal.find((key, task.id, task.problem, task.answer) for key in keys for task in tasks)


class _Unfinished:
    """The tasks that lack a result for some budget of an experiment. They are looked up anew in each iteration."""

    def __init__(self, tasks: Tasks, experiment: Experiment, journal: Journal) -> None:
        self._tasks = tasks
        self._keys = [variant.key for variant in experiment.variants]
        self._journal = journal
        self._length = sum(1 for _ in self)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Task]:
        return (task for task in self._tasks if not self._is_done(task))

    def _is_done(self, task: Task) -> bool:
        return all(self._journal.is_done(key, task.id, task.problem, task.answer) for key in self._keys)


class _InFlight:
    """The problems of tasks, read when a search has room for them. A task is kept until its outcome is known."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._read: dict[int, Task] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[str]:
        for index, task in enumerate(self._tasks):
            self._read[index] = task
            yield task.problem

    def pop(self, index: int) -> Task:
        return self._read.pop(index)


def run_here(
    experiment: Experiment,
    tasks: Tasks,
    *,
    progress: bool = True,
    max_in_flight: int | None = None,
    speculate: Speculate = "auto",
) -> Iterator[Record]:
    """Run an experiment in this process; yield the records of a task (one for each budget) as it finishes.

    The prefix cache is off: the cost in a record must not depend on the experiments that ran before.

    Raises
    ------
    ValueError
        If the experiment has no policy.
    """
    if experiment.policy is None:
        raise ValueError(f"experiment {experiment.label!r}: expected a policy, got None")
    problems = _InFlight(tasks)
    outcomes = search_iter(
        problems,
        experiment.policy,
        experiment.verifier,
        experiment.config,
        progress=progress,
        max_in_flight=max_in_flight,
        prefix_cache=False,
        speculate=speculate,
    )
    begin = time.perf_counter()
    for index, outcome in outcomes:
        begin, seconds = time.perf_counter(), time.perf_counter() - begin
        task = problems.pop(index)
        grader = task.make_grader()
        if isinstance(outcome, SearchResult):
            outcome = _with_answers(outcome, grader)
        for variant in experiment.variants:
            own = outcome
            if isinstance(outcome, SearchResult) and variant.config.n < experiment.config.n:
                own = with_smaller_n(outcome, variant.config.n)
            yield replace(_record(variant, task, own, grader), seconds=seconds if variant.timed else None)


def _with_answers(outcome: SearchResult, grader: Grader) -> SearchResult:
    """The result, with the answers that the task's grader finds in the completions."""

    def own(completion: Completion) -> Completion:
        answer = grader.extract(completion.text)
        return completion if answer is None else replace(completion, answer=answer)

    completions = [own(completion) for completion in outcome.completions]
    return replace(outcome, completions=completions, best=own(outcome.best), equal=grader.equal)


def _record(experiment: Experiment, task: Task, outcome: SearchResult | SearchError, grader: Grader) -> Record:
    config = experiment.config
    names = (
        *(experiment.key, task.id, experiment.label, task.level, task.problem, task.answer),
        *(config.method_name, config.n, config.seed, experiment.names, config.as_dict(), instruction_set()),
    )
    if isinstance(outcome, SearchError):
        return Record(*names, error=str(outcome))
    votes = VOTES if experiment.verifier is not None else ("majority",)
    answers = {vote: outcome.answer(vote) for vote in votes}
    score = outcome.best.score
    right = Counter(one.answer for one in outcome.completions)
    num_correct = sum(count for answer, count in right.items() if grader.correct(answer))
    return Record(
        *names,
        answers=answers,
        correct={vote: grader.correct(answer) for vote, answer in answers.items()},
        solved=num_correct > 0,
        num_completions=len(outcome.completions),
        num_correct=num_correct,
        pass_estimate=estimate_pass_rate(outcome),
        best=outcome.best.text,
        score=score if math.isfinite(score) else None,
        stats={name: value for name, value in asdict(outcome.stats).items() if math.isfinite(value)},
        tree=outcome.tree.to_json() if experiment.keep_trees else None,
    )
