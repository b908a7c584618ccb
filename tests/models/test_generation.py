"""Text after any tokens, token by token: stops, log-probabilities, streaming, cancelling, together with searches."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_policy import EOS, NL2, TOKENIZER, Scripted, expand
from tiny import save_checkpoint, small_pool, talkative, tiny_model
from tts_search import Engine, HFPolicy, SearchConfig, SearchError, Step, TextPolicy, search
from tts_search.models.texts import Stops
from tts_search.search.protocol import Generate, Generated, GenerateParams

import tts_kernels as tk

PROMPT = tuple(TOKENIZER("The sum is", add_special_tokens=False)["input_ids"])
C = TOKENIZER.convert_tokens_to_ids("c")
SCHEDULE = ["a", "b", "Ã", "©", ".", "#", "#", "c", "#", "x", NL2, "d", EOS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("policy"), talkative(tiny_model()))


@pytest.fixture(scope="module")
def shared(checkpoint: str) -> HFPolicy:
    return HFPolicy(checkpoint, kv_memory="4MiB")


@pytest.fixture
def policy(checkpoint: str) -> HFPolicy:
    return HFPolicy(checkpoint, kv_memory="4MiB")


def request(number: int = -1, samples: int = 1, tokens: tuple[int, ...] = PROMPT, **params: Any) -> Generate:
    own = GenerateParams(**{"max_tokens": 24, **params})
    return Generate(tokens, own, samples, tuple(range(7, 7 + samples)), number)


def parts_of(policy: HFPolicy, *requests: Generate) -> dict[int, list[Any]]:
    """All answers to each request, by its number."""
    policy.submit(requests)
    found: dict[int, list[Any]] = {one.problem: [] for one in requests}
    while policy._jobs:
        for one, part in policy.step():
            assert isinstance(one, Generate)
            found[one.problem].append(part)
    return found


def whole(parts: list[Generated]) -> list[Generated]:
    samples = sorted({part.sample for part in parts})
    return [Generated.joined([part for part in parts if part.sample == one]) for one in samples]


def say(policy: HFPolicy, pieces: list[str | int]) -> list[int]:
    """Let the policy's model say these behind `PROMPT`."""
    ids = [piece if isinstance(piece, int) else TOKENIZER.convert_tokens_to_ids(piece) for piece in pieces]
    policy._lane.decoder = Scripted(len(PROMPT), ids)
    policy._lane.pool = small_pool(policy.decoder, 100)
    return ids


@pytest.mark.parametrize(
    ("params", "text", "num_tokens", "reason", "stop"),
    [
        ({}, "abé.##c#x\n\nd", 13, "eos", EOS),
        ({"stop": ("#x",)}, "abé.##c", 10, "stop", "#x"),
        ({"stop": ("#x",), "keep_stop": True}, "abé.##c#x", 10, "stop", "#x"),
        ({"stop": ("zz", "b", "ab")}, "", 2, "stop", "ab"),  # of those that are complete, the one that begins first
        ({"stop": ("\n",)}, "abé.##c#x", 11, "stop", "\n"),
        ({"stop": ("é.#", "###")}, "ab", 6, "stop", "é.#"),
        ({"stop_ids": (C,)}, "abé.##", 8, "stop", C),
        ({"max_tokens": 3}, "ab", 3, "length", None),  # half of a character is no text
        ({"max_tokens": 5}, "abé.", 5, "length", None),
        ({"ignore_eos": True, "max_tokens": 13}, "abé.##c#x\n\nd", 13, "length", None),
        ({"stop": ("#",), "min_tokens": 7}, "abé.#", 7, "stop", "#"),
        ({"stop": ("##c",), "min_tokens": 7}, "abé.##c#x\n\nd", 13, "eos", EOS),  # a part of it came too early
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [True, False])
def test_where_a_text_ends(policy, params, text, num_tokens, reason, stop, stream):
    ids = say(policy, [*SCHEDULE, "x"])
    parts = parts_of(policy, request(temperature=0.0, stream=stream, **params))[-1]
    (found,) = whole(parts)
    assert (found.text, found.reason, found.stop) == (text, reason, stop)
    assert list(found.tokens) == ids[:num_tokens]
    assert len(parts) == (num_tokens if stream else 1)
    assert [part.reason for part in parts[:-1]] == [None] * (len(parts) - 1)


def test_nothing_is_told_that_a_stop_or_a_character_takes_back(policy):
    say(policy, SCHEDULE)
    parts = parts_of(policy, request(temperature=0.0, stop=("##x", "#x")))[-1]
    assert [part.text for part in parts] == ["a", "b", "", "é", ".", "", "", "##c", "", ""]
    assert [len(part.tokens) for part in parts] == [1] * 10


@settings(max_examples=200)
@given(st.text("ab#\ufffd", max_size=8), st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3))
def test_what_is_safe_stays_whatever_comes(text, pieces):
    stops = Stops(tuple(pieces), frozenset(), frozenset(), "nothing")
    if stops.find(text) is not None:
        return
    safe = text[: stops.safe(text)]
    for more in ("", "a", "b#", "##", *pieces, *(piece[1:] for piece in pieces)):
        later = text.rstrip("\ufffd") + more
        found = stops.find(later)
        assert (later if found is None else found[0]).startswith(safe)


def test_draws_and_logprobs_are_those_of_the_model_itself(shared):
    plain = talkative(tiny_model())
    parts = parts_of(shared, request(0, 2, logprobs=3, temperature=0.9, top_k=40, min_p=0.02, max_tokens=12))[0]
    for found, seed in zip(whole(parts), (7, 8), strict=True):
        assert len(found.logprobs) == len(found.top) == len(found.tokens)
        for at, token in enumerate(found.tokens):
            logits = plain(torch.tensor([[*PROMPT, *found.tokens[:at]]]), use_cache=False).logits[0, -1:]
            draw = tk.sample(
                logits, temperature=0.9, top_k=40, min_p=0.02, seeds=torch.tensor([seed]), offsets=torch.tensor([at])
            )
            assert token == draw.tokens.item()
            assert found.logprobs[at] == pytest.approx(draw.logprobs.item(), abs=1e-3)
            values, ids = logits.log_softmax(-1)[0].topk(3)
            assert [each for each, _ in found.top[at]] == ids.tolist()
            assert [value for _, value in found.top[at]] == pytest.approx(values.tolist(), abs=1e-3)


def test_what_ends_a_text_is_not_drawn_before_its_time(policy):
    say(policy, ["a", EOS, "b", EOS, *"cdabcd"])
    for least in (0, 1, 2, 5):
        (found,) = whole(parts_of(policy, request(temperature=0.0, min_tokens=least, max_tokens=8))[-1])
        early = [token for token in found.tokens[:least] if token == EOS]
        assert not early
        assert len(found.tokens) >= max(2, least)


def test_prompts_are_told_of_as_the_model_itself_finds_them(shared):
    plain = talkative(tiny_model())
    prompt = (*PROMPT, *range(40, 70))
    expected = plain(torch.tensor([prompt]), use_cache=False).logits[0, :-1].log_softmax(-1)
    for _ in range(2):  # what the cache holds changes nothing
        shared.prefix_cache = True
        alone, found = parts_of(
            shared, request(0, 2, prompt, max_tokens=3), request(1, 2, prompt, prompt_logprobs=3, max_tokens=3)
        ).values()
        assert [one.text for one in whole(found)] == [one.text for one in whole(alone)]
        told = whole(found)[0].prompt
        assert whole(found)[1].prompt == whole(alone)[0].prompt == ()
        assert [value for value, _ in told] == pytest.approx(
            expected[range(len(prompt) - 1), list(prompt[1:])].tolist(), abs=1e-3
        )
        values, ids = expected.topk(3)
        assert [[token for token, _ in top] for _, top in told] == ids.tolist()
        assert [[value for _, value in top] for _, top in told] == [
            pytest.approx(line, abs=1e-3) for line in values.tolist()
        ]
    shared.prefix_cache = False
    shared.submit([request(5, 1, prompt, prompt_logprobs=0)])
    shared.cancel(5)
    assert not shared._told
    assert shared._pool.pool.forest.stats().branches == 0


def test_certain_tokens_are_told_of(shared):
    plain = talkative(tiny_model())
    (found,) = whole(parts_of(shared, request(0, 1, logprobs=1, logprobs_of=(50, 3), max_tokens=2))[0])
    expected = plain(torch.tensor([PROMPT]), use_cache=False).logits[0, -1].log_softmax(-1)
    assert [token for token, _ in found.top[0]] == [int(expected.argmax()), 50, 3]
    assert [value for _, value in found.top[0][1:]] == pytest.approx(expected[[50, 3]].tolist(), abs=1e-3)


def test_streamed_or_at_once_alone_or_beside_others_it_is_the_same_text(shared):
    alone = whole(parts_of(shared, request(0, 3))[0])
    assert whole(parts_of(shared, request(0, 3, stream=False))[0]) == alone
    others = [request(number, 2, PROMPT[:number], logprobs=number) for number in range(1, 5)]
    shared.begin(99, "What?")
    step = expand(0, (1, 2), problem=99)
    shared.submit([step])
    steps: list[Any] = []
    shared.submit([request(0, 3), *others])
    told: list[Generated] = []
    while shared._jobs:
        for one, answer in shared.step():
            if one is step:
                steps = answer
            elif one.problem == 0:
                told.append(answer)
    assert [(each.text, each.tokens) for each in whole(told)] == [(each.text, each.tokens) for each in alone]
    assert all(isinstance(each, Step) for each in steps)
    shared.end(99)
    assert not shared._pool.workers


def test_a_long_text_is_decoded_in_pieces(policy):
    pieces = list(itertools.islice(itertools.cycle(["a", "Ã", "©", "Ġ", "the", NL2, "Ġthe"]), 200))
    ids = say(policy, [*pieces, EOS])
    parts = parts_of(policy, request(temperature=0.0, max_tokens=None))[-1]
    assert "".join(part.text for part in parts) == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert len(parts) == 201


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(tokens=()), "the prompt has no tokens"),
        (request(tokens=(10**6,)), "tokens: expected ids from 0 to"),
        (request(tokens=(5,) * 512), "leaves no room in the model's context of 512 tokens"),
        (replace(request(), seeds=(1, 2)), "seeds: expected 1, one per sample, got 2"),
        (request(max_tokens=0), "max_tokens: expected at least 1, got 0"),
        (request(stop=("",)), "stop: expected texts that are not empty"),
        (request(temperature=-1.0), "temperature: "),
        (request(top_p=0.0), "top_p: "),
        (request(top_k=-1), "top_k: "),
        (request(min_p=2.0), "min_p: "),
        (request(logprobs=-1), "logprobs: "),
    ],
)
def test_bad_requests_fail_alone(shared, bad, message):
    good = request(3)
    found = parts_of(shared, replace(bad, problem=4), good)
    (error,) = found[4]
    assert message in str(error)
    assert found[3][-1].reason is not None


def test_cancelling_frees(policy):
    policy.submit([request(0, 2), request(1, 2)])
    for _ in range(3):
        policy.step()
    policy.cancel(0)
    assert {one.problem for one, _ in policy.step()} == {1}
    while policy._jobs:
        policy.step()
    assert policy._pool.pool.forest.stats().unique_tokens == 0


class TestEngine:
    def test_parts_and_results(self, policy):
        expected = whole(parts_of(policy, request(0, 2, logprobs=2))[0])
        with Engine(policy) as engine:
            generation = engine.generate(request(0, 2, logprobs=2))
            assert generation.result(60) == expected
            assert whole(list(generation.events())) == expected

    def test_async(self, policy):
        async def main() -> tuple[list[Generated], list[Generated]]:
            with Engine(policy) as engine:
                generation = engine.generate(request(0, 2))
                parts = [part async for part in generation]
                return whole(parts), await generation

        streamed, result = asyncio.run(main())
        assert streamed == result

    def test_beside_a_search(self, policy, checkpoint):
        config = SearchConfig("best_of_n", n=4, max_step_tokens=16)
        (expected,) = search(["What?"], HFPolicy(checkpoint, kv_memory="4MiB"), config=config, progress=False)
        with Engine(policy) as engine:
            generation = engine.generate(request(0, 2))
            found = engine.submit("What?", config)
            assert [one.text for one in found.result(60).completions] == [one.text for one in expected.completions]
            assert len(generation.result(60)) == 2

    def test_cancelling_and_failing(self, policy):
        with Engine(policy) as engine:
            endless = engine.generate(request(0, 2, ignore_eos=True, max_tokens=None))
            next(endless.events())
            assert endless.cancel()
            with pytest.raises(SearchError, match="the prompt has no tokens"):
                engine.generate(request(tokens=())).result(60)
            assert engine.generate(request()).result(60)
            assert engine.num_streams == 0
        policy.prefix_cache = False
        assert policy._pool.pool.forest.stats().unique_tokens == 0

    def test_only_local_models_generate(self):
        with Engine(TextPolicy(lambda _: [])) as engine, pytest.raises(SearchError, match="a policy of a local model"):
            engine.generate(request()).result(60)


def test_max_rows_bounds_a_forward(checkpoint: str):
    policy = HFPolicy(checkpoint, kv_memory="4MiB")
    sizes: list[int] = []
    logits = policy.decoder.logits
    policy._lane.decoder.logits = lambda batch, kv, rows=None: (  # type: ignore[method-assign]
        sizes.append(len(batch.tokens)),
        logits(batch, kv, rows),
    )[1]
    with Engine(policy, max_rows=3) as engine:
        generation = engine.generate(request(0, 8))
        assert len(generation.result(60)) == 8
    assert max(sizes[1:]) <= 3
