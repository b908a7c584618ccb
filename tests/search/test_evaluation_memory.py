"""An evaluation's memory: tasks and records stay in their files."""

from __future__ import annotations

import json
import tracemalloc
from functools import partial

import pytest
from tts_search import SearchConfig, Step, TextPolicy
from tts_search.evaluation.evaluate import Experiment, read_records, run_here
from tts_search.evaluation.runs import check_success, failures, run_experiments
from tts_search.evaluation.tables import accuracy_table, cost_table
from tts_search.evaluation.tasks import TaskFile

PADDING = "x" * 1000  # of each problem, and of each answer
GROWTH = 700  # bytes a task: hashes and places of records, ids; a task and its record take some 6,000


def policy() -> TextPolicy:
    """Answers at no cost, and says much."""

    def answers(requests):
        return [[Step(f"{PADDING} \\boxed{{{one.problem.split()[0]}}}", True)] * one.num_samples for one in requests]

    return TextPolicy(answers)


def write_tasks(path, count):
    with open(path, "w") as file:
        for number in range(count):
            print(json.dumps({"problem": f"{number} {PADDING}", "answer": number, "level": number % 5}), file=file)


def peak_of_an_evaluation(folder, count):
    """Bytes at the peak of what `tts-search eval` does, run and gone on with."""
    folder.mkdir()
    write_tasks(folder / "tasks.jsonl", count)
    experiment = Experiment("test", SearchConfig("best_of_n", n=1), policy(), None)
    run = partial(run_here, progress=False, max_in_flight=8)
    tracemalloc.start()
    try:
        for _ in range(2):
            tasks = TaskFile(folder / "tasks.jsonl")
            rows = run_experiments(tasks, [experiment], folder / "out", data="tasks", run=run, emit=lambda _: None)
            tables = accuracy_table(rows) + cost_table(rows)
            assert not failures(rows)
            check_success(rows)
        assert " 100.0 (" in tables.splitlines()[2]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("few", "many"), [(300, 2300), pytest.param(2000, 20_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_data(tmp_path, few, many):
    peak_of_an_evaluation(tmp_path / "imports", 2)
    small, large = (peak_of_an_evaluation(tmp_path / str(count), count) for count in (few, many))
    growth = (large - small) / (many - few)
    print(f"{growth:.0f} bytes a task")
    assert growth < GROWTH
    assert len(read_records(tmp_path / str(many) / "out" / "results.jsonl")) == many
