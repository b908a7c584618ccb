"""Strategies: the paper's rules, rules fitted to an evaluation, and searching with both; costs of models."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import ScriptedPolicy, ScriptedVerifier
from tts_search import ConfigError, SearchConfig, SearchError, SearchStats, Step, search, search_iter
from tts_search.evaluation.evaluate import Record
from tts_search.evaluation.fitting import _isotonic, fit
from tts_search.lab.flops import inference_flops, pretraining_flops, total_flops
from tts_search.strategy import (
    BINS,
    RULES,
    Choice,
    FittedStrategy,
    Rule,
    RuleStrategy,
    difficulty_bin,
    estimate_pass_rate,
)

# Policies, parameters, tokens of training; what table 4 of arXiv 2502.06703 says: pretraining, inference, total FLOPs.
TABLE_4 = [
    ("Llama-3.2-3B", 3e9, 9e12, 1.62e23, 3.07e17, 1.62e23),
    ("Llama-3.1-405B", 405e9, 15e12, 3.65e25, 4.25e17, 3.65e25),
    ("DeepSeek-R1-Distill-7B", 7e9, 18e12, 7.56e23, 8.15e17, 7.56e23),
    ("DeepSeek-R1", 671e9, 14.8e12, 5.96e25, 4.03e18, 5.96e25),
]
TOKENS_A_PROBLEM = {
    "Llama-3.2-3B": 102_333,
    "Llama-3.1-405B": 1_049,
    "DeepSeek-R1-Distill-7B": 116_429,
    "DeepSeek-R1": 6_006,
}


@pytest.mark.parametrize(("name", "parameters", "tokens", "pretraining", "inference", "total"), TABLE_4)
def test_table_4(name, parameters, tokens, pretraining, inference, total):
    assert pretraining_flops(parameters, tokens) == pytest.approx(pretraining, rel=0.005)
    used = 500 * TOKENS_A_PROBLEM[name]  # on the 500 problems of MATH-500
    assert inference_flops(parameters, used) == pytest.approx(inference, rel=0.005)
    assert total_flops(parameters, tokens, used) == pytest.approx(total, rel=0.005)


@pytest.mark.parametrize(
    ("rate", "name"), [(1, "easy"), (0.5, "easy"), (0.4999, "medium"), (0.1, "medium"), (0.0999, "hard"), (0, "hard")]
)
def test_bins(rate, name):
    assert difficulty_bin(rate) == name


@pytest.mark.parametrize(
    ("facts", "methods"),
    [
        ({"parameters": 3e9, "dataset": "MATH-500"}, ("beam_search", "beam_search", "beam_search")),
        ({"parameters": 7e9, "dataset": "MATH-500"}, ("dvts", "dvts", "beam_search")),
        ({"parameters": 14e9, "dataset": "MATH-500"}, ("dvts", "dvts", "beam_search")),
        ({"parameters": 72e9, "dataset": "MATH-500"}, ("best_of_n",) * 3),
        ({"parameters": 7e9, "dataset": "AIME24"}, ("dvts",) * 3),
        ({"parameters": 14e9, "dataset": "AIME24"}, ("best_of_n",) * 3),
        ({"parameters": 1e9, "dataset": "MATH-500", "verifier": "math-shepherd"}, ("best_of_n",) * 3),
        ({"parameters": 1e9, "dataset": "MATH-500", "verifier": "skywork"}, ("beam_search",) * 3),
        ({"parameters": 7e9, "dataset": "MATH-500", "thinks": True}, ("best_of_n",) * 3),
        ({"parameters": 1e9}, ("best_of_n", "beam_search", "beam_search")),
        ({"parameters": 72e9}, ("best_of_n",) * 3),
    ],
)
def test_rules_of_the_paper(facts, methods):
    strategy = RuleStrategy(n=64, **facts)
    choices = [strategy.choose({"easy": 0.9, "medium": 0.3, "hard": 0.01}[name]) for name in BINS]
    assert tuple(choice.config.method for choice in choices) == methods
    assert all(choice.config.n == 64 for choice in choices)
    assert {choice.vote for choice in choices} == {"majority" if facts.get("thinks") else "prm_max"}
    assert (strategy.probe is not None) == (len({strategy.rule(name) for name in BINS}) > 1)


def test_every_rule_has_a_source():
    assert all(rule.source for rule in RULES)
    with pytest.raises(ConfigError, match=r"^rules: expected one that holds for a hard problem"):
        RuleStrategy(1e9, rules=(Rule("dvts", "me", bins=("easy",)),)).choose(0.0)


# Searching by a strategy: a policy that is right at its first step in easy problems, and in others seldom.

PROBLEMS = ["easy 1", "hard 1", "easy 2", "hard 2", "broken"]


def sample(problem, steps, _, seed, params):
    if problem == "broken":
        return Step("", False)
    good = random.Random(seed).random() < (0.95 if "easy" in problem else 0.05)
    answer = f"{'good' if good else 'bad'} \\boxed{{{1 if good else seed}}}"
    if params.delimiter is None or steps:
        return Step(answer, True, 5, reason="eos")
    return Step("step\n\n", False, 2)


def judge(_, steps):
    return [0.9 if "good" in step else 0.5 if "step" in step else 0.0 for step in steps]


def test_search_by_rules():
    strategy = RuleStrategy(1e9, n=8, base=SearchConfig(seed=3), samples=4)
    outcomes = dict(search_iter(PROBLEMS, ScriptedPolicy(sample), ScriptedVerifier(judge), strategy, progress=False))
    methods = [outcomes[index].config.method for index in range(4)]
    assert methods == ["best_of_n", "beam_search", "best_of_n", "beam_search"]
    assert [outcomes[index].problem for index in range(4)] == PROBLEMS[:4]
    assert isinstance(outcomes[4], SearchError)
    assert outcomes[4].problem == 4
    assert outcomes[0].stats.branches == 4 + 8  # the estimate's samples are part of the cost
    assert outcomes[0].answer() == outcomes[0].answer("prm_max") == "1"


def test_search_without_a_probe():
    strategy = RuleStrategy(72e9, n=4, dataset="MATH-500")
    policy = ScriptedPolicy(sample)
    results = search(PROBLEMS[:2], policy, ScriptedVerifier(judge), strategy, progress=False)
    assert [result.stats.branches for result in results] == [4, 4]


def test_a_strategys_vote_is_the_default():
    strategy = RuleStrategy(1e9, n=4, thinks=True)
    (result,) = search(["easy 1"], ScriptedPolicy(sample), ScriptedVerifier(judge), strategy, progress=False)
    assert result.vote == "majority"
    assert result.answer() == result.answer("majority")


def test_estimates():
    verifier = ScriptedVerifier(lambda _, steps: [0.25] * len(steps))
    config = SearchConfig(method="best_of_n", n=4)
    (result,) = search(["easy 1"], ScriptedPolicy(sample), verifier, config, progress=False)
    assert estimate_pass_rate(result) == 0.25
    (result,) = search(["easy 1"], ScriptedPolicy(sample), None, config, progress=False)
    agreeing = sum(one.answer == result.answer("majority") for one in result.completions)
    assert estimate_pass_rate(result) == agreeing / 4
    cut = lambda *_: Step("on and on", False, 9, reason="length")  # noqa: E731
    (result,) = search(["easy 1"], ScriptedPolicy(cut), verifier, config, progress=False)
    assert estimate_pass_rate(result) == 0


# Fitting: a world in which best-of-N solves easy problems, beam search the others.

CONFIGS = {
    f"{method}/{n}": SearchConfig(method=method, n=n, seed=5)
    for method in ("best_of_n", "beam_search")
    for n in (4, 16)
}


def world(count=60, swap=None):
    records = []
    for number in range(count):
        rate = (0.9, 0.3, 0.02)[number % 3]
        for key, config in CONFIGS.items():
            good = (config.method == "best_of_n") == (rate >= 0.5)
            good = good and (rate > 0.1 or config.n == 16)
            if swap == number:
                good = not good
            correct = {"majority": False, "prm_max": good, "prm_last_vote": good and number % 6 == 0}
            record = Record(key, str(number), key, "", "", "", config.method, config.n, 5, config=config.as_dict())
            record = replace(record, correct=correct)
            records.append(replace(record, num_completions=100, num_correct=round(100 * rate), pass_estimate=rate / 2))
    return records


def test_fit_learns_the_best_for_each_bin_and_budget():
    strategy = fit(world(), budget=16, probe=CONFIGS["best_of_n/4"])
    methods = {place: choice.config.method for place, choice in strategy.table.items()}
    assert methods["easy", 16] == methods["easy", 4] == "best_of_n"
    assert methods["medium", 16] == methods["medium", 4] == methods["hard", 16] == "beam_search"
    assert {choice.vote for choice in strategy.table.values() if choice.config.n == 16} == {"prm_max"}
    assert strategy.accuracy == {4: pytest.approx(2 / 3), 16: 1.0}
    assert strategy.fixed[16] == pytest.approx(2 / 3)
    assert [difficulty_bin(strategy.calibrated(rate / 2)) for rate in (0.9, 0.3, 0.02)] == ["easy", "medium", "hard"]
    assert strategy.choose(0.9).config == replace(CONFIGS["best_of_n/16"], seed=0)
    assert strategy.choose(None).config.method == "beam_search"


def test_no_problem_chooses_its_own_strategy():
    """One problem on which all is turned round: it may not help itself, and its held-out accuracy is 0."""
    good, turned = (fit(world(swap=swap), budget=16).accuracy[16] for swap in (None, 7))
    assert good == 1.0
    assert turned == pytest.approx(59 / 60)
    alone = fit(world(count=1), budget=16)  # nothing to learn from but itself
    assert alone.table["easy", 16].config.method == "best_of_n"


def test_the_bin_of_a_held_out_problem_is_estimated():
    """Estimates that tell nothing: that the right answers tell is of no use, and all get one search."""
    records = [replace(record, pass_estimate=0.5) for record in world()]
    known = fit(records, budget=16)
    estimated = fit(records, budget=16, probe=CONFIGS["best_of_n/4"])
    assert known.accuracy[16] == 1.0
    assert estimated.accuracy[16] == estimated.fixed[16] == pytest.approx(2 / 3)
    assert estimated.table == known.table


def test_fit_needs_two_folds_and_the_probe():
    with pytest.raises(ValueError, match=r"^folds: expected an int >= 2, got 1"):
        fit(world(), budget=16, folds=1)
    with pytest.raises(ValueError, match=r"^probe: expected a best-of-N among the experiments"):
        fit(world(), budget=16, probe=SearchConfig(method="best_of_n", n=5))


def test_pass_rates_may_be_given():
    strategy = fit(world(), budget=16, pass_rates={str(number): 1.0 for number in range(60)})
    assert strategy.choose(0.0).config.method == "beam_search"  # no hard problem known: the best of all


def test_fit_needs_that_budget():
    with pytest.raises(ValueError, match=r"^budget: expected one of \[4, 16\]"):
        fit(world(), budget=64)
    with pytest.raises(ValueError, match=r"^budget: expected one of \[\]"):
        fit([], budget=4)


def test_search_by_a_fitted_strategy():
    table = {(name, 4): Choice(SearchConfig(method="dvts" if name == "hard" else "best_of_n", n=4)) for name in BINS}
    strategy = FittedStrategy(table, 4, probe=SearchConfig(method="best_of_n", n=4))
    results = search(PROBLEMS[:2], ScriptedPolicy(sample), ScriptedVerifier(judge), strategy, progress=False)
    assert [result.config.method for result in results] == ["best_of_n", "dvts"]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_isotonic_regression(points):
    estimates = {str(number): estimate for number, (estimate, _) in enumerate(points)}
    rates = {str(number): rate for number, (_, rate) in enumerate(points)}
    steps = _isotonic(estimates, rates)
    values = [value for _, value in steps]
    assert values == sorted(values)
    assert len(set(values)) == len(values)
    assert [at for at, _ in steps] == sorted(at for at, _ in steps)
    strategy = FittedStrategy({}, 1, calibration=steps)
    fitted = [strategy.calibrated(estimate) for estimate, _ in points]
    assert math.fsum(fitted) == pytest.approx(math.fsum(rates.values()), abs=1e-6)  # residuals of means


def test_equal_estimates_have_the_mean_of_their_rates():
    assert _isotonic({"a": 0.5, "b": 0.5, "c": 0.5}, {"a": 0.0, "b": 0.3, "c": 0.9}) == ((0.5, pytest.approx(0.4)),)


def test_costs_add_up():
    one = SearchStats(wall_s=1, rounds=1, policy_tokens=5, peak_unique_kv_tokens=7, flops_policy=2.0)
    two = SearchStats(wall_s=2, rounds=3, policy_tokens=1, peak_unique_kv_tokens=3, flops_policy=3.0)
    both = one + two
    assert (both.wall_s, both.rounds, both.policy_tokens, both.flops_policy) == (3, 4, 6, 5.0)
    assert both.peak_unique_kv_tokens == 7


def test_logical_tokens_count_every_step_anew():
    def step(_, steps, __, ___, ____):
        return Step(f"{len(steps)}\n\n", len(steps) == 2, 10)

    config = SearchConfig(n=2, expand=2)
    verifier = ScriptedVerifier(lambda _, steps: [0.5] * len(steps))
    (result,) = search(["p"], ScriptedPolicy(step), verifier, config, progress=False)
    assert result.stats.policy_logical_tokens == 2 * (10 + 20 + 30)


@pytest.mark.parametrize(
    ("strategy", "verifier", "message"),
    [
        (RuleStrategy(1e9, n=4), None, "verifier: beam_search needs one"),
        (RuleStrategy(7e9, n=6, dataset="MATH-500"), ScriptedVerifier(judge), "n: expected a multiple of expand"),
    ],
)
def test_what_a_strategy_may_choose_is_checked_before_any_probe(strategy, verifier, message):
    policy = ScriptedPolicy(sample)
    with pytest.raises(SearchError, match=message):
        search_iter(PROBLEMS, policy, verifier, strategy, progress=False)
    assert policy.calls == []
