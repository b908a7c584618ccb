"""The study on HumanEval: samples that survive a crash, rules of choice against all subsets, tables of a tiny task."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tts_search import SearchConfig, Step, StepParams, TextPolicy, search
from tts_search.domains.code import Level, Sandbox
from tts_search.domains.code.tasks import Asserts, Call, CodeTask, repeated
from tts_search.lab.humaneval import RULES, Judged, expected, run_code_study, table_as_text
from tts_search.lab.samples import draw, read_samples

PARAMS = StepParams(delimiter=None, max_tokens=9)
RIGHT = "```python\ndef double(x):\n    return 2 * x\n```"
SHOWN = "```python\ndef double(x):\n    return 4\n```"
WRONG = "```python\ndef double(x):\n    return x\n```"
TASK = CodeTask("t", "Double.", "double", (Call((2,), 4),), (Asserts("assert double(2) == 4\nassert double(3) == 6"),))

needs_sandbox = pytest.mark.skipif(
    not sys.platform.startswith("linux") or Sandbox().level() < Level.FULL, reason="no sandbox of the full level"
)


def policy(calls=None):
    """Answers say their seed, so that draws can be told apart."""

    def fn(requests):
        if calls is not None:
            calls.extend((request.problem, len(request.seeds)) for request in requests)
        return [
            [Step(f"{request.problem} {seed}", True, 3, -1.0, "eos") for seed in request.seeds] for request in requests
        ]

    return TextPolicy(fn)


def test_samples_are_those_of_best_of_n(tmp_path):
    drawn = draw(policy(), {"x": "p", "y": "q"}, tmp_path / "s.jsonl", n=8, each=4, params=PARAMS, seed=3)
    assert [(one.id, one.first) for one in drawn] == [("x", 0), ("x", 4), ("y", 0), ("y", 4)]
    config = SearchConfig(method="best_of_n", n=8, seed=3)
    result = search(["p"], policy(), None, config, progress=False)[0]
    assert [step.text for one in drawn[:2] for step in one.steps] == [one.text for one in result.completions]


def test_rounds_go_over_all_problems(tmp_path):
    draw(policy(), {"x": "p", "y": "q"}, tmp_path / "s.jsonl", n=8, each=4, params=PARAMS, in_flight=1)
    assert [(one.id, one.first) for one in read_samples(tmp_path / "s.jsonl")] == [
        ("x", 0),
        ("y", 0),
        ("x", 4),
        ("y", 4),
    ]


def test_drawing_goes_on_behind_half_a_line(tmp_path):
    path, problems = tmp_path / "s.jsonl", {"x": "p", "y": "q"}
    whole = draw(policy(), problems, path, n=8, each=4, params=PARAMS, in_flight=1)
    text = path.read_text()
    path.write_text(text[: text.rindex('"steps"')])
    calls = []
    again = draw(policy(calls), problems, path, n=8, each=4, params=PARAMS)
    assert calls == [("q", 4)]
    assert [one.steps for one in again] == [one.steps for one in whole]


@pytest.mark.parametrize("change", [{"seed": 1}, {"about": "other"}, {"params": StepParams(delimiter=None)}])
def test_samples_drawn_in_another_way_are_refused(tmp_path, change):
    draw(policy(), {"x": "p"}, tmp_path / "s.jsonl", n=4, each=4, params=PARAMS)
    with pytest.raises(ValueError, match=f"drawn in the same way, got another {next(iter(change))}"):
        draw(policy(), {"x": "p"}, tmp_path / "s.jsonl", n=4, each=4, **{"params": PARAMS, **change})


def test_n_is_a_multiple(tmp_path):
    with pytest.raises(ValueError, match="n: expected a multiple of 16, got 20"):
        draw(policy(), {"x": "p"}, tmp_path / "s.jsonl", n=20, params=PARAMS)


completions = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["", "a", "b"]), st.integers(-3, 0)),
    min_size=1,
    max_size=7,
)


def brute(rows, n, choose):
    """The mean over all orders of subsets of whether the chosen one is right; the first of equals is chosen."""
    orders = list(itertools.permutations(rows, n))
    return sum(bool(chosen and chosen[0]) for chosen in map(choose, orders)) / len(orders)


def majority(rows):
    voters = [row[2] for row in rows if row[2]]
    if not voters:
        return None
    winner = max(voters, key=voters.count)
    return next(row for row in rows if row[2] == winner)


@given(completions, st.integers(1, 4))
@settings(max_examples=60)
def test_rules_are_means_over_all_subsets(rows, n):
    n = min(n, len(rows))
    right, public, behaviour, logprob = zip(*rows, strict=True)
    judged = [Judged("t", 0, public, behaviour, right, 0.0, 0.0)]
    found = expected(judged, [Step("", True, 2, float(value)) for value in logprob], n)
    rules = (
        lambda order: order[0],
        lambda order: max(order, key=lambda row: row[3]),
        majority,
        lambda order: max(order, key=lambda row: row[1]),
        lambda order: max(order, key=lambda row: row[0]),
    )
    for name, rule in zip(RULES, rules, strict=True):
        if name == "majority of behaviour" and len({row[2] for row in rows}) > 2:
            continue  # equal classes of different shares: the first one of an order, not any one
        assert found[name] == pytest.approx(brute(rows, n, rule)), name


def test_repeated_assertions():
    assert repeated(TASK) == (1, 2)
    check = (
        "def check(candidate):\n    assert abs(candidate(2) - 4) < 1\n    assert candidate([1, 'a']) == candidate(2)\n"
    )
    assert repeated(CodeTask("t", "", "f", (Call((2,), 4),), (Asserts(check), Call((3,), 1)))) == (2, 3)
    assert repeated(CodeTask("t", "", "f", (), (Asserts(check),))) == (0, 2)


@needs_sandbox
def test_a_tiny_study(tmp_path):
    texts = [RIGHT, SHOWN, WRONG, "nothing"]

    def fn(requests):
        return [[Step(texts[i % 4], True, 3, -i % 4 - 1.0) for i, _ in enumerate(r.seeds)] for r in requests]

    found = run_code_study([TASK], TextPolicy(fn), tmp_path, n=16)
    row = found["accuracy"]["16"]
    assert row["random"].startswith("25.0 ")
    assert row["any right (pass@n)"].startswith("100.0 ")
    assert row["public tests"].startswith("50.0 "), "what passes them is right half of the time"
    assert found["tests"]["HumanEval"]["of them repeat an example"] == 1
    assert "accuracy without repeats" not in found
    assert "public tests" in table_as_text(found["accuracy"])
    judged = (tmp_path / "judged.jsonl").read_text()
    assert run_code_study([TASK], TextPolicy(fn), tmp_path, n=16) == found, "nothing is done again"
    assert (tmp_path / "judged.jsonl").read_text() == judged
