"""The prefix cache: it finds the longest prefix, gives up room when needed, and changes no result."""

from __future__ import annotations

import random
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_branches import Recorder, run, tokens
from test_generation import parts_of, request, whole
from test_local_search import CONFIGS, PROBLEMS, READING
from tiny import save_checkpoint, small_pool, talkative, tiny_model
from tts_search import HFPolicy, HFVerifier, search
from tts_search.models.branches import TokenBranch
from tts_search.models.meter import Meter
from tts_search.models.prefix import PrefixCache
from tts_search.models.transformers import ATTENTION, TransformersDecoder, register

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


def common(one: list[int], other: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


class Plain:
    """The same by looking at all texts."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, ...], int] = {}  # the one used longest ago first

    def use(self, text: tuple[int, ...]) -> None:
        beginnings = sorted((each for each in self.kept if each == text[: len(each)]), key=len, reverse=True)
        for each in beginnings:
            self.kept[each] = self.kept.pop(each)

    def find(self, text: list[int]) -> int:
        return max((common(list(each), text) for each in self.kept), default=0)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(["put", "put", "find", "pop"]), TEXTS), max_size=40))
def test_it_finds_what_looking_at_all_texts_finds(moves):
    cache, plain, text_of = PrefixCache(), Plain(), {}
    for number, (move, text) in enumerate(moves):
        key = tuple(text)
        if move == "put":
            assert cache.put(text, number) == (key not in plain.kept)
            if key not in plain.kept:
                plain.kept[key] = number
                text_of[number] = key
            plain.use(key)
        elif move == "find":
            kv, found = cache.find(text)
            assert found == plain.find(text)
            if found:
                assert common(list(text_of[kv]), text) == found
                plain.use(text_of[kv])
        elif plain.kept:
            oldest = next(iter(plain.kept))
            assert cache.pop() == plain.kept.pop(oldest)
            assert not any(each[: len(oldest)] == oldest for each in plain.kept)  # it held pages of its own
        assert len(cache) == len(plain.kept)


@pytest.fixture(scope="module")
def decoder() -> TransformersDecoder:
    register()
    model = tiny_model()
    model.set_attn_implementation(ATTENTION)
    return TransformersDecoder(model)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_pages", "page_size"), [(1000, 1), (60, 1), (300, 4), (16, 4)])
def test_outputs_are_those_of_the_whole_text(decoder, num_pages, page_size, seed):
    """Problems come and go; texts repeat."""
    rng, plain = random.Random(seed), tiny_model()
    pool = small_pool(decoder, num_pages, page_size, max_tokens=rng.choice((7, 40, 1000)))
    pool.prefix_cache = True
    prompts, words = [tokens(rng, 9) for _ in range(2)], [tokens(rng, 3) for _ in range(3)]
    recorder, cached, forwarded = Recorder(decoder), 0, 0
    for _ in range(6):
        meter, prompt = Meter(), rng.choice(prompts)[: rng.randint(5, 9)]
        tree = [TokenBranch(meter, tokens=list(prompt), given=len(prompt))]
        grown: list[TokenBranch] = []
        for round_ in range(3):
            parents = rng.choices(tree, k=rng.randint(1, 4))
            wanted = [TokenBranch(meter, parent, parent.length, list(rng.choice(words))) for parent in parents]
            for branch in wanted:
                if rng.random() < 0.3:
                    branch.marks = [branch.start]
            if not round_:
                wanted.append(tree[0])
            for branch, output in run(pool, wanted, recorder).items():
                exact = plain.model(torch.tensor([branch.path()]), use_cache=False).last_hidden_state[0, -1]
                assert (output - exact).abs().max() <= 1e-4 * exact.abs().max()
            grown += wanted
            tree += [branch for branch in wanted if branch not in tree]
            pool.release(released := rng.sample(tree[1:], k=rng.randint(0, len(tree) - 1)))
            tree = [branch for branch in tree if branch not in released]
        if rng.random() < 0.5:
            pool.close(meter)
        else:
            pool.release(grown)
        assert (meter.logical, meter.unique) == (0, 0)
        cached += meter.cached
        forwarded += meter.prompt + meter.read + meter.recomputed
    assert sum(recorder.sizes) == forwarded
    assert cached > 0
    pool.prefix_cache = False
    assert pool.pool.forest.stats().pages_free == num_pages


def test_a_prompt_is_found_while_it_is_in_use_and_after(decoder):
    pool = small_pool(decoder, 100)
    pool.prefix_cache = True
    prompt = list(range(10, 30))
    first = TokenBranch(Meter(), tokens=list(prompt), given=20)
    run(pool, [first], Recorder(decoder))
    second = TokenBranch(Meter(), tokens=[*prompt[:15], 99, 98], given=17)
    run(pool, [second], recorder := Recorder(decoder))
    assert recorder.sizes == [2]
    assert (second.meter.cached, second.meter.prompt) == (15, 2)
    pool.release([first, second])
    third = TokenBranch(Meter(), tokens=[*prompt[:15], 99, 98, 97], given=18)
    run(pool, [third], recorder := Recorder(decoder))
    assert recorder.sizes == [1]
    again = TokenBranch(Meter(), tokens=list(prompt), given=20)
    run(pool, [again], recorder := Recorder(decoder))
    assert recorder.sizes == [1]  # the last token is read for its output


def test_prompts_that_begin_alike_are_read_once_though_they_come_at_once(decoder):
    pool = small_pool(decoder, 100)
    pool.prefix_cache = True
    prompt, other = list(range(10, 30)), list(range(40, 47))
    texts = [prompt, prompt, [*prompt[:15], 99, 98], other, [*other[:2], 97, 96, 95, 94, 93]]
    branches = [TokenBranch(Meter(), tokens=list(text), given=len(text)) for text in texts]
    found = run(pool, branches, recorder := Recorder(decoder))
    assert len(found) == len(texts)
    assert recorder.sizes == [20 + 7 + 7, 1 + 2]  # the last one shares less than half
    assert [branch.meter.cached for branch in branches] == [0, 19, 15, 0, 0]
    plain = tiny_model()
    for branch, output in found.items():
        exact = plain.model(torch.tensor([branch.path()]), use_cache=False).last_hidden_state[0, -1]
        assert (output - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_what_lies_behind_a_wanted_place_is_read_again(decoder):
    pool = small_pool(decoder, 100)
    pool.prefix_cache = True
    for marks in ([], [4, 7]):
        branch = TokenBranch(Meter(), tokens=list(range(10, 20)), given=10, marks=marks)
        run(pool, [branch], recorder := Recorder(decoder))
        pool.release([branch])
    assert recorder.sizes == [6]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    return (
        save_checkpoint(folder / "policy", talkative(tiny_model())),
        save_checkpoint(folder / "verifier", tiny_model("qwen2", seed=3), verifier=READING),
    )


def same(result: Any) -> Any:
    return result.completions, result.tree.to_json()


@pytest.mark.parametrize("name", ["best_of_n", "beam_search", "lookahead"])
def test_searches_are_the_same_to_the_bit(paths, name):
    fresh, kept = ((HFPolicy(paths[0], kv_memory="4MiB"), HFVerifier(paths[1], kv_memory="4MiB")) for _ in range(2))
    for problems in (PROBLEMS, PROBLEMS[::-1], PROBLEMS[:1]):
        expected = search(problems, *fresh, CONFIGS[name], progress=False, prefix_cache=False)
        found = search(problems, *kept, CONFIGS[name], progress=False)
        assert list(map(same, found)) == list(map(same, expected))
        assert all(result.stats.cached_tokens == 0 for result in expected)
    assert all(result.stats.cached_tokens > 20 for result in found)
    for driver in kept:
        assert driver._pool.pool.forest.stats().branches > 0
        driver.prefix_cache = False
        assert driver._pool.pool.forest.stats().branches == 0


def test_a_conversation_goes_on_where_it_was(paths):
    policy = HFPolicy(paths[0], kv_memory="4MiB")
    policy.prefix_cache = True
    (first,) = whole(parts_of(policy, request(0, 1, max_tokens=20, ignore_eos=True))[0])
    sizes: list[int] = []
    logits = policy.decoder.logits
    policy.decoder.logits = lambda batch, kv, rows=None: (sizes.append(len(batch.tokens)), logits(batch, kv, rows))[1]  # type: ignore[method-assign]
    parts_of(policy, request(1, 1, (*request().tokens, *first.tokens[:-1], 50, 51), max_tokens=1))
    assert sizes == [2]
