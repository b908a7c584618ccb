"""Numbers with units and tolerances, letters, answers in text, and tasks in the published shapes."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tts_search import Step, TextPolicy
from tts_search.domains.grading import grader_of
from tts_search.domains.science import QUESTIONS, ChoiceGrader, NumericGrader, Quantity, answer_in, quantity, unit_of
from tts_search.evaluation.evaluate import Experiment, evaluate
from tts_search.evaluation.tasks import load_tasks
from tts_search.search.config import SearchConfig

GPQA = {
    "Record ID": "rec1",
    "Question": "Which one?",
    "Correct Answer": "the third\n",
    **{f"Incorrect Answer {place}": f"wrong {place}" for place in (1, 2, 3)},
    "Subdomain": "Physics",
}
MMLU_PRO = {
    "question_id": 70,
    "question": "Typical?",
    "options": ["this", "that", *"cdefgh", "ninth", "tenth"],
    "answer": "I",
    "answer_index": 8,
    "category": "law",
}
SCIBENCH = {
    "problem_text": "How much?",
    "answer_latex": " $-1.5$",
    "answer_number": "-1.5",
    "unit": " $\\mathrm{kJ} \\mathrm{~mol}^{-1}$",
    "source": "atkins",
    "problemid": " e1.17 ",
}
CHEMBENCH = {
    "name": "number of peaks",
    "uuid": "u-1",
    "preferred_score": "mae",
    "examples": [{"input": "How many peaks?", "target": "5"}],
}
CHEMBENCH_CHOICE = {
    "name": "choice",
    "preferred_score": "multiple_choice_grade",
    "examples": [{"input": "Which are?", "target_scores": {"this": 1, "that": 0, "both": 1.0}}],
}
OWN = {"problem": "How long?", "answer": "2", "unit": "m", "grader": "numeric", "tolerance": "0.1", "id": 7}


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("E = 1.5 \\times 10^{-3} \\mathrm{~kJ} \\mathrm{~mol}^{-1}", 0.0015, "kJ*mol**-1"),
        ("$1,200$", 1200, ""),
        ("1{,}200", 1200, ""),
        ("−5", -5, ""),
        ("- 5 %", -5, "percent"),
        ("3/4 m", 0.75, "m"),
        ("-\\frac{1}{2}", -0.5, ""),
        ("1.2e-4 mol L-1", 1.2e-4, "mol*L**-1"),
        ("6.02×10^23 mol⁻1", 6.02e23, "mol**-1"),
        ("10^3", 1000, ""),
        ("10**{-2} m²", 0.01, "m**2"),
        ("25 °C", 25, "degC"),
        (".5 \\mu m", 0.5, "um"),
        ("x \\approx 2 m/s^2.", 2, "m/s**2"),
        ("3 J/(mol K)", 3, "J/(mol*K)"),
    ],
)
def test_numbers_and_units(text, value, unit):
    found = quantity(text)
    assert found is not None
    assert found.value == pytest.approx(value, rel=1e-12)
    assert found.unit == unit


@pytest.mark.parametrize("text", ["", "B", "x = y", "-", ".", "1/0", "\\frac{1}{0}", "e5", "$$"])
def test_what_is_no_number(text):
    assert quantity(text) is None


@pytest.mark.parametrize("text", ["9**9**9**9", "m" * 61, "m^9999", "m (", "__import__('os')", "1"])
def test_what_is_no_unit(text):
    assert unit_of(text) == ""


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from(["", "kJ/mol", "m s^{-1}"]))
def test_every_float_is_read_back(value, unit):
    assert quantity(f"{value!r} {unit}") == Quantity(value, unit_of(unit))


@given(st.text(max_size=80))
def test_any_text_is_read(text):
    quantity(text)
    answer_in(text)
    assert ChoiceGrader("A", ["x", "y"]).extract(text) in ("", "A", "B", "A,B")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("[ANSWER]A[/ANSWER] no: [answer] B [/answer] \\boxed{C}", "B"),
        ("The answer is A. Wait, \\boxed{B}", "B"),
        ("The answer is A. No, the answer is: (C).", "(C)."),
        ("**Answer:** D\nso", "D"),
        ("Answer: $B$", "$B$"),
        ("[ANSWER]A", ""),
        ("A", ""),
    ],
)
def test_answers_in_texts(text, answer):
    assert answer_in(text) == answer


@pytest.mark.parametrize(
    ("said", "letters"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("\\text{B}", "B"),
        ("B. two words", "B"),
        ("(B) because of it", "B"),
        ("Two words.", "B"),
        ("C, A", "A,C"),
        ("A and C", "A,C"),
        ("(A), (C)", "A,C"),
        ("A force acts", ""),
        ("D", ""),
        ("none", ""),
    ],
)
def test_letters(said, letters):
    assert ChoiceGrader("A", ["one", "two words", "three"]).extract(f"[ANSWER]{said}[/ANSWER]") == letters


def test_a_choice_is_a_set():
    grader = ChoiceGrader("A,C", ["x", "y", "z"])
    assert grader.correct("C, A")
    assert not grader.correct("A")
    assert not grader.correct("A,B,C")
    assert grader.equal("A,C", "C and A")
    assert not grader.equal("", "")
    with pytest.raises(ValueError, match="answer: expected letters up to C, got 'D'"):
        ChoiceGrader("D", ["x", "y", "z"])


@pytest.mark.parametrize("tolerance", [0.01, 0.05])
@given(gold=st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-3), share=st.floats(-0.1, 0.1))
def test_the_tolerance_is_relative(tolerance, gold, share):
    value = gold * (1 + share)
    right = math.isclose(value, gold, rel_tol=tolerance)
    assert NumericGrader(repr(gold), tolerance=tolerance).correct(repr(value)) == right


def test_votes_are_finer_than_verdicts():
    grader = NumericGrader("100", tolerance=0.05)
    assert grader.equal("100", "100.4")
    assert not grader.equal("100", "101")
    assert grader.correct("101")


def test_units_without_pint(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    grader = NumericGrader("12.25", "kJ/mol")
    assert grader.correct("12.25 kJ/mol")
    assert grader.correct("12.25")
    assert not grader.correct("12250 J/mol")


def test_units_with_pint():
    pytest.importorskip("pint")
    grader = NumericGrader("12.5 kJ/mol")
    assert grader.correct("12500 J mol^-1")
    assert grader.correct("12.5 as computed"), "words are no unit"
    assert not grader.correct("12.5 K")
    assert not grader.correct("12.5 J/mol")
    assert grader.equal("12.5 kJ/mol", "12500 J/mol")
    assert NumericGrader("25 °C").correct("298.15 K")


@pytest.mark.parametrize(
    ("entry", "answer", "grader", "level"),
    [
        (GPQA, None, "choice", "Physics"),
        (MMLU_PRO, "I", "choice", "law"),
        (SCIBENCH, "-1.5", "numeric", "atkins"),
        (CHEMBENCH, "5", "numeric", ""),
        (CHEMBENCH_CHOICE, "A,C", "choice", ""),
        (OWN, "2", "numeric", ""),
    ],
)
def test_published_shapes(tmp_path, entry, answer, grader, level):
    (tmp_path / "t.jsonl").write_text(json.dumps(entry) + "\n")
    (task,) = load_tasks(tmp_path / "t.jsonl")
    assert (task.grader, task.level) == (grader, level)
    assert answer in (None, task.answer)
    assert "[ANSWER]" in task.problem
    judge = task.make_grader()
    assert judge.correct(judge.extract(f"so\n[ANSWER]{task.answer}[/ANSWER]"))
    assert not judge.correct(judge.extract("[ANSWER]B[/ANSWER]" if task.answer != "B" else "[ANSWER]A[/ANSWER]"))


def test_the_options_of_gpqa_are_in_an_order_that_says_nothing():
    task = QUESTIONS.read(GPQA, "0")
    assert sorted(task.details["options"]) == ["the third", "wrong 1", "wrong 2", "wrong 3"]
    assert task.details["options"]["ABCD".index(task.answer)] == "the third"
    golds = {QUESTIONS.read({**GPQA, "Correct Answer": f"right {number}"}, "0").answer for number in range(40)}
    assert golds == set("ABCD")


def test_tolerances_of_the_shapes():
    assert QUESTIONS.read(SCIBENCH, "0").details["tolerance"] == 0.05
    assert QUESTIONS.read(CHEMBENCH, "0").details["tolerance"] == 0.01
    assert QUESTIONS.read(OWN, "0").details == {"unit": "m", "tolerance": 0.1}
    assert "The unit of the answer is $\\mathrm{kJ}" in QUESTIONS.read(SCIBENCH, "0").problem


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**GPQA, "Incorrect Answer 2": None, "Correct Answer": "x"}, "t.jsonl, line 1"),
        ({**MMLU_PRO, "answer": "Z"}, "answer: expected letters up to J, got 'Z'"),
        ({**MMLU_PRO, "options": ["one"]}, "options: expected 2 to 26 of them, got 1"),
        ({**SCIBENCH, "answer_number": "none"}, "answer: expected a number, got 'none'"),
        ({**OWN, "tolerance": 1}, r"tolerance: expected a number in \[0, 1\), got 1"),
        ({"grader": "choice", "problem": "p", "answer": "A"}, "options: expected in a question of science, got none"),
    ],
)
def test_what_is_no_question_of_science(tmp_path, entry, message):
    if "Incorrect Answer 2" in entry:
        del entry["Incorrect Answer 2"]
    (tmp_path / "t.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match=message):
        load_tasks(tmp_path / "t.jsonl")


def test_an_unknown_grader():
    with pytest.raises(ValueError, match="grader: expected one of mathematics, code, choice, numeric, got 'x'"):
        grader_of("x", "", {})


def test_an_evaluation(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(MMLU_PRO) + "\n" + json.dumps(SCIBENCH) + "\n")
    tasks = load_tasks(tmp_path / "t.jsonl")
    said = {tasks[0].problem: ["[ANSWER]I[/ANSWER]", "answer is I."], tasks[1].problem: ["-1.51", "\\boxed{-1.505 kJ}"]}

    def fn(requests):
        return [[Step(said[one.problem][i], True, 3) for i in range(one.num_samples)] for one in requests]

    config = SearchConfig(method="best_of_n", n=2)
    records = evaluate(tasks, [Experiment("e", config, TextPolicy(fn), None, ())], tmp_path / "r.jsonl", progress=False)
    assert [record.correct["majority"] for record in records] == [True, False]
    assert [record.num_correct for record in records] == [2, 0]
