"""Asks a policy to write tests for programming tasks, before the search for programs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tts_search.domains.code.tasks import PROGRAMS, CodeTask
from tts_search.domains.code.writing import ask_for_tests, written_tests
from tts_search.evaluation.evaluate import Runner, evaluate
from tts_search.evaluation.experiment import Experiment
from tts_search.evaluation.records import Record
from tts_search.evaluation.tasks import Task, Tasks
from tts_search.search.config import SearchConfig
from tts_search.search.protocol import Policy
from tts_search.search.tree import SearchTree

__all__ = ["Suites", "questions", "write_suites"]

_TOKENS: Final = 384  # of one text of tests
_LABEL: Final = "written tests"


@dataclass(frozen=True)
class Suites:
    """Tasks with the tests that a policy wrote, and the cost of these tests.

    Attributes
    ----------
    tasks : list of Task
        The tasks, with their ``written_tests``.
    texts : int
        Number of texts of tests for each task.
    tests, without, failed : int
        Number of tests of all tasks, including repeated ones; of tasks without any test; of tasks for which the policy
        failed.
    tokens, prompt_tokens : int
        Number of tokens that were sampled, and that were read as prompts.
    """

    tasks: list[Task]
    texts: int
    tests: int
    without: int
    failed: int
    tokens: int
    prompt_tokens: int

    def __str__(self) -> str:
        failed = f", {self.failed} because the policy failed" if self.failed else ""
        return (
            f"written tests: {self.tests} in {self.texts} texts for each of {len(self.tasks)} tasks ({self.without} "
            f"without any{failed}); {self.tokens} tokens sampled, {self.prompt_tokens} of prompts"
        )


def write_suites(
    tasks: Tasks,
    policy: Policy | None,
    path: str | Path,
    *,
    texts: int,
    temperature: float = 0.8,
    seed: int = 0,
    names: tuple[str, ...] = (),
    progress: bool = True,
    run: Runner | None = None,
) -> Suites:
    """Let a policy write tests of tasks of programming. Tests that a file already holds are not written again.

    The texts are the completions of a best-of-N, whose prompt asks for assertions. From each text the first five
    different assertions about the task's function are used. The file is that of an evaluation, so the run can be
    interrupted, shared by processes, or run on a cluster.

    Parameters
    ----------
    tasks : sequence of Task, or TaskFile
        Tasks of programming, with different ids.
    policy : Policy or None
        The policy that writes; None if `run` has one elsewhere.
    path : str or Path
        File of the texts (JSONL).
    texts : int
        Texts of each task.
    temperature, seed
        Of the sampling.
    names : tuple of str
        Names that identify the policy.
    progress : bool
        Show a progress bar.
    run : callable or None
        Runs an experiment, as for :func:`~tts_search.evaluation.evaluate.evaluate`.

    Raises
    ------
    ValueError
        If a task is not one of programming, asks for a whole program, or has written tests already; and as for
        `evaluate`.
    OSError
        If the file cannot be written.
    """
    config = SearchConfig("best_of_n", n=texts, temperature=temperature, max_step_tokens=_TOKENS, seed=seed)
    experiment = Experiment(_LABEL, config, policy, None, names, keep_trees=True)
    records = list(evaluate(questions(tasks), [experiment], path, progress=progress, run=run))
    suites = [_suite(record, task) for record, task in zip(records, tasks, strict=True)]
    return Suites(
        [_with_suite(task, suite) for task, suite in zip(tasks, suites, strict=True)],
        texts,
        sum(map(len, suites)),
        sum(not suite for suite in suites),
        sum(record.error is not None for record in records),
        *(round(math.fsum(record.stats.get(name, 0) for record in records)) for name in _COSTS),
    )


_COSTS: Final = ("policy_tokens", "policy_prefill_tokens")


def questions(tasks: Tasks) -> list[Task]:
    """Return the questions by which a policy is asked for tests of tasks.

    Raises
    ------
    ValueError
        If a task is not one of programming, asks for a whole program, or has written tests already.
    """
    return [Task(task.id, ask_for_tests(_code_task(task)), "") for task in tasks]


def _code_task(task: Task) -> CodeTask:
    if task.grader != "code":
        raise ValueError(f"expected tasks of programming, got {task.id}, which is none")
    own = PROGRAMS.read(task.details, task.id)
    if own.written is not None:
        raise ValueError(f"expected tasks without written_tests, got {task.id}, which has some")
    return own


def _suite(record: Record, task: Task) -> list[str]:
    entry = PROGRAMS.read(task.details, task.id).entry
    nodes = SearchTree.from_json(record.tree).nodes[1:] if record.tree else ()
    return [test for node in nodes for test in written_tests(node.text, entry)]


def _with_suite(task: Task, suite: list[str]) -> Task:
    details = {**task.details, "written_tests": suite}
    return replace(task, details=details, answer=PROGRAMS.read(details, task.id).fingerprint)
