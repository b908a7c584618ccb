"""An evaluation on a local Ray cluster of two one-core workers: the results of one machine, even if workers die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tts_search import HFPolicy, HFVerifier, SearchConfig, SearchError
from tts_search.cli.main import _with_ray_address
from tts_search.domains.code import Level, Sandbox
from tts_search.evaluation.evaluate import Experiment, Record, evaluate, read_records
from tts_search.evaluation.ray import on_ray, problems_per_call
from tts_search.lab import MODELS_DIR
from tts_search.lab.demo import make_tasks

TASKS = make_tasks((1, 2, 3), 20, 0)
CONFIG = SearchConfig(n=4, max_steps=8, max_step_tokens=32)
POLICY, VERIFIER = str(MODELS_DIR / "policy-0.1m"), str(MODELS_DIR / "prm-strong")


def load(folder: Path) -> tuple[HFPolicy, HFVerifier]:
    """Load the models and leave a file named by the process."""
    (folder / str(os.getpid())).touch()
    # In float32: the neighbours of a branch in a batch change the last bit of its attention, which in bfloat16 may
    # change a draw.
    return HFPolicy(POLICY, dtype="float32"), HFVerifier(VERIFIER, dtype="float32")


def comparable(records: list[Record]) -> list[Record]:
    """Records without the time and what depends on the neighbours in a batch."""
    changing = ("wall_s", "waves", "recomputed_tokens")
    return [
        replace(one, seconds=0.0, stats={name: value for name, value in one.stats.items() if name not in changing})
        for one in records
    ]


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (["eval", "--ray"], ["eval", "--ray="]),
        (["eval", "--ray", "--n", "4"], ["eval", "--ray=", "--n", "4"]),
        (["eval", "--ray", "local", "d.jsonl"], ["eval", "--ray", "local", "d.jsonl"]),
        ([], []),
    ],
)
def test_the_address_is_optional(given: list[str], parsed: list[str]) -> None:
    assert _with_ray_address(given) == parsed


def test_calls_are_large_but_not_too_few() -> None:
    assert problems_per_call(10_000, 64, 4) == 16  # full engines
    assert problems_per_call(500, 64, 4) == 2  # four calls an actor
    assert problems_per_call(1, 64, 4) == 1


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    workers = tmp_path / "workers"
    workers.mkdir()
    here = Experiment("test", CONFIG, *load(tmp_path), ("policy", "verifier"))
    expected = evaluate(TASKS, [here], tmp_path / "here.jsonl", progress=False)
    killed = []

    def run(experiment, tasks):
        for number, record in enumerate(on_ray(partial(load, workers), max_in_flight=2)(experiment, tasks)):
            yield record
            if number == 10:
                killed.append(next(workers.iterdir()))
                os.kill(int(killed[0].name), signal.SIGKILL)

    path = tmp_path / "ray.jsonl"
    elsewhere = replace(here, policy=None, verifier=None)
    records = evaluate(TASKS, [elsewhere], path, progress=False, run=run)
    assert comparable(records) == comparable(expected)
    assert Counter(one.task for one in read_records(path)) == {task.id: 1 for task in TASKS}
    assert killed
    assert len(list(workers.iterdir())) >= 3  # two, and the one that took the place of the killed one


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ray.jsonl"
    experiment = Experiment("test", CONFIG, None, None, ("policy", "verifier"))
    run = on_ray(partial(load, tmp_path), actors=1)
    first = evaluate(TASKS[:5], [experiment], path, progress=False, run=run)
    records = evaluate(TASKS[:8], [experiment], path, progress=False, run=run)
    assert records[:5] == first
    assert Counter(one.task for one in read_records(path)) == {task.id: 1 for task in TASKS[:8]}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_models_that_cannot_be_loaded_are_an_error(tmp_path: Path) -> None:
    experiment = Experiment("test", CONFIG, None, None)
    run = on_ray(partial(HFPolicy, str(tmp_path)), actors=1)
    with pytest.raises(SearchError, match=r"^ray: "):
        evaluate(TASKS[:2], [experiment], tmp_path / "ray.jsonl", progress=False, run=run)


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "1 + 2", "answer": "3"}\n{"problem": "2 + 2", "answer": "4"}\n')
    arguments = [str(data), "--policy", POLICY, "--verifier", VERIFIER, "--n", "4", "--actors", "1"]
    command = [sys.executable, "-m", "tts_search.cli", "eval", *arguments, "--out", str(tmp_path), "--ray=local"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    shown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "best_of_n, n=4, seed=0" in shown
    assert len(read_records(tmp_path / "results.jsonl")) == 2


@pytest.mark.slow
def test_written_tests_travel(tmp_path: Path) -> None:
    """A policy in a worker writes them, and the workers that search have them: the records of one machine."""
    pytest.importorskip("ray")
    if not sys.platform.startswith("linux") or Sandbox().level() < Level.FULL:
        pytest.skip("no sandbox of the full level")
    task = {"task_id": 1, "text": "The larger.", "test_list": ["assert larger(1, 2) == 2", "assert larger(3, 2) == 3"]}
    data = tmp_path / "code.jsonl"
    data.write_text(json.dumps(task))
    arguments = [str(data), "--policy", POLICY, "--verifier", "execution", "--written-tests", "2", "--n", "2"]
    command = [sys.executable, "-m", "tts_search.cli", "eval", *arguments, "--set", "max_step_tokens=32"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for where, options in (("here", []), ("there", ["--ray=local", "--actors", "1"])):
        out = ["--out", str(tmp_path / where)]
        shown = subprocess.run(
            [*command, *options, *out], env=environment, check=True, capture_output=True, text=True
        ).stdout
        assert "written tests: 0 in 2 texts for each of 1 tasks" in shown
    for name in ("written-tests.jsonl", "results.jsonl"):
        assert comparable(read_records(tmp_path / "there" / name)) == comparable(read_records(tmp_path / "here" / name))


def test_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^actors: expected an int >= 1, got 0$"):
        on_ray(partial(load, tmp_path), actors=0)
    with pytest.raises(ValueError, match=r"^experiment 'test': expected a policy, got None$"):
        evaluate(TASKS[:1], [Experiment("test", CONFIG, None, None)], tmp_path / "x.jsonl")
