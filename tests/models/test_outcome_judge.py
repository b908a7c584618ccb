"""A judge of whole solutions: its questions, its tournaments, and that neither order nor letters decide."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_checkpoint, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from tts_search import HFVerifier, OutcomeJudge, SearchConfig, Step, TextPolicy, search
from tts_search.search.protocol import Score, Usage
from tts_search.verifiers.labels import LocalLabels, common_prefix
from tts_search.verifiers.outcome import CHOICE, tournament

ASKED = CHOICE.chat[0][1]


class Scripted:
    """Answers by what a function says of each solution that it is shown and its place."""

    def __init__(self, weight, max_length: int = 10**6) -> None:
        self.weight = weight
        self.max_length = max_length
        self.shown: list[list[str]] = []

    def begin(self, problem: int) -> None: ...

    def end(self, _problem: int) -> Usage:
        return Usage(tokens=len(self.shown))

    def lengths(self, _entry, questions) -> list[int]:
        return [len(question.solution) for question in questions]

    def ask(self, _entry, labels: Sequence[str], questions):
        answers = []
        for question in questions:
            solutions = [part.partition(":\n")[2] for part in ("\n\n" + question.solution).split("\n\nSolution ")[1:]]
            assert len(solutions) == len(labels)
            self.shown.append(solutions)
            weights = [self.weight(solution, place) for place, solution in enumerate(solutions)]
            answers.append([weight / sum(weights) for weight in weights])
        return answers


def scores(judge: OutcomeJudge, *solutions: str, problem: str = "Which?") -> list:
    judge.begin(0, problem)
    try:
        return judge.score([Score(0, number, (text,), 0) for number, text in enumerate(solutions, 1)])
    finally:
        judge.end(0)


def firsts(found: list) -> list[float]:
    return [own[0] for own in found]


@given(
    count=st.integers(1, 70),
    most=st.integers(2, 26),
    room=st.integers(4, 60),
    seed=st.integers(0, 999),
)
def test_a_tournament(count, most, room, seed):
    rng = random.Random(seed)
    costs = [rng.randint(1, room // 2 + 2) for _ in range(count)]
    strength = rng.sample(range(1, 1000), count)
    contest, met, shares = tournament(costs, most, room), [], None
    try:
        while True:
            groups = contest.send(shares)
            for group in groups:
                assert 2 <= len(group) <= most
                assert sum(costs[member] for member in group) <= room
            assert len({member for group in groups for member in group}) == sum(map(len, groups))
            met.append(groups)
            shares = [
                [strength[member] / sum(strength[other] for other in group) for member in group] for group in groups
            ]
    except StopIteration as over:
        found = over.value
    fitting = [number for number in range(count) if 2 * costs[number] <= room]
    assert [number for number, score in enumerate(found) if not isinstance(score, Exception)] == fitting
    if fitting:
        assert max(fitting, key=found.__getitem__) == max(fitting, key=strength.__getitem__)
        assert all(0 <= found[number] <= 1 for number in fitting)
    last = {number: max((turn for turn, groups in enumerate(met) for g in groups if number in g), default=-1)
            for number in fitting}  # fmt: skip
    for one in fitting:
        for other in fitting:
            if last[one] > last[other] >= 0:
                assert found[one] > found[other]
    if len(fitting) <= most and sum(costs[number] for number in fitting) <= room:
        assert len(met) == (len(fitting) > 1)


def test_a_group_that_cannot_be_compared_is_out():
    contest = tournament([1] * 6, 3, 100)
    assert next(contest) == [[0, 1, 2], [3, 4, 5]]
    error = RuntimeError("no answer")
    with pytest.raises(StopIteration) as over:
        contest.send([error, [0.2, 0.5, 0.3]])
    assert over.value.value == [error, error, error, 0.2, 0.5, 0.3]


@given(
    solutions=st.lists(st.text("ab \n", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=14),
    most=st.integers(2, 6),
    rotate=st.booleans(),
    data=st.data(),
)
def test_permuted_candidates_have_permuted_scores(solutions, most, rotate, data):
    """However much the model likes some letters: equal sets of solutions are shown alike."""
    order = data.draw(st.permutations(range(len(solutions))))

    def judge() -> OutcomeJudge:
        return OutcomeJudge(Scripted(lambda text, place: (1 + len(text)) * 3.0**-place), most=most, rotate=rotate)

    found = firsts(scores(judge(), *solutions))
    permuted = firsts(scores(judge(), *(solutions[number] for number in order)))
    assert permuted == [found[number] for number in order]
    for text, score in zip(solutions, found, strict=True):
        assert score == found[[other.strip() for other in solutions].index(text.strip())]


def test_rotations_take_away_what_the_letter_is_worth():
    first = Scripted(lambda _text, place: 1.0 if place == 0 else 0.0)
    assert firsts(scores(OutcomeJudge(first), "a", "b", "c", "d")) == [0.25] * 4
    assert sorted(firsts(scores(OutcomeJudge(first, rotate=False), "a", "b", "c", "d"))) == [0, 0, 0, 1]
    good = Scripted(lambda text, place: (8.0 if text == "c" else 1.0) * (4.0 if place == 0 else 1.0))
    found = firsts(scores(OutcomeJudge(good), "a", "b", "c", "d"))
    assert max(found) == found[2]
    assert found[0] == pytest.approx(found[1])
    assert sum(found) == pytest.approx(1)


def test_equal_solutions_are_shown_once_and_one_alone_needs_no_question():
    labels = Scripted(lambda _text, _place: 1.0)
    assert firsts(scores(OutcomeJudge(labels), "a", "a \n", "a")) == [1.0] * 3
    assert not labels.shown
    assert firsts(scores(OutcomeJudge(labels), "a", "b", "a")) == [0.5] * 3
    assert [sorted(shown) for shown in labels.shown] == [["a", "b"]] * 2


def test_all_steps_have_the_score_of_their_solution():
    judge = OutcomeJudge(Scripted(lambda text, _place: float(len(text))))
    judge.begin(3, "Which?")
    found = judge.score(
        [Score(3, 1, ("a\n\n", "b"), 0), Score(3, 2, ("a",), 0, ("bcdef", " ")), Score(3, 3, (" ",), 0)]
    )
    assert found[:2] == [[4 / 12] * 2, [8 / 12] * 3]  # "a\n\nb" and "a\n\nbcdef"
    assert "empty" in str(found[2])


def test_one_that_takes_half_of_the_context_fails_alone():
    judge = OutcomeJudge(Scripted(lambda text, _place: float(len(text)), max_length=101))
    found = scores(judge, "a" * 60, "a" * 9, "a" * 3)
    assert "more than half of the room of 100" in str(found[0])
    assert firsts(found[1:]) == [0.75, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ask": "both"}, "ask: expected choice or outcome"),
        ({"most": 1}, "most: expected an int from 2 to 26, got 1"),
        ({"most": 27}, "most: expected an int from 2 to 26"),
        ({"most": True}, "most: expected an int"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        OutcomeJudge(Scripted(lambda _text, _place: 1.0), **options)


def test_a_problem_in_flight_is_refused():
    judge = OutcomeJudge(Scripted(lambda _text, _place: 1.0))
    judge.begin(0, "a")
    with pytest.raises(ValueError, match="problem 0 is in flight"):
        judge.begin(0, "b")


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_what_texts_begin_with(texts):
    end = common_prefix(texts)
    assert all(text[:end] == texts[0][:end] and len(text) > end for text in texts)
    assert any(len(text) == end + 1 or text[end] != texts[0][end] for text in texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "tiny"
    save_checkpoint(path, tiny_model(max_position_embeddings=2048))
    return path


@pytest.fixture(scope="module")
def labels(folder: Path) -> LocalLabels:
    return LocalLabels(str(folder), kv_memory="8MiB")


def plain(folder: Path, problem: str, solutions: Sequence[str]) -> list[float]:
    """The shares of the letters by transformers, from all logits behind the whole text."""
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
    listing = "\n\n".join(f"Solution {chr(65 + place)}:\n{text}" for place, text in enumerate(solutions))
    content = ASKED.replace("{problem}", problem).replace("{steps}", listing)
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    letters = [tokenizer.convert_tokens_to_ids(chr(65 + place)) for place in range(len(solutions))]
    shares: list[float] = torch.softmax(model(tokens).logits[0, -1, letters], 0).tolist()
    return shares


def test_shares_are_those_of_the_whole_text_over_all_rotations(folder, labels):
    solutions = ["It is 5.", "It is 6, since\n\n2 * 3 = 6.", "No idea."]
    turns = [solutions[turn:] + solutions[:turn] for turn in range(3)]
    by_text = [dict(zip(turn, plain(folder, "Two times three?", turn), strict=True)) for turn in turns]
    expected = [sum(shares[text] for shares in by_text) / 3 for text in solutions]
    found = firsts(scores(OutcomeJudge(labels), *solutions, problem="Two times three?"))
    # Rotations of another order are another circle: the judge has one of the two that there are.
    other = [solutions[0], solutions[2], solutions[1]]
    by_text = [dict(zip(turn, plain(folder, "Two times three?", turn), strict=True))
               for turn in (other[turn:] + other[:turn] for turn in range(3))]  # fmt: skip
    mirrored = [sum(shares[text] for shares in by_text) / 3 for text in solutions]
    assert any(found == pytest.approx(each, abs=1e-5) for each in (expected, mirrored))
    assert expected != pytest.approx(mirrored, abs=1e-3)


def test_one_solution_at_a_time_is_the_format_outcome(folder, labels):
    steps = ("So.\n\n", "Then.\n\n", "It is 5.")
    verifier = HFVerifier(str(folder), format="outcome", kv_memory="8MiB")
    verifier.begin(0, "Which?")
    (expected,) = verifier.score([Score(0, 1, steps, 0)])
    judge = OutcomeJudge(labels, "outcome")
    judge.begin(0, "Which?")
    (found,) = judge.score([Score(0, 1, steps, 0)])
    assert found == pytest.approx(expected, abs=1e-6)
    usage = judge.end(0)
    assert usage.tokens + usage.prefill_tokens > 50
    assert labels._lane.pool.pool.forest.stats().branches == 0


def test_the_problem_is_read_once(labels):
    judge = OutcomeJudge(labels)
    problem = "Why? " * 60
    judge.begin(0, problem)
    judge.score([Score(0, number, (f"{number}",), 0) for number in range(1, 5)])
    usage = judge.end(0)
    assert len(problem) < usage.prefill_tokens < 1.5 * len(problem)
    assert usage.tokens < 4 * 250


def test_company_does_not_matter(labels):
    judge = OutcomeJudge(labels, most=3)
    alone = scores(judge, *(f"It is {number}." for number in range(7)))
    judge.begin(0, "Which?")
    judge.begin(1, "Another one?")
    requests = [Score(problem, number, (f"It is {number}.",), 0) for number in range(7) for problem in (1, 0)]
    together = judge.score(requests)[1::2]
    judge.end(0)
    judge.end(1)
    assert together == alone
    assert labels._lane.pool.pool.forest.stats().branches == 0


def test_a_small_pool_and_a_text_too_long(folder):
    short = LocalLabels(str(folder), kv_memory="700KiB")
    tokens = short._lane.pool.pool_tokens
    assert 300 < tokens < 2000
    judge = OutcomeJudge(short)
    found = scores(judge, "a" * 30, "b" * 20)
    assert sum(firsts(found)) == pytest.approx(1)
    found = scores(OutcomeJudge(short, "outcome"), "a" * 2100, "b")
    assert "context of 2048" in str(found[0])
    assert 0 < found[1][0] < 1


def test_letters_have_tokens_of_their_own(folder):
    with pytest.raises(ValueError, match="expected the text of one token"):
        LocalLabels(str(folder)).ask(CHOICE, ("A", "AB"), [])
    with pytest.raises(ValueError, match="labels: expected texts of different tokens"):
        LocalLabels(str(folder)).ask(CHOICE, ("A", "A"), [])


@pytest.mark.parametrize("n", [1, 6, 20])
def test_best_of_n(labels, n):
    policy = TextPolicy(lambda requests: [[Step(f"\\boxed{{{seed % 9}}}", True) for seed in r.seeds] for r in requests])
    results = search(["One?", "Two?"], policy, OutcomeJudge(labels, most=4), SearchConfig("best_of_n", n=n))
    for result in results:
        assert result.best.score == max(one.score for one in result.completions)
        assert all(0 <= one.score <= 1 for one in result.completions)
        assert (result.stats.verifier_tokens > 0) == (len({one.text for one in result.completions}) > 1)
