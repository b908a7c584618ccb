"""Evaluation: every finished task is on disk, an interrupted run continues, and tables agree with the records."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from scripted import ScriptedPolicy, ScriptedVerifier
from tts_search import SearchConfig, Step, Thinking
from tts_search.evaluation.evaluate import Experiment, Record, evaluate, read_configs, read_records, write_manifest
from tts_search.evaluation.rows import Row, compare, read_folder
from tts_search.evaluation.statistics import holm, interval, sign_test, wilson
from tts_search.evaluation.tables import accuracy_table, cost_table, format_table
from tts_search.evaluation.tasks import Task

TASKS = [Task(str(i), f"problem {i}", str(i), str(i % 2 + 1)) for i in range(6)]


class Solver(ScriptedPolicy):
    """Answers "problem i" with i, except 3 (wrong) and those in `broken` (which fail)."""

    def __init__(self, broken=()):
        super().__init__(self.solve)
        self.broken = set(broken)

    def solve(self, problem, *_):
        number = problem.split()[1]
        if number in self.broken:
            return Step("", False)
        return Step(f"it is \\boxed{{{'x' if number == '3' else number}}}", True, 4)


def experiment(policy, **options):
    verifier = ScriptedVerifier(lambda _, steps: [0.5] * len(steps))
    return Experiment("test", SearchConfig(n=4, **options), policy, verifier, ("policy", "verifier"))


def solved_problems(policy):
    return sorted(problem.text for problem in policy.ended)


def test_records(tmp_path):
    path = tmp_path / "results" / "results.jsonl"
    records = evaluate(TASKS, [experiment(Solver())], path, progress=False)
    assert [record.task for record in records] == [task.id for task in TASKS]
    assert [record.is_correct("prm_max") for record in records] == [True, True, True, False, True, True]
    assert [record.solved for record in records] == [True, True, True, False, True, True]
    assert records[2].answers["majority"] == "2"
    assert records[2].score == 0.5
    assert (records[2].label, records[2].level, records[2].gold) == ("test", "1", "2")
    assert records[2].stats["rounds"] == 1
    assert sorted(read_records(path), key=lambda one: one.task) == records
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_second_run_runs_nothing(tmp_path):
    path = tmp_path / "results.jsonl"
    first = evaluate(TASKS, [experiment(Solver())], path, progress=False)
    again = Solver()
    assert evaluate(TASKS, [experiment(again)], path, progress=False) == first
    assert again.ended == []


def test_another_config_or_model_is_another_experiment(tmp_path):
    path = tmp_path / "results.jsonl"
    evaluate(TASKS, [experiment(Solver())], path, progress=False)
    other = Solver()
    evaluate(TASKS, [experiment(other, seed=1)], path, progress=False)
    assert len(other.ended) == 6
    assert len(read_records(path)) == 12


def test_errors_are_recorded_and_tried_again(tmp_path):
    path = tmp_path / "results.jsonl"
    records = evaluate(TASKS, [experiment(Solver(broken="24"))], path, progress=False)
    assert [record.task for record in records if record.error] == ["2", "4"]
    assert records[2].error.startswith("problem 2, round 1: policy: ")
    assert not records[2].is_correct("prm_max")
    policy = Solver(broken="4")
    records = evaluate(TASKS, [experiment(policy)], path, progress=False)
    assert solved_problems(policy) == ["problem 2", "problem 4"]
    assert [record.task for record in records if record.error] == ["4"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_loses_no_finished_task(tmp_path, interruption):
    class Interrupted(Solver):
        def solve(self, problem, *rest):
            if problem == "problem 4":
                raise interruption
            return super().solve(problem, *rest)

    path = tmp_path / "results.jsonl"
    with pytest.raises(interruption):
        evaluate(TASKS, [experiment(Interrupted())], path, progress=False, max_in_flight=1)
    assert [record.task for record in read_records(path)] == ["0", "1", "2", "3"]
    policy = Solver()
    assert len(evaluate(TASKS, [experiment(policy)], path, progress=False)) == 6
    assert solved_problems(policy) == ["problem 4", "problem 5"]


def test_a_half_written_line_is_passed_over(tmp_path):
    path = tmp_path / "results.jsonl"
    evaluate(TASKS[:3], [experiment(Solver())], path, progress=False)
    written = path.read_bytes()
    path.write_bytes(written[:-20])  # killed in the middle of a line
    assert len(read_records(path)) == 2
    evaluate(TASKS[:3], [experiment(Solver())], path, progress=False)
    assert [record.task for record in read_records(path)] == ["0", "1", "2"]


def test_foreign_lines_are_passed_over(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('[]\n{}\n{"experiment": 1}\nnonsense\n\n')
    assert read_records(path) == []
    assert read_records(tmp_path / "nothing") == []


def test_ids_must_differ(tmp_path):
    with pytest.raises(ValueError, match=r"^tasks: expected different ids"):
        evaluate([TASKS[0], TASKS[0]], [experiment(Solver())], tmp_path / "results.jsonl")


def test_without_a_verifier_only_majority(tmp_path):
    one = Experiment("alone", SearchConfig(method="best_of_n", n=2), Solver(), None)
    records = evaluate(TASKS, [one], tmp_path / "results.jsonl", progress=False)
    assert records[0].answers == {"majority": "0"}
    assert records[0].is_correct("majority")
    assert records[0].is_correct("prm_max")
    assert records[0].score is None


NESTED = {
    "nested": (1, 2),
    "label": "best-of-{n}",
    "config": SearchConfig(method="best_of_n", n=4),
}


def test_nested_budgets_are_recorded_from_one_sampling(tmp_path):
    path = tmp_path / "results.jsonl"
    policy = Solver()
    one = replace(experiment(policy), **NESTED)
    records = evaluate(TASKS, [one], path, progress=False)
    assert [record.label for record in records[::6]] == ["best-of-1", "best-of-2", "best-of-4"]
    assert [record.n for record in records[::6]] == [1, 2, 4]
    assert [record.num_completions for record in records[::6]] == [1, 2, 4]
    assert [record.stats["policy_tokens"] for record in records[::6]] == [0, 0, 0]  # a scripted policy counts none
    assert len({record.experiment for record in records}) == 3
    assert len(policy.ended) == 6
    again = Solver()
    assert evaluate(TASKS, [replace(one, policy=again)], path, progress=False) == records
    assert again.ended == []
    alone = replace(one, config=replace(one.config, n=2), nested=(), label="best-of-2")
    by_itself = evaluate(TASKS, [alone], tmp_path / "alone.jsonl", progress=False)
    assert [record.seconds is None for record in records[:12]] == [True] * 12
    assert all(record.seconds > 0 for record in records[12:])
    strip = {"stats": {}, "tree": None, "seconds": None}
    assert [replace(record, **strip) for record in by_itself] == [replace(record, **strip) for record in records[6:12]]


def test_what_other_files_hold_is_not_run_again(tmp_path):
    evaluate(TASKS[:4], [experiment(Solver())], tmp_path / "one.jsonl", progress=False)
    policy = Solver()
    records = evaluate(
        TASKS, [experiment(policy)], tmp_path / "two.jsonl", also=[tmp_path / "one.jsonl"], progress=False
    )
    assert len(records) == 6
    assert solved_problems(policy) == ["problem 4", "problem 5"]


def test_another_data_set_with_the_same_ids_is_run(tmp_path):
    path = tmp_path / "results.jsonl"
    evaluate(TASKS, [experiment(Solver())], path, progress=False)
    others = [Task(task.id, f"another {task.answer}", task.answer) for task in TASKS]
    policy = Solver()
    records = evaluate(others, [experiment(policy)], path, progress=False)
    assert [record.problem for record in records] == [task.problem for task in others]
    assert len(policy.ended) == 6
    again = Solver()
    evaluate(TASKS, [experiment(again)], path, progress=False)
    assert again.ended == []
    mended = [replace(task, answer="7") for task in TASKS]  # right answers that have been corrected
    assert not any(record.is_correct("prm_max") for record in evaluate(mended, [experiment(again)], path))
    records = read_folder(tmp_path)
    assert len(records) == len({record.task for record in records}) == 12


def test_an_old_error_hides_no_later_success(tmp_path):
    evaluate(TASKS, [experiment(Solver(broken="24"))], tmp_path / "results-2.jsonl", progress=False)
    evaluate(TASKS, [experiment(Solver())], tmp_path / "results-1.jsonl", progress=False)
    assert not any(record.error for record in read_folder(tmp_path))
    policy = Solver()
    files = [tmp_path / "results-1.jsonl", tmp_path / "results-2.jsonl"]
    evaluate(TASKS, [experiment(policy)], tmp_path / "results-3.jsonl", also=files, progress=False)
    assert policy.ended == []


def test_counts_of_right_completions(tmp_path):
    records = evaluate(TASKS, [experiment(Solver())], tmp_path / "results.jsonl", progress=False)
    assert [record.num_correct for record in records] == [4, 4, 4, 0, 4, 4]
    assert records[0].pass_rate == 1
    assert records[0].pass_estimate == 0.5  # every score is
    assert (records[0].method, records[0].n, records[0].seed) == ("beam_search", 4, 0)
    assert records[0].models == ("policy", "verifier")


def test_manifest(tmp_path):
    path = tmp_path / "manifest.json"
    first = experiment(Solver())
    second = replace(first, config=SearchConfig.compute_optimal_tts("dvts", tree_max_width=4, num_q=2))
    third = replace(first, config=SearchConfig(method="budget_forcing", n=1, thinking=Thinking(max_tokens=9)))
    write_manifest(path, [first], "data.jsonl", seed=3)
    write_manifest(path, [second, third], "data.jsonl")
    assert read_configs(path) == {one.key: one.config for one in (first, second, third)}
    manifest = json.loads(path.read_text())
    assert [run["data"] for run in manifest["runs"]] == ["data.jsonl"] * 2
    assert manifest["runs"][0]["seed"] == 3
    assert manifest["runs"][0]["versions"]["torch"]


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)],
)
def test_wilson(successes, total, low, high):
    assert wilson(successes, total) == pytest.approx((low, high), abs=1e-4)


def test_format_table():
    assert format_table(["name", "n"], [["a", "1"], ["long name", "100"]]) == "\n".join(
        ["name         n", "---------  ---", "a            1", "long name  100"]
    )


def test_tables(tmp_path):
    records = evaluate(TASKS, [experiment(Solver(broken="5"))], tmp_path / "results.jsonl", progress=False)
    lines = accuracy_table([Row("mine", records)]).splitlines()
    assert lines[0].split() == ["accuracy", "%", "(95%", "interval)", "level", "1", "level", "2", "all"]
    assert lines[2].split() == ["mine", "100.0", "(44-100)", "33.3", "(6-79)", "66.7", "(30-90)"]
    timed = [replace(record, seconds=1.25) for record in records]
    lines = cost_table([Row("mine", timed)]).splitlines()
    assert lines[2].split() == ["mine", "0", "16", *"00000", "-", "1.25"]


def test_interval_of_one_trial_for_each_task_is_wilsons():
    assert interval([1.0] * 5 + [0.0] * 5, 10) == pytest.approx(wilson(5, 10))
    assert interval([1.0] * 10, 30) == wilson(10, 10)  # three seeds of which each was right: still ten tasks
    assert interval([], 0) == (0.0, 1.0)


def test_interval_of_trials_that_do_not_depend_on_their_task():
    """If tasks are all alike, every trial counts."""
    assert interval([0.5] * 10, 20) == pytest.approx(wilson(10, 20))


def test_interval_covers_as_often_as_it_says():
    """Five trials of each of 60 tasks, whose chances differ: the trials of a task are not 5 of their own."""
    rng = random.Random(0)
    hits = naive = 0
    for _ in range(600):
        chances = [rng.betavariate(0.4, 0.6) for _ in range(60)]
        shares = [sum(rng.random() < chance for _ in range(5)) / 5 for chance in chances]
        low, high = interval(shares, 300)
        hits += low <= 0.4 <= high
        low, high = wilson(sum(shares) * 5, 300)
        naive += low <= 0.4 <= high
    assert 0.93 <= hits / 600 <= 0.98
    assert naive / 600 < 0.85


def test_sign_test():
    assert sign_test([1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1]) == pytest.approx(2 / 2**6)
    assert sign_test([1, 0], [0, 1]) == 1.0
    assert sign_test([1], [1]) == 1.0
    assert sign_test([0.5] * 3, [0.2] * 3) == 0.25  # shares of several seeds


def test_compare():
    first = Row("first", [evaluate_record(str(i), True) for i in range(8)], "majority")
    second = Row("second", [evaluate_record(str(i), i == 0) for i in range(9)], "majority")  # one task more
    difference, p = compare(first, second)
    assert difference == pytest.approx(7 / 8)
    assert p == pytest.approx(2 / 2**7)
    assert compare(second, first)[0] == -difference


def test_holm():
    assert holm([]) == []
    assert holm([0.04]) == [0.04]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979 by hand
    assert holm([0.6, 0.6]) == [1.0, 1.0]


def evaluate_record(task, right):
    return Record("e", task, "row", "", "", "", correct={"majority": bool(right)})
