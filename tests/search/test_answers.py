from __future__ import annotations

import itertools
import json
import math
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tts_search import VOTES, Completion, boxed, equivalent, vote
from tts_search.domains import mathematics
from tts_search.domains.mathematics import MathVerify, work
from tts_search.search.answers import Equivalence, canonical_form, same
from tts_search.search.voting import aggregate


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"The answer is \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ \left\{ 1, 2 \right\} }", r"\left\{ 1, 2 \right\}"),
        (r"\boxed {7}", "7"),
        (r"$\boxed 12.$", "12"),
        (r"\fbox{3}", "3"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"} \boxed{8}", "8"),
        (r"\boxed{\boxed{9}}", "9"),
        ("no box", ""),
        ("", ""),
        (r"\boxed{}", ""),
        (r"\boxedx{1}", ""),
        (r"\boxed{\begin{pmatrix} 1 \\{2} \end{pmatrix}}", r"\begin{pmatrix} 1 \\{2} \end{pmatrix}"),
        (r"\boxed{x=1 \\{} y=2 \\}", r"x=1 \\{} y=2 \\"),
        (r"\boxed{x=1 \\ y=2 \\} and {", r"x=1 \\ y=2 \\"),
        (r"\boxed{1 \\\{2\} \\{3}}", r"1 \\\{2\} \\{3}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.} }", r"\left\{1\right."),
        ("\\boxed{1\\", ""),
    ],
)
def test_boxed(text, answer):
    assert boxed(text) == answer


def test_boxed_takes_linear_time():
    began = time.perf_counter()
    assert boxed(r"\boxed{" * 20_000) == ""
    assert time.perf_counter() - began < 10  # a scan for each box would take minutes


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "42"),
        ("42", " 42 "),
        ("42", "42.0"),
        ("1000", "1,000"),
        ("42", "$42$"),
        (r"\frac{1}{2}", r"\dfrac{1}{2}"),
        (r"(1,2)", r"\left( 1, 2 \right)"),
        ("90", r"90^\circ"),
        ("-7", "-07"),
        ("1000", r"1\,000"),
        ("1000", "1{,}000"),
        ("1234567", "1 234 567"),
        ("5", r"\$5"),
        (r"75\%", "75%"),
        ("12 cm", r"12\text{ cm}"),
        (r"2\pi r", r"2 \pi r"),
        (r"a \\ b", r"a\\b"),
    ],
)
def test_equivalent_by_text_and_number(gold, answer, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    assert equivalent(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"), [("42", "43"), ("42", ""), ("42", " "), ("1.5", "15"), ("x", "y"), ("42", "42a")]
)
def test_not_equivalent(gold, answer):
    assert not equivalent(gold, answer)


def test_equivalent_by_math_verify():
    pytest.importorskip("math_verify")
    assert equivalent(r"\frac{1}{2}", "0.5")
    assert equivalent(r"\frac{\sqrt{8}}{2}", r"\sqrt{2}")
    assert equivalent("2x + 2", "2(x+1)")
    assert not equivalent("2x + 2", "2x + 3")


@pytest.mark.parametrize(
    "answer", ["9^{9^{9^{9}}}", "9^{9^{9}}", "1000000!", "(" * 10_000, "\\sum_{k=1}^{10^{12}} k^k"]
)
def test_hostile_answers_do_not_hang(answer):
    pytest.importorskip("math_verify")
    judge = MathVerify(limit_s=0.5)  # of CPU time; a judge that hangs runs into the test's own limit
    assert not judge.equal("1/3", answer)
    assert judge.equal("1/3", "0.333333") in (True, False)  # the next answer is judged again


def test_other_threads_compare_as_well():
    pytest.importorskip("math_verify")
    result = []
    thread = threading.Thread(target=lambda: result.append(equivalent("a+b", "b+a")))
    thread.start()
    thread.join()
    assert result == [True]


def test_an_interruption_leaves_no_reply_for_the_next_question(monkeypatch):
    pytest.importorskip("math_verify")
    judge = MathVerify(limit_s=5)
    assert judge.equal("x", "x") is True
    worker = judge._worker

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker, "stdout", Interrupted())
        patch.setattr(worker, "communicate", worker.wait)
        with pytest.raises(KeyboardInterrupt):
            judge.equal("a+b", "b+a")
    assert judge.equal("2x + 2", "2x + 3") is False  # not the verdict on a+b
    assert judge.equal("x", "x") is True


def test_a_worker_that_was_killed_is_replaced():
    pytest.importorskip("math_verify")
    judge = MathVerify(limit_s=5)
    assert judge.equal("x", "x") is True
    judge._worker.kill()
    judge._worker.wait()
    assert judge.equal("a+b", "b+a") is True


def test_without_math_verify_nothing_can_be_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert MathVerify(limit_s=1).equal("a+b", "b+a") is None


def test_classes_keep_the_first_spelling():
    same = Equivalence(equivalent)
    assert [same.first(answer) for answer in ("1.0", "2", "1", "2.00", "3")] == ["1.0", "2", "1.0", "2", "3"]


def test_spellings_of_a_known_answer_are_not_judged(monkeypatch):
    judged = []
    monkeypatch.setattr(mathematics._MATH_VERIFY, "equal", lambda *pair: judged.append(pair))
    mathematics._equivalent.cache_clear()
    numbers = [f"{number}{tail}" for number in range(40) for tail in ("", ".0", ".00")]
    texts = ["x", r"\frac{1}{2}", r"\dfrac12", "$x$", r"\dfrac{1}{2}", r"\left(x\right)", "(x)", " x "]
    same = Equivalence(equivalent)
    assert [same.first(answer) for answer in numbers] == [str(number) for number in range(40) for _ in range(3)]
    assert not judged
    found = [same.first(answer) for answer in texts]
    assert found == ["x", texts[1], texts[2], "x", texts[1], texts[5], texts[5], "x"]
    assert len(judged) == 2 * (4 * 40 + 1 + 2 + 3)  # four forms, each with every form before it, in either order


def test_an_answer_is_parsed_once(monkeypatch, capsys):
    """What the worker does, in this process."""
    parsed = []
    math_verify = SimpleNamespace(
        parse=lambda text, **_: parsed.append(text) or [text], verify=lambda gold, answer, **_: gold == answer
    )
    monkeypatch.setitem(sys.modules, "math_verify", math_verify)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(signal, "setitimer", lambda *_: None)
    pairs = [["a", "b"], ["a", "c"], ["b", "b"], ["c", "a"]]
    monkeypatch.setattr(sys, "stdin", [json.dumps(pair) for pair in pairs])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the worker puts another in its place
    work(limit_s=5)
    assert parsed == [f"\\boxed{{{answer}}}" for answer in "abc"]
    assert capsys.readouterr().out.split() == ["false", "false", "true", "false"]


@pytest.mark.parametrize(
    ("how", "value"),
    [("last", 0.2), ("min", 0.2), ("prod", 0.5 * 0.8 * 0.2), ("mean", 0.5), ("max", 0.8), ("sum", 1.5)],
)
def test_aggregate(how, value):
    assert aggregate((0.5, 0.8, 0.2), how) == pytest.approx(value)
    assert aggregate((), how) == -math.inf
    assert math.isnan(aggregate((0.5, math.nan, 0.2), how))


@pytest.mark.parametrize(
    ("how", "scores", "value"),
    [
        ("prod", (math.inf, 0.0), -math.inf),
        ("sum", (math.inf, -math.inf), -math.inf),
        ("mean", (-math.inf, 1.0, math.inf), -math.inf),
        ("prod", (math.inf, -2.0), -math.inf),
        ("mean", (math.inf, 1.0), math.inf),
        ("last", (math.inf, -math.inf), -math.inf),
        ("max", (math.inf, -math.inf), math.inf),
    ],
)
def test_infinite_scores_aggregate_to_a_number(how, scores, value):
    assert aggregate(scores, how) == value


def completion(answer: str, *scores: float, score: float | None = None) -> Completion:
    return Completion("", (), scores, scores[-1] if score is None else score, True, 0, answer)


COMPLETIONS = [
    completion("a", 0.9, 0.1),
    completion("b", 0.2, 0.8),
    completion("a", 0.6, 0.5),
    completion("c", 0.7, 0.7),
    completion("c", 0.7, 0.2),
    completion("", 1.0, 1.0),  # no answer: does not vote
]


@pytest.mark.parametrize(
    ("how", "answer"),
    [
        ("majority", "a"),  # a and c have two each: the first
        ("prm_max", "b"),
        ("prm_vote", "c"),  # 0.9; b has 0.8, a 0.6
        ("prm_last_max", "b"),
        ("prm_last_vote", "c"),
        ("prm_min_max", "c"),
        ("prm_min_vote", "c"),  # 0.7 + 0.2; a 0.1 + 0.5
        ("prm_mean_max", "c"),
        ("prm_mean_vote", "c"),  # 1.15; a 1.05
        ("prm_avg_max", "c"),
        ("prm_avg_vote", "c"),
        ("prm_prod_max", "c"),
        ("prm_prod_vote", "c"),
    ],
)
def test_votes(how, answer):
    assert vote(COMPLETIONS, how) == answer
    assert how in VOTES or "avg" in how


def test_votes_by_the_default_aggregate():
    assert vote(COMPLETIONS, "prm_max", "min") == "c"
    assert vote(COMPLETIONS, "prm_vote", "max") == "a"


def test_ties_go_to_the_first():
    tied = [completion("x", 0.5), completion("y", 0.5)]
    for how in VOTES:
        assert vote(tied, how) == "x"
        assert vote(tied[::-1], how) == "y"


def test_equal_answers_vote_together_in_their_first_spelling():
    tied = [completion("1", 0.3), completion("2.0", 0.2), completion("2", 0.2)]
    assert vote(tied, "majority") == vote(tied, "prm_vote") == "2.0"
    assert vote(tied, "prm_max") == "1"


def test_votes_that_cancel_out_rank_last():
    voters = [completion("1", math.inf), completion("1", -math.inf), completion("2", 0.1)]
    assert vote(voters, "prm_vote") == vote(voters[::-1], "prm_vote") == "2"
    assert vote(voters, "prm_max") == "1"


def test_no_answers():
    assert vote([], "majority") == ""
    assert vote([completion("", 0.5)], "prm_max") == ""


@pytest.mark.parametrize("how", ["", "prm", "max", "prm_median_max", "prm_min", "majority_vote", "prm_min_min"])
def test_unknown_votes(how):
    with pytest.raises(ValueError, match=r"^vote: expected one of majority, prm_max, "):
        vote(COMPLETIONS, how)


def test_without_scores_only_majority():
    unscored = [completion("a", score=math.nan), completion("b", score=math.nan), completion("b", score=math.nan)]
    assert vote(unscored, "majority") == "b"
    with pytest.raises(ValueError, match=r"majority"):
        vote(unscored, "prm_min_max")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("75", r"75\%"),
        ("12", "1 2"),
        ("11/2", "1 1/2"),
        (r"x \in f", r"x \inf"),
        (r"1 \\ 2", "1 2"),
        (r"1 \\, 2", r"1 \, 2"),
        (r"\{1\}", "{1}"),
        (r"1\\{2}", "12"),
    ],
)
def test_what_carries_a_meaning_stays(one, other):
    """A normalized text is compared as it is: what it lost would make different answers the same."""
    assert canonical_form(one) != canonical_form(other)
    assert not same(one, other)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("0.75", r"75\%"), (r"75\%", "0.75"), ("0.1", r"10\%"), ("0.005", r"0.5\%"), (r"\frac{3}{4}", r"75\%"),
        ("75", r"75\%"), ("0.75", r"0.75\%"), (r"75\%", r"0.75\%"), (r"\frac{1}{2}\%", "0.005"), ("12", "1 2"),
        ("7.5", r"75\%"), (r"12\text{ cm}", "12"), ("x=5", "5"), ("90", r"90^\circ"), ("(1,2)", r"\{1,2\}"),
        ("[1,2)", "(1,2]"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),
    ],
)  # fmt: skip
def test_percentages_and_the_like_are_judged_as_math_verify_does(gold, answer):
    math_verify = pytest.importorskip("math_verify")
    one, other = (math_verify.parse(f"\\boxed{{{each}}}", parsing_timeout=None) for each in (gold, answer))
    assert equivalent(gold, answer) == math_verify.verify(one, other, timeout_seconds=None)


MIXED = [
    "0.75", r"75\%", r"\frac{3}{4}", "75", "0.5", r"\frac12", r"50\%", "12", r"12\text{ cm}", "1 2", "x=5", "5",
    r"\{1,2\}",
    "(1,2)", "[1,2]", "1,2", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\{2}\end{pmatrix}", "no solution",
    r"\text{no solution}", r"\frac{\sqrt{8}}{2}", r"\sqrt{2}", "0.3333333", r"\frac13", "0.33333333",
]  # fmt: skip


def classes_of(answers):
    """Who is in whose class: a set of sets of texts."""
    found = {}
    for answer, first in zip(answers, Equivalence(equivalent).firsts(answers), strict=True):
        found.setdefault(first, set()).add(answer)
    return {frozenset(members) for members in found.values()}


@settings(max_examples=60, deadline=None)
@given(answers=st.lists(st.sampled_from(MIXED), min_size=2, max_size=7), data=st.data())
def test_no_order_of_answers_changes_a_vote(answers, data):
    pytest.importorskip("math_verify")
    other = data.draw(st.permutations(range(len(answers))))
    weights = [0.1 * (1 + number) for number in range(len(answers))]  # whose sums depend on their order
    wanted = classes_of(answers)
    assert classes_of([answers[i] for i in other]) == wanted

    def completion(number):
        return Completion("", (), (weights[number],), weights[number], True, 0, answers[number])

    for how in ("majority", "prm_vote"):
        votes = [1.0 if how == "majority" else weight for weight in weights]
        totals = sorted(math.fsum(v for a, v in zip(answers, votes, strict=True) if a in each) for each in wanted)
        if len(totals) > 1 and totals[-1] == totals[-2]:
            continue  # a tie goes to the one that comes first
        winners = [vote([completion(i) for i in order], how) for order in (range(len(answers)), other)]
        assert any({*winners} <= each for each in wanted), winners


def test_classes_join_when_a_third_answer_says_so():
    def near(one, other):
        return int(one) - int(other) == 1  # neither symmetric nor transitive

    for order in itertools.permutations(["1", "2", "3", "5"]):
        firsts = Equivalence(near).firsts(order)
        assert len(set(firsts)) == 2
        assert {firsts[order.index(each)] for each in "123"} == {next(each for each in order if each != "5")}


def test_the_sum_of_a_vote_does_not_depend_on_the_order():
    scores = {"a": (0.1, 0.2, 0.3), "b": (0.6,)}  # 0.1 + 0.2 + 0.3 is above or at 0.6, by its order
    votes = [Completion("", (), (score,), score, True, 0, name) for name, each in scores.items() for score in each]
    assert len({vote(order, "prm_vote") for order in itertools.permutations(votes)} & {"a", "b"}) >= 1
    assert {vote([*order, votes[3]], "prm_vote") for order in itertools.permutations(votes[:3])} == {"a"}


class Slow(MathVerify):
    """Without a worker: an answer of "h" takes too long by itself, two of "s" when they are compared."""

    def __init__(self):
        super().__init__(1)
        self.asked = []

    def _reply(self, question):
        self.asked.append(question)
        slow = "h" in "".join(question) or (all("s" in each for each in question[-2:]) and len(question) == 2)
        return None if slow else question[0][-1] == question[-1][-1]


def test_an_answer_that_takes_too_long_is_asked_about_once():
    pytest.importorskip("math_verify")
    judge = Slow()
    answers = [f"h{number}" for number in range(64)] + ["x1", "y1", "z2"]
    firsts = Equivalence(judge.equal).firsts(answers)
    assert firsts == [*answers[:64], "x1", "x1", "z2"]
    assert sum("h" in each for question in judge.asked for each in question) == 64


def test_comparisons_that_take_too_long_are_few():
    pytest.importorskip("math_verify")
    judge = Slow()
    Equivalence(judge.equal).firsts([f"s{number}" for number in range(64)])
    timeouts = [question for question in judge.asked if len(question) == 2]
    assert len(timeouts) <= 64
    assert judge.equal("a1", "b1") is True


def test_hostile_answers_cost_their_own_time_only(monkeypatch):
    pytest.importorskip("math_verify")
    judge = MathVerify(limit_s=0.5)
    deaths = []
    end = judge._end
    monkeypatch.setattr(judge, "_end", lambda worker: (deaths.append(worker), end(worker)))
    hostile = [rf"{a}^{{{a}^{{{b}^{{9}}}}}}" for a, b in ((7, 9), (9, 9), (7, 8), (9, 8))]
    answers = [*hostile, "0.5", r"\frac{1}{2}", "y"]
    assert Equivalence(judge.equal).firsts(answers) == [*hostile, "0.5", "0.5", "y"]
    assert len(deaths) == 4


def test_who_needs_no_judge_waits_for_none():
    judge = mathematics._MATH_VERIFY
    with judge._lock:  # as if it were busy
        assert equivalent("1", "1.0")
        assert not equivalent("1", "2")
        assert equivalent(r"\dfrac{1}{2}", r"\frac{1}{2}")
        numbers = [Completion("", (), (1.0,), 1.0, True, 0, answer) for answer in ("1", "2", "1.0", "x", "$x$")]
        assert vote(numbers[:3], "majority") == "1"
        assert vote(numbers[3:], "majority") == "x"
        assert vote(numbers, "prm_max") == "1"
