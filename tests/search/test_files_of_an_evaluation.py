"""An evaluation's files in adverse conditions: many writers, kills, full disks, other versions."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import slow_evaluation
from scripted import ScriptedPolicy
from tts_search import SearchConfig, Step
from tts_search.evaluation import evaluate as module
from tts_search.evaluation.evaluate import Experiment, evaluate, read_configs, read_records, write_manifest
from tts_search.evaluation.records import Journal, record_as_json
from tts_search.evaluation.tasks import Task

TASKS = [Task(str(i), f"problem {i}", str(i)) for i in range(6)]


def experiment(label="test", **options):
    def step(problem, *_):
        return Step(f"it is \\boxed{{{problem.split()[1]}}}", True, 4)

    return Experiment(label, SearchConfig("best_of_n", n=2, **options), ScriptedPolicy(step), None, ("policy",))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


# Evaluations as processes: each is forked from one that has imported everything, so that kills hit files, not imports.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["slow_evaluation"])


def started(function: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = CONTEXT.Process(target=function, args=arguments)
    with mock.patch.dict(os.environ, environment()):  # the process that all are forked from finds its imports there
        process.start()
    return process


def start(folder: Path, seconds: float, label: str = "slow") -> multiprocessing.process.BaseProcess:
    return started(slow_evaluation.main, folder, seconds, label)


def check_whole(folder: Path) -> list[str]:
    """Every line is a record, each task is there once; return the tasks."""
    path = folder / "results.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    last = lines.pop()  # what a kill left of a line
    for line in lines:
        json.loads(line)
    assert len(read_records(path)) - len(lines) in ((0, 1) if last else (0,))
    tasks = [record.task for record in read_records(path)]
    assert max(Counter(tasks).values(), default=1) == 1
    return tasks


def kill_at_random(folder: Path, kills: int, rng: random.Random) -> int:
    """Kill an evaluation of 40 tasks again and again; return how many kills hit one that had begun to write."""
    hits = 0
    known: list[str] = []
    for number in range(kills):
        if len(known) == 40:
            shutil.rmtree(folder)
            known = []
        process = start(folder, 0.001)
        before = len(known)
        time_out = time.monotonic() + 120
        if number % 4:  # the others are killed while they start
            while len(check_size(folder)) <= before and process.is_alive() and time.monotonic() < time_out:
                time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        hits += process.is_alive()
        process.kill()
        process.join()
        now = check_whole(folder)
        assert set(known) <= set(now), "a finished record is lost"
        known = now
    process = start(folder, 0.0)
    process.join()
    assert process.exitcode == 0, "a file that the next run refuses"
    assert sorted(check_whole(folder), key=int) == [str(number) for number in range(40)]
    assert set(read_configs(folder / "manifest.json")) == {record.experiment for record in read_records_of(folder)}
    return hits


def check_size(folder: Path) -> list[bytes]:
    path = folder / "results.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def read_records_of(folder: Path):
    return read_records(folder / "results.jsonl")


def test_kills(tmp_path):
    assert kill_at_random(tmp_path / "run", 15, random.Random(0)) >= 5


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_thousand_kills(tmp_path):
    assert kill_at_random(tmp_path / "run", int(os.environ.get("TTS_KILLS", "1000")), random.Random(1)) >= 100


def test_many_processes_into_one_folder(tmp_path):
    """Four with one experiment each, and two more with the same one: all there, nothing twice, nothing mixed."""
    labels = ["a", "b", "c", "d", "d", "d"]
    processes = [start(tmp_path, 0.001, label) for label in labels]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(labels)
    records = read_records_of(tmp_path)
    assert Counter(record.label for record in records) == dict.fromkeys("abcd", 40)
    assert max(Counter(record.key for record in records).values()) == 1
    assert {key.split(" ")[0] for key in read_configs(tmp_path / "manifest.json")} == set("abcd")
    assert len(json.loads((tmp_path / "manifest.json").read_text())["runs"]) == len(labels)
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "manifest.json", ".manifest.json.lock"}


def write_manifests(path: Path, who: str) -> None:
    for number in range(100):
        write_manifest(path, [experiment(f"{who}{number}")], "data")


def test_manifests_written_at_once(tmp_path):
    """As fast as it goes: each writer's own experiments are all there."""
    path = tmp_path / "manifest.json"
    writers = [started(write_manifests, path, who) for who in "abc"]
    for one in writers:
        one.join()
    assert [one.exitcode for one in writers] == [0, 0, 0]
    assert len(read_configs(path)) == len(json.loads(path.read_text())["runs"]) == 300


def test_a_record_that_another_process_finished_is_not_written_twice(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second = evaluate(TASKS[:2], [experiment()], tmp_path / "other.jsonl", progress=False)
    with Journal(path) as one, Journal(path) as other:
        assert one.append(first) == first
        assert other.append(replace(first, best="later")) == first  # that of the other process holds
        failed = replace(second, error="no")
        assert [other.append(failed), one.append(second)] == [failed, second]  # a failure is tried again
        assert one.append(replace(first, gold="corrected")).gold == "corrected"
    assert [record.task for record in read_records(path)] == ["0", "1", "1", "0"]


def test_the_rest_of_a_line_is_taken_away_and_a_whole_one_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second = evaluate(TASKS[:2], [experiment()], path, progress=False)
    whole = path.read_bytes()
    for cut in (1, 2, 40, len(record_as_json(second))):
        path.write_bytes(whole[:-cut])
        with Journal(path) as journal:
            known = [first, second] if cut == 1 else [first]  # only the line's end is missing
            assert len(journal) == len(known)
            assert journal.find([(*record.key, record.gold) for record in known]) == known
            journal.append(second)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 30])
def test_a_writer_that_is_killed_while_another_goes_on(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    first, second, third = evaluate(TASKS[:3], [experiment()], tmp_path / "other.jsonl", progress=False)
    with Journal(path) as journal:
        journal.append(first)
        with open(path, "a") as other:
            other.write((record_as_json(second) + "\n")[:-cut])
        journal.append(third)
    assert [record.task for record in read_records(path)] == (["0", "1", "2"] if cut == 1 else ["0", "2"])
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """A limit of the size of files, as a quota sets it: the record that does not fit is not there in part."""
    path = tmp_path / "results.jsonl"
    records = evaluate(TASKS, [experiment()], tmp_path / "other.jsonl", progress=False)
    size = len(record_as_json(records[0])) + 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as journal:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3 * size, limits[1]))
            with pytest.raises(OSError, match=rf"File too large: '{path}'"):
                [journal.append(record) for record in records]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        kept = read_records(path)
        assert 0 < len(kept) < len(records)
        assert path.read_bytes().endswith(b"\n")
        for record in records[len(kept) :]:  # there is room again
            journal.append(record)
    assert read_records(path) == records


def test_a_full_disk_leaves_the_old_manifest(tmp_path):
    path = tmp_path / "manifest.json"
    write_manifest(path, [experiment("a")], "data")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(OSError, match=rf"File too large: '{path}'"):
            write_manifest(path, [experiment("b")], "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert {one.name for one in tmp_path.iterdir()} == {"manifest.json", ".manifest.json.lock"}


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_folder_that_vanishes_is_an_error(tmp_path, how):
    """Whatever was written after it would be nowhere."""
    folder = tmp_path / "out"
    path = folder / "results.jsonl"

    def run(one, tasks):
        for number, record in enumerate(module.run_here(one, tasks, progress=False)):
            if number == 3:
                shutil.move(folder, tmp_path / "elsewhere") if how == "moved" else shutil.rmtree(folder)
            if number == 3 and how == "replaced":
                folder.mkdir()
                path.touch()
            yield record

    with pytest.raises(FileNotFoundError, match=rf"vanished .*: '{path}'"):
        evaluate(TASKS, [experiment()], path, run=run)
    if how == "moved":
        assert len(read_records(tmp_path / "elsewhere" / "results.jsonl")) == 3


def test_what_is_no_file_of_results(tmp_path):
    (tmp_path / "results.jsonl").symlink_to("/dev/full")
    for call in (lambda: Journal(tmp_path / "results.jsonl"), lambda: read_records(tmp_path / "results.jsonl")):
        with pytest.raises(ValueError, match=r"results.jsonl: expected a file of results"):
            call()


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "[]", "3", '{"runs": []}', '{"runs": {}, "experiments": {}}', '{"runs": [], "experiments": []}',
     '{"runs": [], "experiments": {}} {"runs": []}', "\x00" * 100, "[" * 100_000],
)  # fmt: skip
def test_a_broken_manifest_is_an_error_that_says_how_to_mend_it(tmp_path, text):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    for call in (lambda: read_configs(path), lambda: write_manifest(path, [experiment()], "data")):
        with pytest.raises(ValueError, match=r"manifest.json: the manifest is broken .*; move it away") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert path.read_text() == text
    path.rename(tmp_path / "away")
    write_manifest(path, [experiment()], "data")
    assert len(read_configs(path)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(format=2), "expected format 1, got 2: a newer version wrote it"),
        (lambda manifest: config(manifest).update(of_the_future=1), "unknown fields 'of_the_future'"),
        (lambda manifest: config(manifest).update(method="of_the_future"), "method: expected one of"),
        (lambda manifest: config(manifest).update(n="many"), "n: expected an int"),
        (lambda manifest: next(iter(manifest["experiments"].values())).pop("config"), "config"),
    ],
)
def test_a_newer_manifest(tmp_path, change, message):
    path = tmp_path / "manifest.json"
    write_manifest(path, [experiment()], "data")
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"^{path}: .*{message}.* move it away"):
        read_configs(path)


def config(manifest):
    return next(iter(manifest["experiments"].values()))["config"]


def test_a_newer_record_is_an_error(tmp_path):
    """A field that is not known may be what tells experiments apart."""
    path = tmp_path / "results.jsonl"
    evaluate(TASKS[:2], [experiment()], path, progress=False)
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{json.dumps({**json.loads(lines[1]), 'of_the_future': 1})}\n")
    with pytest.raises(ValueError, match=r"results.jsonl, line 2: unknown fields 'of_the_future': a newer version"):
        read_records(path)
    with pytest.raises(ValueError, match=r"results.jsonl: unknown fields 'of_the_future': a newer version"):
        evaluate(TASKS, [experiment()], path)


def test_another_instruction_set_is_another_evaluation(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    monkeypatch.setattr(module, "instruction_set", lambda: "avx2")
    records = evaluate(TASKS[:2], [experiment()], path, progress=False)
    assert {record.instruction_set for record in records} == {"avx2"}
    monkeypatch.setattr(module, "instruction_set", lambda: "avx512")
    message = r"expected instruction-set level avx512, got .* with avx2; go on with TTS_KERNELS_CPU_ISA=avx2"
    for tasks in (TASKS, TASKS[:2]):  # there is more to do, or not
        with pytest.raises(ValueError, match=message):
            evaluate(tasks, [experiment()], path, progress=False)
    assert read_records(path) == records
    evaluate(TASKS[:2], [experiment(seed=1)], path, progress=False)  # an experiment of its own
    monkeypatch.setattr(module, "instruction_set", lambda: "avx2")
    assert len(evaluate(TASKS, [experiment()], path, progress=False)) == 6


def test_records_from_elsewhere_are_of_one_instruction_set(tmp_path):
    """Workers of a cluster say what they ran with; two levels in one experiment are an error."""

    def run(one, tasks):
        for number, record in enumerate(module.run_here(one, tasks, progress=False)):
            yield replace(record, instruction_set="avx2" if number < 3 else "generic")

    with pytest.raises(ValueError, match=r"expected instruction-set level generic, got results of .* with avx2"):
        evaluate(TASKS, [experiment()], tmp_path / "results.jsonl", run=run)
    assert len(read_records(tmp_path / "results.jsonl")) == 3


def test_records_say_what_tells_their_experiments_apart(tmp_path):
    (record,) = evaluate(TASKS[:1], [experiment(temperature=0.25)], tmp_path / "results.jsonl", progress=False)
    assert record.config["temperature"] == 0.25
    assert record.config["method"] == "best_of_n"
    assert record.instruction_set
    assert record.models == ("policy",)
