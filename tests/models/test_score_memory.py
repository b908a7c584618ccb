"""Known scores are given again without reading; a text that continues a known one costs only its new part."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import r1_tokenizer, save
from test_hf_verifier import FORMATS, PROBLEM, Counter, encoded, model_of, random_step
from tiny import save_checkpoint
from tts_search import HFVerifier
from tts_search.models.branches import TokenBranch
from tts_search.models.meter import Meter
from tts_search.search.protocol import Score
from tts_search.verifiers import FORMATS as PUBLISHED
from tts_search.verifiers.memory import ScoreMemory, keys_of

Steps = tuple[str, ...]


def scores(verifier: HFVerifier, texts: list[Steps], problem: str = PROBLEM) -> list[list[float]]:
    """Each text as a whole, all at once, as if nothing had been read before."""
    verifier.begin(0, problem)
    found = verifier.score([Score(0, number + 1, steps, 0) for number, steps in enumerate(texts)])
    verifier.end(0)
    return found


@pytest.fixture(scope="module", params=FORMATS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    name = request.param
    folder = tmp_path_factory.mktemp("verifier")
    return name, save_checkpoint(folder, model_of(name), verifier=FORMATS[name] or None)


@pytest.mark.parametrize("seed", range(3))
def test_they_are_those_of_a_verifier_that_remembers_nothing(made: tuple[str, str], seed: int) -> None:
    """Texts grow, come again, end early and part from each other in the middle."""
    rng = random.Random(seed)
    fresh, kept = HFVerifier(made[1], kv_memory="4MiB"), HFVerifier(made[1], kv_memory="4MiB")
    kept._pool.max_tokens = (2048, 40, 15)[seed]
    kept.prefix_cache = True
    counter, texts = Counter(kept), [(random_step(rng),) for _ in range(3)]
    read = 0
    for _ in range(8):
        found = scores(kept, texts)
        assert found == scores(fresh, texts)
        read += sum(len(encoded(made[0], PROBLEM, steps)) for steps in texts)
        base = rng.choice(texts)[: rng.randint(0, 3)]
        texts = [(*rng.choice(texts), random_step(rng)), (*base, random_step(rng)), rng.choice(texts)]
    assert 0 < sum(counter.sizes) < 0.6 * read
    before = sum(counter.sizes)
    assert scores(kept, texts[:1]) == scores(kept, texts[:1])
    assert scores(kept, texts[:1]) == scores(fresh, texts[:1])
    assert sum(counter.sizes) - before <= len(encoded(made[0], PROBLEM, texts[0]))
    before = sum(counter.sizes)
    scores(kept, texts[:1])
    assert sum(counter.sizes) == before


def test_a_text_that_goes_on_costs_its_new_tokens(tmp_path: Path) -> None:
    name = "special token"
    verifier = HFVerifier(save_checkpoint(tmp_path, model_of(name), verifier=FORMATS[name]), kv_memory="4MiB")
    verifier.prefix_cache = True
    counter, steps = Counter(verifier), ("a b\n\n", "b b a\n\n", "a\n\n", "x a b")
    for count in range(1, 5):
        scores(verifier, [steps[:count]])
        assert sum(counter.sizes) == len(encoded(name, PROBLEM, steps[:count]))
    verifier.begin(0, PROBLEM)
    verifier.score([Score(0, 1, steps, 0)])
    usage = verifier.end(0)
    assert (usage.tokens, usage.prefill_tokens, usage.cached_tokens) == (0, 0, len(encoded(name, PROBLEM, steps)))
    verifier.prefix_cache = False
    scores(verifier, [steps])
    assert sum(counter.sizes) == 2 * len(encoded(name, PROBLEM, steps))


def test_a_text_that_does_not_fit_is_refused_each_time(tmp_path: Path) -> None:
    verifier = HFVerifier(save_checkpoint(tmp_path, model_of("pieces"), verifier=FORMATS["pieces"]), kv_memory="4MiB")
    verifier.prefix_cache = True
    long = ("a b\n\n", "b " * 9999)
    for _ in range(2):
        first, second = scores(verifier, [long[:1], long])
        assert len(first) == 1
        assert isinstance(second, ValueError)


def test_a_judge_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict depends on the text alone: its draws do, too."""
    save(tmp_path, r1_tokenizer(), "qwen2", max_position_embeddings=4096)
    published = PUBLISHED["genprm"]
    assert published.judge is not None
    entry = replace(published, judge=replace(published.judge, temperature=1.0, samples=2, max_tokens=6))
    fresh, kept = (HFVerifier(str(tmp_path), format=entry, kv_memory="16MiB") for _ in range(2))
    kept.prefix_cache = True
    texts: list[Steps] = [("So.",), ("So.", "Then."), ("So.", "Then.", "Thus.")]
    for text in texts:
        assert scores(kept, [text]) == scores(fresh, [text])
    monkeypatch.setattr(kept._pool, "forward", None)
    assert scores(kept, texts) == scores(fresh, texts)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.data())
@settings(max_examples=100)
def test_equal_texts_have_equal_keys(path: list[int], data: st.DataObject) -> None:
    """However they are cut into branches."""

    def keys(cuts: list[int]) -> dict[int, bytes]:
        meter, branch, found = Meter(), None, {}
        for begin, end in zip([0, *cuts], [*cuts, len(path)], strict=True):
            branch = TokenBranch(meter, branch, begin, path[begin:end])
            places = [(branch, at) for at in range(branch.length)]
            found.update({at: key for (_, at), key in keys_of(places).items()})
        return found

    cuts = data.draw(st.lists(st.integers(1, len(path)), unique=True, max_size=3).map(sorted))
    whole = keys([])
    assert keys(cuts) == whole
    assert len(set(whole.values())) == len(path)


def test_the_one_used_longest_ago_is_forgotten() -> None:
    memory = ScoreMemory(2)
    memory.put(b"a", 0.0)
    memory.put(b"b", 1.0)
    assert memory.get(b"a") == 0.0
    memory.put(b"c", 2.0)
    assert (memory.get(b"a"), memory.get(b"b"), memory.get(b"c")) == (0.0, None, 2.0)
    assert len(memory) == 2
