"""An evaluation that takes a while, for the test that kills it: 40 tasks, one after the other."""

from __future__ import annotations

import sys
import time

from tts_search import SearchConfig, Step, TextPolicy
from tts_search.evaluation.evaluate import Experiment, evaluate
from tts_search.evaluation.tasks import Task


def answer(requests):
    time.sleep(0.02)
    number = requests[0].problem.split()[1]
    return [[Step(f"\\boxed{{{number}}}", True)] * request.num_samples for request in requests]


if __name__ == "__main__":
    tasks = [Task(str(number), f"problem {number}", str(number)) for number in range(40)]
    experiment = Experiment("slow", SearchConfig(method="best_of_n", n=2), TextPolicy(answer), None)
    evaluate(tasks, [experiment], sys.argv[1], progress=False, max_in_flight=1)
