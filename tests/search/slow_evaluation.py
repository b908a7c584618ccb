"""A slow evaluation, for the tests that kill it: 40 tasks, one after the other."""

from __future__ import annotations

import time
from pathlib import Path

from tts_search import SearchConfig, Step, TextPolicy
from tts_search.evaluation.evaluate import Experiment, run_here
from tts_search.evaluation.runs import run_experiments
from tts_search.evaluation.tasks import Task

TASKS = [Task(str(number), f"problem {number}", str(number)) for number in range(40)]


def main(folder: Path, seconds: float, label: str) -> None:
    """Run it: a task takes so many seconds."""

    def answer(requests):
        time.sleep(seconds)
        number = requests[0].problem.split()[1]
        return [[Step(f"\\boxed{{{number}}}", True)] * request.num_samples for request in requests]

    def run(experiment, tasks):
        return run_here(experiment, tasks, progress=False, max_in_flight=1)

    experiment = Experiment(label, SearchConfig(method="best_of_n", n=2), TextPolicy(answer), None)
    run_experiments(TASKS, [experiment], folder, data="numbers", run=run, emit=lambda _: None)
