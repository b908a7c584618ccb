"""The implicit format: two models, no head, against plain log-softmax of the whole text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from layouts import eurus, qwen_tokenizer, save
from solutions import random_trees
from tiny import small_pool
from tts_search import HFVerifier
from tts_search.search.protocol import Score


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("eurus")
    save(folder / "EurusPRM-Stage2", qwen_tokenizer(), "qwen2", seed=1)
    save(folder / "reference", qwen_tokenizer(), "qwen2", seed=2)
    return folder / "EurusPRM-Stage2", folder / "reference"


def load(paths: tuple[Path, Path]) -> HFVerifier:
    return HFVerifier(str(paths[0]), reference=str(paths[1]), dtype=torch.float32, kv_memory="8MiB")


def test_scores_are_the_published_ones(paths: tuple[Path, Path]) -> None:
    verifier = load(paths)
    assert verifier.format.name == "eurus_prm"
    published = eurus(paths[1])(paths[0])
    spread = []
    for problem, steps, scores in random_trees(verifier, random.Random(3), solutions=200):
        wanted = published(problem, steps)
        assert scores == pytest.approx(wanted, abs=1e-5, rel=0)
        spread += wanted
    assert max(spread) - min(spread) > 0.05


def test_both_models_read_each_token_once_and_let_go(paths: tuple[Path, Path]) -> None:
    verifier = load(paths)
    reader = verifier._reader
    verifier.begin(0, "Which?")
    steps = ("one\n\n", "two\n\n", "three\n\n")
    verifier.score([Score(0, 1, steps[:1], 0), Score(0, 2, ("other\n\n",), 0)])
    verifier.score([Score(0, 3, steps, 1), Score(0, 4, steps[:2], 1, ("four\n\n",))])
    usage = verifier.end(0)
    prompt = len(reader.prompt("Which?")[0])
    texts = [
        "Step 1: one\n\n",
        "Step 1: other\n\n",
        "Step 2: two\n\nStep 3: three\n\n",
        "Step 2: two\n\nStep 3: four\n\n",
    ]
    assert usage.prefill_tokens == 2 * prompt
    assert usage.tokens == 2 * sum(len(reader.encode(text)) for text in texts)
    assert usage.recomputed_tokens == 0
    for model in verifier._scorer.models:
        assert model.lane.pool.pool.forest.stats().branches == 0
        assert not model._states
    assert not verifier._scorer._trees


def test_a_small_pool_gives_the_same_scores(paths: tuple[Path, Path]) -> None:
    large = [scores for _, _, scores in random_trees(load(paths), random.Random(5), solutions=30)]
    verifier = load(paths)
    for model in verifier._scorer.models:
        model.lane.pool = small_pool(model.lane.decoder, 100)
    small = [scores for _, _, scores in random_trees(verifier, random.Random(5), solutions=30)]
    assert [pytest.approx(scores, abs=1e-5) for scores in large] == small


def test_a_reference_is_needed(paths: tuple[Path, Path]) -> None:
    entry = {"head": "log_ratio", "boundary": "\n"}
    with pytest.raises(ValueError, match="needs a reference model, and names none"):
        HFVerifier(str(paths[0]), format=entry)
