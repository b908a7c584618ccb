"""The branch pool: each branch's output is that of its full text, whatever is evicted, released or cut."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import small_pool, tiny_model
from torch import Tensor
from tts_search.models.branches import TokenBranch
from tts_search.models.decoder import Batch, DecoderShape
from tts_search.models.meter import Meter
from tts_search.models.pool import BranchPool, PoolTooSmallError
from tts_search.models.reading import ReadStreams
from tts_search.models.sizing import parse_bytes
from tts_search.models.streams import Lane
from tts_search.models.transformers import ATTENTION, TransformersDecoder, register


@pytest.fixture(scope="module")
def decoder() -> TransformersDecoder:
    register()
    model = tiny_model()
    model.set_attn_implementation(ATTENTION)
    return TransformersDecoder(model)


@pytest.fixture(scope="module")
def plain():
    return tiny_model()


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(7, 250) for _ in range(count)]


class Recorder:
    """`Decoder.hidden` that counts the tokens it is given."""

    def __init__(self, decoder: TransformersDecoder) -> None:
        self.decoder = decoder
        self.sizes: list[int] = []

    def __call__(self, batch: Batch, kv, rows: Tensor | None) -> Tensor:
        self.sizes.append(batch.tokens.numel())
        return self.decoder.hidden(batch, kv, rows)


def run(pool: BranchPool, branches: list[TokenBranch], model) -> dict[TokenBranch, Tensor]:
    """Read branches to their ends, as far as there is room at a time; the output of each one's last token."""
    reading = ReadStreams(Lane(Wrapped(model), pool))
    reads = [reading.submit(branch) for branch in branches]
    outputs: dict[TokenBranch, Tensor] = {}
    while reading.busy:
        for read in reading.step():
            assert read.error is None
            assert read.places[-1] == (read.branch, read.branch.length - 1)
            outputs[read.branch] = read.outputs[-1][-1]
    assert outputs.keys() == {read.branch for read in reads}
    assert not pool.workers
    return outputs


@dataclass
class Wrapped:
    """A decoder whose ``hidden`` is this."""

    hidden: Any


# Rotary factors of short texts and of those of more than 12 tokens.
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 12,
    "short_factor": [1.0] * 8, "long_factor": [1, 1.2, 1.5, 2, 3, 4, 6, 8.0],
}  # fmt: skip


@pytest.fixture(scope="module")
def switching() -> tuple[TransformersDecoder, Any]:
    """A decoder with a switch, and its model with its own attention."""
    register()
    model, plain = (tiny_model(rope_parameters=LONGROPE, max_position_embeddings=96) for _ in range(2))
    model.set_attn_implementation(ATTENTION)
    decoder = TransformersDecoder(model)
    assert decoder.shape.switch == 12
    return decoder, plain


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("num_pages", "page_size"), [(1000, 1), (60, 1), (300, 4), (15, 4)])
def test_random_trees(decoder: TransformersDecoder, plain, num_pages: int, page_size: int, seed: int) -> None:
    check_random_trees(decoder, plain, num_pages, page_size, seed)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("num_pages", "page_size"), [(1000, 1), (60, 1), (300, 4), (15, 4)])
def test_random_trees_of_a_decoder_with_a_switch(switching: Any, num_pages: int, page_size: int, seed: int) -> None:
    decoder, plain = switching
    check_random_trees(decoder, plain, num_pages, page_size, seed)


def check_random_trees(decoder: TransformersDecoder, plain: Any, num_pages: int, page_size: int, seed: int) -> None:
    rng = random.Random(seed)
    pool = small_pool(decoder, num_pages, page_size, max_tokens=rng.choice((7, 40, 1000)))
    recorder = Recorder(decoder)
    meters = [Meter(), Meter()]
    tree = [TokenBranch(meter, tokens=(prompt := tokens(rng, 9)), given=len(prompt)) for meter in meters]
    grown: list[TokenBranch] = []
    for _ in range(8):
        parents = rng.choices(tree, k=rng.randint(1, 5))
        wanted = [*tree[:2]] if not grown else []
        for parent in parents:
            start = rng.randint(max(parent.start, parent.length - 2), parent.length)
            wanted.append(TokenBranch(parent.meter, parent, start, tokens(rng, rng.randint(1, 6))))
        wanted = [branch for branch in wanted if branch.length < 50]
        outputs = run(pool, list(wanted), recorder)
        assert outputs.keys() == set(wanted)
        for branch, output in outputs.items():
            exact = plain.model(torch.tensor([branch.path()]), use_cache=False).last_hidden_state[0, -1]
            assert (output - exact).abs().max() <= 1e-4 * exact.abs().max()
        grown += wanted
        tree = [*tree, *(branch for branch in wanted if branch not in tree)]
        pool.release(released := rng.sample(tree[2:], k=rng.randint(0, len(tree[2:]) // 2)))
        tree = [branch for branch in tree if branch not in released]
        stats = pool.pool.forest.stats()
        assert sum(meter.logical for meter in meters) == stats.logical_tokens
        if page_size == 1:  # else copies of pages that are not full count twice there
            assert sum(meter.unique for meter in meters) == stats.unique_tokens
    assert sum(recorder.sizes) == sum(meter.prompt + meter.read + meter.recomputed for meter in meters)
    assert max(recorder.sizes) <= pool.max_tokens
    assert sum(meter.prompt for meter in meters) == 18
    assert sum(meter.read for meter in meters) == sum(len(branch.tokens) for branch in {*grown} - {*tree[:2]})
    if num_pages * page_size > 1000:
        assert (sum(meter.recomputed for meter in meters) > 0) == (decoder.shape.switch is not None)
    assert max(meter.peak_unique for meter in meters) <= num_pages * page_size
    pool.release(grown)
    assert pool.pool.forest.stats().pages_free == num_pages
    assert all((meter.logical, meter.unique) == (0, 0) for meter in meters)


def test_a_pool_that_is_too_small_did_make_branches_wait(decoder: TransformersDecoder) -> None:
    """What the small pool of the test above is for."""
    rng = random.Random(0)
    pool = small_pool(decoder, 30, page_size=1)
    meter = Meter()
    root = TokenBranch(meter, tokens=tokens(rng, 10), given=10)
    children = [TokenBranch(meter, root, 10, tokens(rng, 8)) for _ in range(5)]
    reading = ReadStreams(Lane(decoder, pool))
    reads = [reading.submit(child) for child in children]
    assert reading.step() == reads[:2]
    assert [child.kv is None for child in children] == [False, False, True, True, True]
    assert reading.step() == reads[2:4]
    assert [child.kv is None for child in children] == [True, True, False, False, True]
    assert reading.step() == reads[4:]
    assert meter.waves > 0
    assert meter.recomputed == 0
    run(pool, [TokenBranch(meter, children[0], 18, tokens(rng, 1))], decoder.hidden)
    assert meter.recomputed == 8


@pytest.mark.parametrize(("page_size", "sizes"), [(1, [8]), (3, [6, 2]), (4, [3, 2, 3])])
def test_ancestors_come_along(decoder: TransformersDecoder, page_size: int, sizes: list[int]) -> None:
    """In the same forward, unless a branch has to copy a page that is only written then."""
    pool = small_pool(decoder, 100, page_size)
    meter, recorder = Meter(), Recorder(decoder)
    root = TokenBranch(meter, tokens=[10, 11, 12], given=3)
    middle = TokenBranch(meter, root, 3, [13, 14])
    leaves = [TokenBranch(meter, middle, 5, [15]), TokenBranch(meter, middle, 5, [16, 17])]
    if page_size == 3:
        middle.tokens.append(18)
        leaves = [TokenBranch(meter, root, 3, [15, 16, 17]), TokenBranch(meter, root, 2, [16, 17])]
    run(pool, list(leaves), recorder)
    assert recorder.sizes == sizes
    assert (meter.prompt, meter.read, meter.recomputed) == (3, 5, 0)


def test_outputs_of_marked_positions(decoder: TransformersDecoder, plain) -> None:
    pool = small_pool(decoder, 100, max_tokens=4)
    root = TokenBranch(Meter(), tokens=[10, 11, 12, 13, 14, 15], marks=[1, 4, 5])
    child = TokenBranch(root.meter, root, 5, [16, 17, 18], marks=[6])
    rows, outputs = [], []
    while root.pending or child.pending:
        result = pool.forward([branch for branch in (root, child) if branch.pending], decoder.hidden, head=False)
        rows += result.places
        outputs += result.outputs
    assert rows == [(root, 1), (root, 4), (root, 5), (child, 6), (child, 7)]
    for (branch, position), output in zip(rows, outputs, strict=True):
        exact = plain.model(torch.tensor([branch.path()])).last_hidden_state[0, position]
        assert torch.allclose(output, exact, atol=1e-4)


def test_a_released_parent_is_taken_back_from_its_child(decoder: TransformersDecoder) -> None:
    pool = small_pool(decoder, 100)
    meter = Meter()
    root = TokenBranch(meter, tokens=[10, 11, 12], given=3)
    child = TokenBranch(meter, root, 3, [13])
    run(pool, [child], decoder.hidden)
    pool.release([root])
    sibling = TokenBranch(meter, root, 3, [14])
    run(pool, [sibling], decoder.hidden)
    assert meter.recomputed == 0
    assert root.kv is None
    assert meter.logical == pool.pool.forest.stats().logical_tokens == 8


def test_a_branch_larger_than_the_pool_is_an_error_and_others_go_on(decoder: TransformersDecoder) -> None:
    rng = random.Random(0)
    pool = small_pool(decoder, 5)
    small, large = (TokenBranch(Meter(), tokens=tokens(rng, count)) for count in (6, 21))
    reading = ReadStreams(Lane(decoder, pool))
    first, second = reading.submit(large), reading.submit(small)
    assert [*reading.step(), *reading.step()] == [first, second]
    assert isinstance(first.error, PoolTooSmallError)
    assert "KV pool of 20 tokens is too small for one branch of 21 tokens" in str(first.error)
    assert large.kv is None
    assert second.error is None
    assert small.pending == 0


def test_a_forward_that_fails_leaves_no_half_written_branch(decoder: TransformersDecoder, plain) -> None:
    pool = small_pool(decoder, 100)
    root = TokenBranch(Meter(), tokens=[10, 11, 12])
    child = TokenBranch(root.meter, root, 3, [13, 14])

    def interrupted(*_) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.forward([child], interrupted, head=False)
    assert pool.pool.forest.stats().pages_free == 100
    (output,) = run(pool, [child], decoder.hidden).values()
    exact = plain.model(torch.tensor([[10, 11, 12, 13, 14]])).last_hidden_state[0, -1]
    assert torch.allclose(output, exact, atol=1e-4)


def test_rewind_and_trim(decoder: TransformersDecoder, plain) -> None:
    pool = small_pool(decoder, 100)
    branch = TokenBranch(Meter(), tokens=[10, 11, 12, 13])
    first = run(pool, [branch], decoder.hidden)[branch]
    pool.rewind(branch)
    assert branch.pending == 1
    assert torch.allclose(run(pool, [branch], decoder.hidden)[branch], first, atol=1e-4)
    assert (branch.meter.read, branch.meter.recomputed) == (5, 0)
    pool.trim(branch, 2)
    pool.rewind(branch)
    exact = plain.model(torch.tensor([[10, 11]])).last_hidden_state[0, -1]
    assert torch.allclose(run(pool, [branch], decoder.hidden)[branch], exact, atol=1e-4)


def test_flops_are_two_a_weight_and_four_a_head_dimension_and_key(decoder: TransformersDecoder) -> None:
    pool = small_pool(decoder, 100)
    branch = TokenBranch(Meter(), tokens=[10, 11, 12])
    pool.forward([branch], decoder.logits, head=True)
    shape = decoder.shape
    attention = 4 * 3 * 4 * 16 * (1 + 2 + 3)
    assert branch.meter.usage(pool.pool).flops == 2 * shape.body_parameters * 3 + 2 * shape.head_parameters + attention
    assert shape.kv_bytes(torch.bfloat16) == 2 * 3 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("size", "number"), [(5, 5), ("5", 5), ("2GiB", 2**31), ("1.5 kB", 1500), ("3mib", 3 * 2**20), ("1T", 10**12)]
)
def test_sizes(size: int | str, number: int) -> None:
    assert parse_bytes(size) == number


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "", "GiB", "2 XB", "0", "1e9", None])
def test_sizes_that_are_none(size) -> None:
    with pytest.raises(ValueError, match="kv_memory"):
        parse_bytes(size)


def test_shapes_are_values() -> None:
    assert DecoderShape(1, 2, 1, 4, 8, 9, 9) == DecoderShape(1, 2, 1, 4, 8, 9, 9)
