"""The study: its plan, the sampling that verifiers share, and a tiny run on the demo models."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import ScriptedPolicy, ScriptedVerifier
from tts_search import SearchConfig, SearchError, Step, TextPolicy, TextVerifier, Thinking, equivalent, search
from tts_search.evaluation.evaluate import Experiment, read_configs, read_records, run_here
from tts_search.lab.study import Grid, Memo, cells, part_of, plan_as_text, run_study, share_out
from tts_search.search.config import METHODS
from tts_search.search.protocol import Usage

TINY = Grid(problems=1, levels=(1, 2), budgets=(1, 4), largest=8, policies=("policy-0.1m", "policy-0.6m"), seeds=(0, 1))


def test_cells():
    plan = cells(Grid())
    assert len(set(plan)) == len(plan)
    sampled = [cell for cell in plan if cell.method == "best_of_n" and not cell.greedy]
    assert [(cell.policy, cell.n, cell.nested) for cell in sampled] == [
        ("policy-0.1m", 256, (1, 4, 16, 64)),
        ("policy-0.6m", 64, (1, 4, 16, 64)),
        ("policy-3m", 64, (1, 4, 16, 64)),
    ] * 3
    assert {cell.seed for cell in plan} == {0, 1, 2}
    assert {cell.seed for cell in plan if cell.greedy} == {0}
    assert {len(cell.verifiers) for cell in sampled} == {2}
    assert [cell.policy for cell in plan if cell.n == 256] == ["policy-0.1m"] * 9
    assert sum(cell.method == "dvts" for cell in plan) == 3 * (3 * 2 * 3 + 1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_share_the_grid_out(count):
    parts = [share_out(Grid(), f"{index}/{count}") for index in range(1, count + 1)]
    together = [cell for part in parts for cell in part]
    assert len(together) == len(set(together)) == len(cells(Grid()))


@pytest.mark.parametrize("part", ["", "0/2", "3/2", "1", "a/b", "1/2/3"])
def test_what_is_no_part(part):
    with pytest.raises(SearchError, match=r"^part: expected I/K"):
        share_out(Grid(), part)


def test_memo_gives_the_same_samples_again():
    def step(problem, _, __, seed, ___):
        if problem == "broken":
            raise ValueError("no")
        return Step(f"answer {seed}", True, 3)

    policy = ScriptedPolicy(step)
    memo = Memo(policy)
    verifier = ScriptedVerifier(lambda _, steps: [0.5] * len(steps))
    config = SearchConfig(method="best_of_n", n=4)
    first = search(["a", "b"], memo, verifier, config, progress=False)
    calls = len(policy.calls)
    again = search(["b", "a"], memo, verifier, config, progress=False)
    assert len(policy.calls) == calls
    assert [one.completions for one in again] == [one.completions for one in first[::-1]]
    fewer = search(["a"], memo, verifier, SearchConfig(method="best_of_n", n=2), progress=False)
    assert fewer[0].completions == first[0].completions[:2]
    assert len(policy.calls) == calls
    search(["a"], memo, verifier, SearchConfig(method="best_of_n", n=2, temperature=0.1), progress=False)
    assert len(policy.calls) == calls + 1
    with pytest.raises(SearchError, match="no"):
        search(["broken"], memo, verifier, config, progress=False)
    assert not policy.problems


def test_memo_counts_what_was_asked_for():
    memo = Memo(TextPolicy(lambda requests: [[Step("a", True, 3)] * one.num_samples for one in requests]))
    verifier = TextVerifier(lambda branches: [[0.5] * len(steps) for _, steps in branches])
    tokens = [
        search(["p"], memo, verifier, SearchConfig(method="best_of_n", n=n), progress=False)[0].stats.policy_tokens
        for n in (4, 4, 2)
    ]
    assert tokens == [12, 12, 6]


def test_a_part_of_what_was_sampled_costs_its_share():
    usage = Usage(100, 7, 3.0, 50, 60, 4, 2)
    assert part_of(usage, 0.5) == Usage(50, 7, 1.5, 25, 30, 2, 1)
    assert part_of(usage, 1.0) == usage


def test_a_tiny_study(tmp_path):
    pytest.importorskip("transformers")
    records = [record for part in ("1/2", "2/2") for record in run_study(TINY, tmp_path, part=part, progress=False)]
    assert not [record.error for record in records if record.error]
    per_policy = 2 * 2 + 2 * 2  # nested best-of-N and two searches, for two verifiers
    # two problems; for each of two seeds the largest budget of three methods; greedy once
    assert len(records) == 2 * (2 * (2 * per_policy + 3) + 2)
    sizes = {(record.method, record.n) for record in records}
    assert sizes == {
        ("best_of_n", 1),
        ("best_of_n", 4),
        ("best_of_n", 8),
        ("beam_search", 4),
        ("beam_search", 8),
        ("dvts", 4),
        ("dvts", 8),
    }
    shared = {}
    for record in records:
        if record.method == "best_of_n" and record.n == 4:
            shared.setdefault((record.models[0], record.task, record.seed), set()).add(
                (record.num_correct, record.answers["majority"])
            )
    assert len(shared) == 8
    assert all(len(outcomes) == 1 for outcomes in shared.values())  # both verifiers read the same samples
    written = [record for path in tmp_path.glob("results-*.jsonl") for record in read_records(path)]
    assert len(written) == len(records)
    configs = {key for path in tmp_path.glob("manifest-*.json") for key in read_configs(path)}
    assert configs
    sizes_before = {path: path.stat().st_size for path in tmp_path.glob("results-*.jsonl")}
    assert len(run_study(TINY, tmp_path, part="1/1", progress=False)) == len(records)  # all is there: nothing is run
    assert {path: path.stat().st_size for path in tmp_path.glob("results-*.jsonl")} == sizes_before


def test_plan_as_text():
    pytest.importorskip("tokenizers")
    lines = plan_as_text(TINY).splitlines()
    assert len(lines) == 2 + len(cells(TINY)) + 1
    assert lines[-1].split()[0] == "all"


def test_every_method_on_the_demo_models():
    """Whatever a method asks for, the branches of a forked cache answer as text that is read anew would."""
    pytest.importorskip("transformers")
    from tts_search.lab.demo import CONFIG, load_models, make_tasks

    models = load_models()
    policy, verifier = models.policies["policy-0.6m"], models.verifiers["prm-strong"]
    tasks = make_tasks((2, 3), 2, 0)
    for method in METHODS:
        config = CONFIG.with_method(method, n=8)
        if method == "budget_forcing":
            config = replace(config, thinking=Thinking(end=" = ", min_tokens=5, max_extensions=1, extend=" "))
        problems = [task.problem for task in tasks]
        # Without the prefix cache: what a method costs is its own, not what an earlier one has left.
        results = search(problems, policy, verifier, config, progress=False, prefix_cache=False)
        assert sum(equivalent(task.answer, one.answer()) for task, one in zip(tasks, results, strict=True)) >= (
            0 if method == "budget_forcing" else 2
        )
        for result in results:
            assert result.best.finished
            assert result.stats.flops_policy > 0
            assert result.stats.flops_verifier > 0


def test_what_an_experiment_costs_does_not_depend_on_those_before():
    pytest.importorskip("transformers")
    from tts_search.lab.demo import CONFIG, load_models, make_tasks

    models = load_models()
    policy, verifier = models.policies["policy-0.1m"], models.verifiers["prm-strong"]
    one = Experiment("one", CONFIG.with_method("beam_search", n=4), policy, verifier, ("policy", "verifier"))
    costs = []
    for _ in range(2):
        (record,) = run_here(one, make_tasks((2,), 1, 0), progress=False)
        costs.append((record.stats["flops_policy"], record.stats["flops_verifier"]))
    assert costs[0] == costs[1]
    assert min(costs[0]) > 0
