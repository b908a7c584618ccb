"""Logits of a branch of the lean decoder are the same bits for any other rows, and in any division into forwards."""

from __future__ import annotations

import random

import pytest
import torch
from test_llama_decoder import lean, model_of
from torch import Tensor
from tts_search.models.decoder import KVPool
from tts_search.models.llama import LlamaDecoder

LENGTH = 2100


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def decoder(request: pytest.FixtureRequest) -> LlamaDecoder:
    torch.manual_seed(0)
    return lean(model_of("llama", max_position_embeddings=4096).to(request.param))


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(100), k=count)


def pool_of(decoder: LlamaDecoder, pages: int = 1500) -> KVPool:
    return KVPool(decoder.shape, pages, 16, decoder.dtype)


def logits_in_chunks(decoder: LlamaDecoder, pool: KVPool, branch: int, text: list[int], rows: int) -> Tensor:
    """Of the last token."""
    for begin in range(0, len(text), rows):
        logits = decoder.logits(pool.pack([branch], [text[begin : begin + rows]]), pool.kv)
    return logits[-1]


def test_chunks_of_a_prefill(decoder: LlamaDecoder) -> None:
    text = tokens(LENGTH, 0)
    pool = pool_of(decoder)
    whole = logits_in_chunks(decoder, pool, pool.forest.add_root(), text, LENGTH)
    for rows in (2048, 64, 7):
        pool = pool_of(decoder)
        assert torch.equal(logits_in_chunks(decoder, pool, pool.forest.add_root(), text, rows), whole), rows
    short = text[:150]
    pool = pool_of(decoder)
    one_by_one = logits_in_chunks(decoder, pool, pool.forest.add_root(), short, 1)
    pool = pool_of(decoder)
    assert torch.equal(logits_in_chunks(decoder, pool, pool.forest.add_root(), short, 150), one_by_one)


@pytest.mark.parametrize("shared", [300, 512, 1000])
def test_a_branch_among_64_others(decoder: LlamaDecoder, shared: int) -> None:
    """They share a prompt and go on on their own; then one of them, evicted, is computed again from its text."""
    prompt, own = tokens(shared, 1), tokens(90, 2)
    pool = pool_of(decoder)
    alone = pool.forest.add_root()
    expected = [logits_in_chunks(decoder, pool, alone, prompt + own[:1], 4096)]
    expected += [logits_in_chunks(decoder, pool, alone, [token], 1) for token in own[1:]]

    pool = pool_of(decoder)
    root = pool.forest.add_root()
    logits_in_chunks(decoder, pool, root, prompt, 4096)
    branches = pool.forest.fork([root] * 65)
    pool.forest.free([root])
    at, rng = 23, random.Random(3)
    for step, token in enumerate(own):
        some = [b for i, b in enumerate(branches) if i == at or rng.random() < 0.7]
        new = [[token] if b == branches[at] else tokens(rng.choice([1, 1, 1, 9]), rng.randrange(99)) for b in some]
        logits = decoder.logits(pool.pack(some, new), pool.kv)
        row = sum(len(t) for b, t in zip(some, new, strict=True) if some.index(b) <= some.index(branches[at])) - 1
        assert torch.equal(logits[row], expected[step]), step

    pool.forest.free(branches)
    again = pool.forest.add_root()
    assert torch.equal(logits_in_chunks(decoder, pool, again, prompt + own, 64), expected[-1])
