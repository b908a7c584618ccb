"""Generative formats: analyses forked from the question after a step, and the verdict read after each."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import JUDGES, JudgeText, judged, qwen_tokenizer, r1_tokenizer, r_prm_text, save
from solutions import random_trees
from tiny import small_pool
from tts_search import HFVerifier
from tts_search.search.protocol import Score
from tts_search.verifiers import FORMATS, Judge, VerifierFormat

NAMES = {"GenPRM-7B": "genprm", "ThinkPRM-1.5B": "thinkprm", "R-PRM-7B-DPO": "r_prm"}
TOKENIZERS = {"GenPRM-7B": r1_tokenizer, "ThinkPRM-1.5B": r1_tokenizer, "R-PRM-7B-DPO": qwen_tokenizer}


@pytest.fixture(scope="module", params=NAMES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / request.param
    save(folder, TOKENIZERS[request.param](), "qwen2", max_position_embeddings=4096)
    return folder


def load(path: Path, **judge: Any) -> HFVerifier:
    entry = FORMATS[NAMES[path.name]]
    assert entry.judge is not None
    return HFVerifier(str(path), format=replace(entry, judge=replace(entry.judge, **judge)), kv_memory="16MiB")


def test_judges_are_recognised(path: Path) -> None:
    assert HFVerifier(str(path), kv_memory="1MiB").format is FORMATS[NAMES[path.name]]


@pytest.mark.parametrize("solutions", [8, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stops", [(), ("e", "\n")], ids=["to the limit", "stopped"])
def test_scores_are_the_published_ones(path: Path, stops: tuple[str, ...], solutions: int) -> None:
    """Greedy analyses, so that both sides write the same."""
    verifier = load(path, temperature=0.0, samples=1, max_tokens=5, stop=stops)
    published = judged(JUDGES[path.name], stops, 5)(path)
    for problem, steps, scores in random_trees(verifier, random.Random(1), solutions):
        assert scores == pytest.approx(published(problem, steps), abs=1e-5, rel=0)


def test_a_heading_by_itself_is_a_step(path: Path) -> None:
    """Policies write "Step 2:" and a blank line; formats that number the steps themselves have nothing else to read."""
    verifier = load(path, temperature=0.0, samples=1, max_tokens=3, stop=())
    published = judged(JUDGES[path.name], (), 3)(path)
    steps = ("So.\n\n", "Step 7:\n\n", "Paragraph 1: \n\n")
    verifier.begin(0, "Which?")
    assert verifier.score([Score(0, 1, steps, 0)])[0] == pytest.approx(published("Which?", steps), abs=1e-5)


def test_the_text_of_a_format_can_be_replaced(tmp_path: Path) -> None:
    """For authors' instructions that cannot be shipped."""
    save(tmp_path, qwen_tokenizer(), "qwen2")
    instruction, none, request = "the Step: Yes or No?", "no Step.", "the analysis.\n"
    entry = FORMATS["r_prm"]
    assert entry.judge is not None
    judge = replace(
        entry.judge, no_steps=none, question=f"\nNow Step: {{step}}\n{request}Reply: ",
        temperature=0.0, samples=1, max_tokens=5, stop=(),
    )  # fmt: skip
    prompt = f"{instruction}\n\nQuestion: {{problem}}\nPrevious Steps: {{steps}}"
    verifier = HFVerifier(str(tmp_path), format=replace(entry, prompt=prompt, judge=judge), kv_memory="16MiB")
    text = JudgeText(r_prm_text(instruction, none, request), judge.decision, (" Yes", " No"))
    published = judged(text, (), 5)(tmp_path)
    for problem, steps, scores in random_trees(verifier, random.Random(2), solutions=5):
        assert scores == pytest.approx(published(problem, steps), abs=1e-5, rel=0)


def test_samples_are_averaged_and_do_not_depend_on_company(path: Path) -> None:
    one, three = load(path, samples=1, max_tokens=6), load(path, samples=3, max_tokens=6)
    found = []
    for verifier in (one, three):
        verifier.begin(0, "Which?")
        found.append(verifier.score([Score(0, 1, ("a\n\n",), 0)])[0])
    assert found[0] != found[1]
    three.begin(1, "What?")
    again = three.score([Score(1, 1, ("b\n\n",), 0), Score(0, 2, ("a\n\n",), 0)])[1]
    assert again == pytest.approx(found[1], abs=1e-5)


def test_the_text_is_read_once_for_all_analyses(path: Path) -> None:
    costs = []
    for samples in (1, 5):
        verifier = load(path, samples=samples, max_tokens=4)
        verifier.begin(0, "Which? " * 80)
        verifier.score([Score(0, 1, ("a\n\n",), 0)])
        costs.append(verifier.end(0))
    assert costs[0].prefill_tokens == costs[1].prefill_tokens > 0
    decision = len(verifier._reader.encode(verifier.format.judge.decision))
    # An analysis of 4 tokens, read again where its text is cut otherwise (bytes that are no character become 3 each).
    assert costs[1].tokens - costs[0].tokens <= 4 * (4 + 4 * 12 + decision) < costs[0].prefill_tokens
    assert verifier._pool.pool.forest.stats().branches == 0


def test_a_small_pool_gives_the_same_scores(path: Path) -> None:
    large = [scores for *_, scores in random_trees(load(path, samples=2, max_tokens=5), random.Random(5), solutions=6)]
    verifier = load(path, samples=2, max_tokens=5)
    verifier._lane.pool = small_pool(verifier.decoder, 300)
    small = [scores for *_, scores in random_trees(verifier, random.Random(5), solutions=6)]
    assert [pytest.approx(scores, abs=1e-5) for scores in large] == small


def test_no_room_for_an_analysis(tmp_path: Path) -> None:
    save(tmp_path, qwen_tokenizer(), "qwen2")
    entry = VerifierFormat(
        "short", "label_pair", score_at="closing", labels=("Yes", "No"), judge=Judge(question=" ok?", decision=" so:")
    )
    verifier = HFVerifier(str(tmp_path), format=entry, dtype=torch.float32, kv_memory="16MiB")
    verifier.begin(0, "Which?")
    (answer,) = verifier.score([Score(0, 1, ("x" * 2030,), 0)])
    assert "no room for an analysis in its context of 2048 tokens" in str(answer)


@pytest.mark.parametrize("name", ["outcome", "outcome_judge"])
def test_an_outcome_is_asked_for_once(tmp_path: Path, name: str) -> None:
    """The score of every step is what the model says behind the last one; earlier scores stay."""
    save(tmp_path, qwen_tokenizer(), "qwen2", max_position_embeddings=4096)
    entry, judge = FORMATS[name], FORMATS[name].judge
    if judge is not None:
        entry = replace(entry, judge=replace(judge, temperature=0.0, max_tokens=4))
    verifier = HFVerifier(str(tmp_path), format=entry, kv_memory="16MiB")
    by_step = HFVerifier(str(tmp_path), format=replace(entry, outcome=False), kv_memory="16MiB")
    steps = ("So.\n\n", "Then.\n\n", "It is 5.")
    for each in (verifier, by_step):
        each.begin(0, "Which?")
    (known,) = by_step.score([Score(0, 1, steps, 0)])
    (first,) = verifier.score([Score(0, 1, steps[:2], 0)])
    assert first == pytest.approx([known[1]] * 2, abs=1e-6)
    (whole,) = verifier.score([Score(0, 2, steps, 1)])
    assert whole == pytest.approx([known[1], known[1], known[2]], abs=1e-6)
    (ahead,) = verifier.score([Score(0, 3, steps[:1], 0, steps[1:])])
    assert ahead == pytest.approx([known[2]] * 3, abs=1e-6)
    costs = [each.end(0) for each in (verifier, by_step)]
    assert verifier._pool.pool.forest.stats().branches == 0
    assert costs[0].tokens > 0


def test_an_outcome_has_a_question() -> None:
    with pytest.raises(ValueError, match="outcome: expected score_at closing"):
        VerifierFormat("x", "label_pair", outcome=True)
