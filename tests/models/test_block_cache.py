"""The block cache: what it stores, exact results without quantisation, the same bits in any division into forwards."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llama_decoder import model_of
from tiny import save_checkpoint
from torch import Tensor
from tts_search import HFPolicy, HFVerifier, SearchConfig, search
from tts_search.models import sizing
from tts_search.models.block_cache import (
    BlockForest,
    BlockPool,
    Kept,
    turned_back,
)
from tts_search.models.block_layers import BLOCK, KINDS, Quantiser, _svd, formats_of, kept_layers
from tts_search.models.decoder import KVPool
from tts_search.models.llama import LlamaDecoder
from tts_search.models.loading import lean_decoder
from tts_search.models.sizing import pool_for

import tts_kernels as tk

MODELS = files("tts_search.lab") / "models"
SOME = ("int4-channel", "xquant-8", "xquant-3", "xquant-cl-2")


class Identity(Quantiser):
    """Loses nothing: the bytes of float32."""

    @property
    def nbytes(self) -> int:
        return 4 * self.width

    def encode(self, x: Tensor) -> Tensor:
        return x.float().contiguous().view(torch.uint8)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return rows.contiguous().view(torch.float32).to(dtype)


def text(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def decoders() -> dict[str, LlamaDecoder]:
    """With fewer KV heads than query heads, biases, norms of heads; and with as many."""
    made = {}
    for name in ("llama", "qwen2", "qwen3", "mistral", "all heads", "one KV head"):
        few = {"num_key_value_heads": 1} if name == "one KV head" else {}
        wide = {"head_dim": 32} if name == "qwen3" else {}
        sizes = {"max_position_embeddings": 1024, "num_hidden_layers": 4}  # the fourth keeps changes in "xquant-cl"
        model = model_of("llama" if few else name, **few, **wide, **sizes)
        made[name] = lean_decoder(model)
    return made


def pool_of(decoder: LlamaDecoder, kind: str, quantiser: type[Quantiser] = Quantiser, blocks: int = 24) -> BlockPool:
    layers = kept_layers(kind, decoder.layers, decoder.shape.num_kv_heads, decoder.shape.head_dim, quantiser)
    return BlockPool(layers, decoder.shape, blocks, 8 * blocks, decoder.dtype, kind)


def read(decoder: LlamaDecoder, pool: KVPool, branch: int, tokens: list[int], step: int = BLOCK) -> Tensor:
    """Logits of the tokens, appended in parts of at most ``step`` that end with blocks."""
    parts = []
    while tokens:
        room = min(step, BLOCK - pool.forest.length(branch) % BLOCK)
        parts.append(decoder.logits(pool.pack([branch], [tokens[:room]]), pool.kv))
        tokens = tokens[room:]
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["xquant-4", "xquant-cl-4"])
@pytest.mark.parametrize("name", ["llama", "one KV head", "qwen2", "qwen3", "mistral", "all heads"])
def test_without_loss_the_logits_are_those_of_a_plain_cache(
    decoders: dict[str, LlamaDecoder], name: str, kind: str
) -> None:
    decoder, tokens = decoders[name], text(300)
    plain = KVPool(decoder.shape, 64, 16, decoder.dtype)
    want = decoder.logits(plain.pack([plain.forest.add_root()], [tokens]), plain.kv)
    pool = pool_of(decoder, kind, Identity)
    got = read(decoder, pool, pool.forest.add_root(), tokens)
    assert torch.equal(got[:BLOCK], want[:BLOCK])  # keys and values of a block that grows are what they are
    assert (got - want).norm() < 2e-4 * want.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["one KV head", "all heads"])
def test_more_bits_are_nearer(decoders: dict[str, LlamaDecoder], name: str, kind: str) -> None:
    decoder, tokens = decoders[name], text(200)

    def logits(kind: str, quantiser: type[Quantiser]) -> Tensor:
        pool = pool_of(decoder, kind, quantiser)
        return read(decoder, pool, pool.forest.add_root(), tokens)[BLOCK:]

    want, got, best = logits("xquant-8", Identity), logits(kind, Quantiser), logits("xquant-8", Quantiser)
    off, least = ((one - want).norm() / want.norm() for one in (got, best))
    assert 0 < least < 0.03
    assert off == least if kind == "xquant-8" else least < off < 1.3, off


def test_more_bits_for_channels_are_nearer(decoders: dict[str, LlamaDecoder]) -> None:
    decoder, tokens = decoders["qwen2"], text(400)
    pools = [pool_of(decoder, f"int{bits}-channel") for bits in (4, 3, 2)]
    plain = KVPool(decoder.shape, 64, 16, decoder.dtype)
    want, *got = (read(decoder, pool, pool.forest.add_root(), tokens)[BLOCK:] for pool in (plain, *pools))
    four, three, two = ((one - want).norm() / want.norm() for one in got)
    assert 0 < four < three < two < 1.3


def test_values_of_wide_heads_have_scales_for_equal_parts() -> None:
    decoder = lean_decoder(model_of("llama", head_dim=272, num_key_value_heads=1, max_position_embeddings=512))
    pool, plain = pool_of(decoder, "int4-channel"), KVPool(decoder.shape, 64, 16, decoder.dtype)
    assert pool.kv.layers[0].format.row.group == 68
    got, want = (read(decoder, each, each.forest.add_root(), text(150)) for each in (pool, plain))
    assert torch.equal(got[:BLOCK], want[:BLOCK])
    assert 0 < (got - want).norm() < 0.3 * want.norm()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_keys_have_a_range_for_each_channel_and_values_for_each_head(
    decoders: dict[str, LlamaDecoder], bits: int
) -> None:
    """Each number is off by at most half a step of its range, which is 1 / (2**bits - 1) of it, and by rounding."""
    decoder, tokens = decoders["qwen3"], text(BLOCK)
    pool, plain = pool_of(decoder, f"int{bits}-channel"), KVPool(decoder.shape, 8, 16, decoder.dtype)
    decoder.logits(plain.pack([plain.forest.add_root()], [tokens]), plain.kv)
    root = pool.forest.add_root()
    read(decoder, pool, root, tokens)
    kept, turns = pool.pack([root], [[5]]).kept, decoder.config.cos_sin
    assert isinstance(kept, Kept)
    for number, layer in enumerate(pool.kv.layers):
        pool.kv.restore(number, layer, kept, turns, decoder.config.eps, None)
        made = [pages[pool.kv.first :][: BLOCK // 16].flatten(0, 1).double() for pages in pool.kv.pages]
        want = [pages[number].flatten(0, 1).double() for pages in (plain.kv.k, plain.kv.v)]
        (k, v), (its_k, its_v) = ((turned_back(keys, turns[:BLOCK].double()), values) for keys, values in (made, want))
        for got, exact, over in ((k, its_k, 0), (v, its_v, 2)):
            low, high = exact.amin(over, keepdim=True), exact.amax(over, keepdim=True)
            rounding = 2.0**-10 * torch.maximum(low.abs(), high.abs())
            assert ((got - exact).abs() <= (high - low) / (2**bits - 1) / 2 + rounding).all()
            assert (got - exact).abs().max() > 0


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_same_bits_however_branches_were_read(decoders: dict[str, LlamaDecoder], data: st.DataObject) -> None:
    """Forks, truncation and parts of any length, beside others: as of the same text read alone, a block at a time."""
    decoder = decoders[data.draw(st.sampled_from(["one KV head", "qwen2", "all heads"]))]
    pool = pool_of(decoder, data.draw(st.sampled_from(SOME)))
    rng = data.draw(st.randoms(use_true_random=False))
    branches: dict[int, tuple[list[int], list[Tensor]]] = {pool.forest.add_root(): ([], [])}
    for _ in range(data.draw(st.integers(3, 9))):
        one = rng.choice(list(branches))
        if rng.random() < 0.4:
            (child,) = pool.forest.fork([one])
            branches[child] = ([*branches[one][0]], [*branches[one][1]])
        if rng.random() < 0.3:
            told, logits = branches[one]
            wanted = rng.randint(max(0, len(told) - 150), len(told))
            kept = pool.kept(one, wanted)
            pool.forest.truncate(one, wanted)
            assert pool.forest.length(one) == kept
            assert kept in (wanted, wanted - wanted % BLOCK)
            del told[kept:], logits[kept:]
        chosen = rng.sample(list(branches), min(len(branches), 3))
        new = {}
        for branch in chosen:
            room = BLOCK - pool.forest.length(branch) % BLOCK
            new[branch] = text(min(room, rng.choice([1, 2, 60, 128])), rng.randint(0, 3))
        out = decoder.logits(pool.pack(chosen, list(new.values())), pool.kv)
        for branch, part in zip(chosen, out.split([len(tokens) for tokens in new.values()]), strict=True):
            branches[branch][0].extend(new[branch])
            branches[branch][1].extend(part)
        if len(branches) > 4:
            gone = rng.choice(list(branches))
            pool.forest.free([gone])
            del branches[gone]
    alone = pool_of(decoder, pool.kv.dtype)
    for tokens, logits in branches.values():
        if tokens:
            root = alone.forest.add_root()
            assert torch.equal(torch.stack(logits), read(decoder, alone, root, tokens))
            alone.forest.free([root])
    pool.forest.free(list(branches))
    stats = pool.forest.stats()
    assert (stats.branches, stats.pages_free, stats.unique_tokens) == (0, stats.pages_total, 0)


def test_a_forest_without_room_has_changed_no_length() -> None:
    forest = BlockForest(2, 16)
    root = forest.add_root()
    forest.append([root], [BLOCK])
    children = forest.fork([root, root])
    forest.append(children[:1], [100])
    with pytest.raises(tk.OutOfPages):
        forest.append([children[1], children[0]], [BLOCK, 28])  # windows
    assert [forest.length(branch) for branch in (root, *children)] == [128, 228, 128]
    forest.append(children[:1], [28])
    with pytest.raises(tk.OutOfPages):
        forest.append(children[1:], [BLOCK])  # blocks
    with pytest.raises(ValueError, match=r"^counts: expected tokens of one block of 128, got 129 behind 0"):
        forest.append([root], [129])
    assert [forest.length(branch) for branch in (root, *children)] == [128, 256, 128]
    assert forest.kept(children[0], 200) == 200
    forest.truncate(children[0], 100)
    assert forest.length(children[0]) == 0
    forest.truncate(root, 90)
    assert forest.length(root) in (0, 90)


@pytest.mark.parametrize("kind", ["int4-channel", "xquant-8", "xquant-2", "xquant-cl-3"])
def test_a_search_is_the_same_in_any_room(kind: Any) -> None:
    """Forks, truncation, the prefix cache and branches that are read again: to the bit, across the ends of blocks."""
    config = SearchConfig("beam_search", n=4, expand=2, max_steps=5, max_step_tokens=9, lookahead=1, temperature=1.5)
    problems = [f"12+34{'-5' * length}" for length in (55, 58, 120, 119, 55)]

    def run(memory: str, **options: Any) -> list[Any]:
        models = [
            made(str(MODELS / name), dtype="float32", kv_memory=memory, self_test=False, decoder="lean", **options)
            for made, name in ((HFPolicy, "policy-0.1m"), (HFVerifier, "prm-weak"))
        ]
        results = search(problems, *models, config, progress=False)
        return [(one.tree.to_json(), one.completions, one.stats) for one in results]

    wide, tight = run("16MiB", kv_dtype=kind), run("1.5MiB", kv_dtype=kind)
    assert [one[:2] for one in tight] == [one[:2] for one in wide]
    assert sum(one[2].recomputed_tokens for one in tight) > sum(one[2].recomputed_tokens for one in wide)
    assert [one[:2] for one in wide] != [one[:2] for one in run("16MiB")]


@pytest.mark.parametrize("name", ["one KV head", "all heads"])
def test_bytes_of_a_token_are_those_of_the_formula(decoders: dict[str, LlamaDecoder], name: str) -> None:
    decoder = decoders[name]
    shape, hidden = decoder.shape, decoder.hidden_size
    width = shape.num_kv_heads * shape.head_dim
    for bits in (8, 4, 3, 2):  # e + 32 / g bits a number
        numbers = hidden if name == "all heads" else 2 * width
        scales = hidden / 64 if name == "all heads" else width / 128 + 1
        expected = shape.num_layers * (numbers * bits + 32 * scales) / 8
        forms = formats_of(f"xquant-{bits}", shape.num_layers, hidden, shape.num_kv_heads, shape.head_dim)
        assert sum(form.token_bytes for form in forms) == expected
    for bits in (4, 3, 2):
        scales = width / 128 + shape.num_kv_heads
        forms = formats_of(f"int{bits}-channel", shape.num_layers, hidden, shape.num_kv_heads, shape.head_dim)
        expected = shape.num_layers * (2 * width * bits + 32 * scales) / 8
        assert sum(form.token_bytes for form in forms) == expected


@pytest.mark.parametrize("kind", ["int4-channel", "xquant-3"])
@pytest.mark.parametrize("name", ["one KV head", "all heads"])
def test_a_pool_fills_its_memory_with_branches_of_1024_tokens(
    decoders: dict[str, LlamaDecoder], name: str, kind: Any
) -> None:
    pool = pool_for(decoders[name], "3MiB", kv_dtype=kind)
    assert isinstance(pool, BlockPool)
    assert 2.9 * 2**20 < pool.kv.nbytes <= 3 * 2**20

    def fill(*counts: int) -> None:
        while True:
            root = pool.forest.add_root()
            for count in counts:
                pool.forest.append([root], [count])

    with pytest.raises(tk.OutOfPages):
        fill(*[BLOCK] * (1024 // BLOCK))
    stats = (pool.forest.blocks.stats(), pool.forest.windows.stats())
    assert all(each.pages_free < 0.4 * each.pages_total for each in stats)


@pytest.mark.parametrize("kind", ["int4-channel", "xquant-8"])
def test_the_least_memory_is_enough_for_a_search(kind: Any) -> None:
    config = SearchConfig("best_of_n", n=2, max_tokens=8, temperature=1.5)
    options: dict[str, Any] = {"dtype": "float32", "self_test": False, "decoder": "lean", "kv_dtype": kind}
    with pytest.raises(ValueError, match=r"^kv_memory: expected room for 128 tokens \((\d+) bytes\)") as told:
        HFPolicy(str(MODELS / "policy-0.1m"), kv_memory=1, **options)
    least = int(str(told.value).split("(")[1].split()[0])
    problem = f"12+34{'-5' * 55}"  # its tokens and those of both texts fit into one window and a page

    def run(**memory: Any) -> Any:
        policy = HFPolicy(str(MODELS / "policy-0.1m"), **options, **memory)
        return search([problem], policy, None, config, progress=False)[0].completions

    assert run(kv_memory=least) == run(kv_memory="16MiB")


@pytest.mark.parametrize("length", [256, 1024, 3000])
def test_a_pool_has_room_for_64_sequences_by_default(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_free_memory", lambda _: 2**40)
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(sizing, "BlockPool", lambda _, __, blocks, windows, *___: made.append((blocks, windows)))
    decoder = lean_decoder(model_of("llama", max_position_embeddings=length))
    pool_for(decoder, None, kv_dtype="int4-channel")
    ((num_blocks, num_windows),) = made
    assert num_windows >= 64 * 8
    assert num_blocks >= 64 * (length // BLOCK)


def written_bytes(pool: BlockPool) -> int:
    """Bytes of the tensors' rows that have been written since `poison`."""
    windows = ((tensor.flatten(0, 1), tensor[0, 0].nbytes) for tensor in pool.kv.tensors())
    blocks = ((tensor, tensor[0].nbytes) for tensor in (*pool.kv.block_rows, *pool.kv.block_keys))
    rows = ((tensor.reshape(len(tensor), -1).view(torch.uint8), size) for tensor, size in (*windows, *blocks))
    return sum(int((row != 0xA5).any(1).sum()) * size for row, size in rows)


def poison(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(0xA5)


@pytest.mark.parametrize("kind", ["int4-channel", "xquant-4", "xquant-cl-2"])
@pytest.mark.parametrize("name", ["one KV head", "all heads"])
def test_held_bytes_are_those_of_the_tensors(decoders: dict[str, LlamaDecoder], name: str, kind: str) -> None:
    decoder = decoders[name]
    pool = pool_of(decoder, kind, blocks=4)
    poison(*pool.kv.tensors(), *pool.kv.block_rows, *pool.kv.block_keys)
    root = pool.forest.add_root()

    def measured(*branches: int) -> int:
        assert pool.held_bytes(branches) == written_bytes(pool)
        return pool.held_bytes(branches)

    assert measured(root) == 0
    read(decoder, pool, root, text(100))
    growing = measured(root)
    read(decoder, pool, root, text(28))
    assert measured(root) > growing / 100 * BLOCK  # a full block, and its window
    poison(*pool.kv.tensors())  # the next token frees the window
    read(decoder, pool, root, text(40))
    before = measured(root)
    children = pool.forest.fork([root, root])
    assert measured(root, *children) == before
    for child in children:
        read(decoder, pool, child, text(10, child))
    slot = sum(tensor[0, 0].nbytes for tensor in pool.kv.tensors())
    assert measured(root, *children) == before + 2 * (8 + 10) * slot  # 32 of 40 tokens are in full pages
    assert pool.held_bytes(children[:1]) == before + 10 * slot


def test_a_full_pool_holds_all_bytes_but_the_room_to_restore(decoders: dict[str, LlamaDecoder]) -> None:
    pool = pool_of(decoders["qwen2"], "xquant-3", blocks=1)
    root = pool.forest.add_root()
    read(decoders["qwen2"], pool, root, text(BLOCK))
    room = sum(pages[pool.kv.first :].nbytes for pages in pool.kv.pages)
    assert pool.held_bytes([root]) == pool.kv.nbytes - room


@pytest.mark.parametrize("length", [20, 119])
def test_stats_have_the_largest_number_of_bytes(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = HFPolicy(str(MODELS / "policy-0.1m"), kv_memory="4MiB", kv_dtype="xquant-4", self_test=False)
    pool = policy._pool.pool
    assert isinstance(pool, BlockPool)
    held: list[int] = []
    kv, forest, run = pool.kv, pool.forest, pool.kv.run
    block = sum(tensor.nbytes for tensor in (*kv.block_rows, *kv.block_keys)) // forest.blocks.stats().pages_total
    page = sum(tensor.nbytes for tensor in kv.tensors()) // kv.num_windows

    def noted(*args: Any) -> Tensor:
        blocks, windows = forest.blocks.stats().unique_tokens, forest.windows.stats().unique_tokens
        held.append(blocks // BLOCK * block + windows * page // 16)
        return run(*args)

    monkeypatch.setattr(kv, "run", noted)
    config = SearchConfig("best_of_n", n=4, max_tokens=40, temperature=1.5)
    (result,) = search([f"12+34{'-5' * length}"], policy, None, config, progress=False, prefix_cache=False)
    assert result.stats.peak_kv_bytes == max(held) > result.stats.peak_unique_kv_tokens * pool.token_bytes
    both = search([f"12+34{'-5' * length}"] * 2, policy, None, config, progress=False, prefix_cache=False)
    assert {one.stats.peak_kv_bytes for one in both} == {result.stats.peak_kv_bytes}


def test_the_model_of_the_issue_in_bytes() -> None:
    """SmolLM2-135M: 30 layers, hidden states of 576, keys of 192 elements."""
    assert [round(sum(form.token_bytes for form in formats_of(kind, 30, 576, 3, 64))) for kind in KINDS] == [
        6_300, 4_860, 3_420, 11_940, 6_180, 4_740, 3_300, 6_232, 4_936, 3_640
    ]  # fmt: skip


def test_what_is_not_possible_is_refused_by_name(tmp_path: Path, decoders: dict[str, LlamaDecoder]) -> None:
    path = save_checkpoint(tmp_path, model_of("llama"))
    for kind in ("xquant-4", "int4-channel"):
        with pytest.raises(ValueError, match=rf"^kv_dtype: expected a model of the lean decoder for {kind}, got Tr"):
            HFPolicy(path, kv_dtype=kind, decoder="transformers")
    with pytest.raises(ValueError, match=r"^kv_memory: expected room for 128 tokens \(\d+ bytes\), got '1KiB'"):
        pool_for(decoders["llama"], "1KiB", kv_dtype="xquant-4")
    path = save_checkpoint(tmp_path / "odd", model_of("one KV head, wide heads"))
    for kind in ("xquant-4", "int4-channel"):
        with pytest.raises(ValueError, match=rf"^kv_dtype: expected no {kind} for keys of 40 elements, not a multiple"):
            HFPolicy(path, kv_dtype=kind)


def test_the_command_line_takes_the_same_names() -> None:
    from typing import get_args

    from tts_search.cli.options import KvType
    from tts_search.models.decoder import KvDtype

    assert get_args(get_args(get_args(KvType)[0])[0]) == get_args(KvDtype)
    assert set(get_args(KvDtype)) == {"fp8", "int8", "int4", *KINDS}


def test_bases_do_not_depend_on_threads() -> None:
    weight = torch.randn(192, 576, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(_svd(weight))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))
