from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import DTYPES, assert_names, assert_refuses_fp8, reading_fp8
from torch import Tensor
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference


def inputs(dtype: torch.dtype, tokens: int, page_size: int = 16, heads: int = 3, dim: int = 20) -> tuple[Tensor, ...]:
    pages = tokens // page_size + 3
    caches = [torch.randn(pages, page_size, heads, dim).to(dtype) for _ in range(2)]
    new = [torch.randn(tokens, heads, dim).to(dtype) for _ in range(2)]
    slots = torch.randperm(pages * page_size)[:tokens]
    return (*caches, *new, slots)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "page_size"), [(0, 16), (1, 1), (7, 4), (500, 16), (130, 64)])
def test_writes_every_token_and_nothing_else(
    tokens: int, page_size: int, index: torch.dtype, dtype: torch.dtype
) -> None:
    k_cache, v_cache, k, v, slots = inputs(dtype, tokens, page_size)
    expected = (k_cache.clone(), v_cache.clone())
    reference.append_kv_(*expected, k, v, slots)
    tk.append_kv_(k_cache, v_cache, k, v, slots.to(index))
    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache, expected[1])
    assert torch.equal(k_cache.flatten(0, 1)[slots], k)


def test_strided_caches_and_tokens() -> None:
    k_cache, v_cache, k, v, slots = inputs(torch.bfloat16, 100)
    expected = (k_cache.clone(), v_cache.clone())
    reference.append_kv_(*expected, k, v, slots)
    pool = torch.zeros(2, 3, *k_cache.shape[:2], 32, dtype=torch.bfloat16)  # heads first, rows padded
    views = [pool[i, ..., :20].permute(1, 2, 0, 3) for i in range(2)]
    for view, cache in zip(views, (k_cache, v_cache), strict=True):
        view.copy_(cache)
    fused = torch.cat([k, v, k], 1)
    tk.append_kv_(*views, fused[:, :3], v.transpose(0, 2).contiguous().transpose(0, 2), slots)  # type: ignore[call-arg]
    assert torch.equal(views[0], expected[0])
    assert torch.equal(views[1], expected[1])
    assert (pool[..., 20:] == 0).all()


def test_nan_is_copied_bit_for_bit() -> None:
    k_cache, v_cache, k, v, slots = inputs(torch.float16, 4)
    k.view(torch.int16)[0] = 0x7D01
    tk.append_kv_(k_cache, v_cache, k, v, slots)
    assert torch.equal(k_cache.flatten(0, 1)[slots].view(torch.int16), k.view(torch.int16))


def test_opcheck_and_compile() -> None:
    args = inputs(torch.float32, 9)
    opcheck(torch.ops.tts_kernels.append_kv_.default, args)
    k_cache, v_cache, k, v, slots = args
    expected = (k_cache.clone(), v_cache.clone())
    reference.append_kv_(*expected, k * 2, v, slots)
    torch.compile(lambda a, b, x, y, s: tk.append_kv_(a, b, x * 2, y, s), fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(k_cache, expected[0])


def test_bad_input_names_the_argument_and_writes_nothing() -> None:
    k_cache, v_cache, k, v, slots = inputs(torch.float32, 9)
    before = k_cache.clone()
    append = tk.append_kv_
    assert_names(TypeError, "k_cache", append, k_cache.double(), v_cache, k, v, slots)
    assert_names(ValueError, "k_cache", append, k_cache[0], v_cache, k, v, slots)
    assert_names(ValueError, "k_cache", append, k_cache.transpose(2, 3), v_cache, k, v, slots)
    assert_names(TypeError, "v_cache", append, k_cache, v_cache.half(), k, v, slots)
    assert_names(ValueError, "v_cache", append, k_cache, v_cache[1:], k, v, slots)
    assert_names(TypeError, "k", append, k_cache, v_cache, k.half(), v, slots)
    assert_names(ValueError, "k", append, k_cache, v_cache, k[1:], v, slots)
    assert_names(ValueError, "v", append, k_cache, v_cache, k, v[:, 1:], slots)
    assert_names(TypeError, "slots", append, k_cache, v_cache, k, v, slots.float())
    assert_names(ValueError, "slots", append, k_cache, v_cache, k, v, slots[None])
    for bad in (-1, k_cache.shape[0] * 16):
        slots[-1] = bad
        assert_names(IndexError, "slots", append, k_cache, v_cache, k, v, slots)
    assert torch.equal(k_cache, before)


def test_a_slot_that_is_there_twice_is_refused_under_debug_checks() -> None:
    k_cache, v_cache, k, v, slots = inputs(torch.float32, 9)
    slots[7] = slots[2]
    before = k_cache.clone()
    with tk.debug_checks(True):
        assert_names(ValueError, "slots: expected all different, got", tk.append_kv_, k_cache, v_cache, k, v, slots)
    assert torch.equal(k_cache, before)


def test_a_cache_whose_pages_are_one_memory_is_refused() -> None:
    k_cache, v_cache, k, v, slots = inputs(torch.float32, 9)
    before = k_cache.clone()
    for name, caches in (
        ("k_cache", (k_cache[:1].expand_as(k_cache), v_cache)),
        ("v_cache", (k_cache, v_cache[:, :1].expand_as(v_cache))),
    ):
        assert_names(ValueError, name, tk.append_kv_, *caches, k, v, slots)
    assert torch.equal(k_cache, before)


def quantised(
    dtype: str, tokens: int, heads: int, dim: int, kind: torch.dtype
) -> tuple[tk.KVCache, Tensor, Tensor, Tensor]:
    """A cache with garbage in it, new tokens, their slots."""
    cache = tk.KVCache(1, tokens // 4 + 3, heads, dim, page_size=4, dtype=dtype)
    for t in cache.tensors():
        t.random_(0, 100)
    k, v = (torch.randn(tokens, heads, dim).mul(10.0 ** torch.randn(tokens, 1, 1)).to(kind) for _ in range(2))
    return cache, k, v, torch.randperm(len(cache.k[0]) * 4)[:tokens]


def assert_same_memory(a: tk.KVCache, b: tk.KVCache) -> None:
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["int8", "int4"]),
    kind=st.sampled_from(DTYPES),
    tokens=st.integers(0, 70),
    heads=st.integers(1, 4),
    half=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_a_quantised_cache_is_the_definition_bit_for_bit(
    dtype: str, kind: torch.dtype, tokens: int, heads: int, half: int, seed: int, data: st.DataObject
) -> None:
    """Zeros, one value throughout, NaN, infinities, values beyond float16 and below its least among them."""
    torch.manual_seed(seed)
    cache, k, v, slots = quantised(dtype, tokens, heads, 2 * half, kind)
    odd = st.sampled_from([0.0, -0.0, 1.0, -3.0, 1e-7, 6e-5, 6e4, 3e38, torch.nan, torch.inf, -torch.inf])
    for t in (k, v) if tokens else ():
        for at in data.draw(st.lists(st.integers(0, tokens - 1), max_size=6)):
            t[at, data.draw(st.integers(0, heads - 1)), data.draw(st.integers(0, 2 * half - 1)) :] = data.draw(odd)
    expected = copy.deepcopy(cache)
    reference.append_kv_(expected.k[0], expected.v[0], k, v, slots, **expected.beside(0))
    tk.append_kv_(cache.k[0], cache.v[0], k, v, slots, **cache.beside(0))
    assert_same_memory(cache, expected)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantised_cache_is_near_what_was_written(dtype: str) -> None:
    """Half a step of a head's own scale, and what float16 takes from the scale and the zero."""
    cache, k, v, slots = quantised(dtype, 50, 3, 64, torch.float32)
    tk.append_kv_(cache.k[0], cache.v[0], k, v, slots, **cache.beside(0))
    for name, tokens in (("k", k), ("v", v)):
        parts = (getattr(cache, part) for part in (name, f"{name}_scale", f"{name}_zero"))
        codes, scale, zero = (t[0].flatten(0, 1)[slots] if t else None for t in parts)
        again = reference.dequantize_kv(codes, scale, zero, dtype=torch.float32)
        rounding = tokens.abs().amax(-1, keepdim=True) * 2.0**-10
        assert ((again - tokens).abs() <= 0.5 * scale.float()[..., None] + rounding).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_strided_quantised_caches_and_tokens(dtype: str) -> None:
    cache, k, v, slots = quantised(dtype, 30, 3, 12, torch.bfloat16)
    expected = copy.deepcopy(cache)
    reference.append_kv_(expected.k[0], expected.v[0], k, v, slots, **expected.beside(0))
    both = torch.stack([cache.k[0], cache.v[0]]).transpose(2, 3).contiguous().transpose(2, 3)  # heads first
    fused = torch.cat([k, v], 1)
    tk.append_kv_(both[0], both[1], fused[:, :3], fused[:, 3:], slots, **cache.beside(0))
    assert torch.equal(both[0], expected.k[0])
    assert torch.equal(both[1], expected.v[0])
    assert all(torch.equal(a, b) for a, b in zip(cache.tensors()[2:], expected.tensors()[2:], strict=True))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_opcheck_and_compile_of_quantised_caches(dtype: str) -> None:
    cache, k, v, slots = quantised(dtype, 9, 3, 12, torch.float32)
    expected = copy.deepcopy(cache)
    args = (cache.k[0], cache.v[0], k, v, slots)
    opcheck(torch.ops.tts_kernels.append_kv_.default, args, cache.beside(0))
    reference.append_kv_(expected.k[0], expected.v[0], k * 2, v, slots, **expected.beside(0))

    def step(*args: Tensor, **beside: Tensor) -> None:
        k_cache, v_cache, k, v, slots = args
        tk.append_kv_(k_cache, v_cache, k * 2, v, slots, **beside)

    torch.compile(step, fullgraph=True, backend="aot_eager")(*args, **cache.beside(0))
    assert_same_memory(cache, expected)


def test_bad_input_of_quantised_caches_names_the_argument() -> None:
    for dtype, zeros in (("int8", False), ("int4", True)):
        cache, k, v, slots = quantised(dtype, 9, 3, 12, torch.float32)
        before, beside = copy.deepcopy(cache), cache.beside(0)
        args = (cache.k[0], cache.v[0], k, v, slots)
        assert_names(TypeError, "k_scale", tk.append_kv_, *args)
        assert_names(TypeError, "v_scale", tk.append_kv_, *args, **{**beside, "v_scale": None})
        assert_names(
            TypeError, "v_zero", tk.append_kv_, *args, **{**beside, "v_zero": None if zeros else beside["v_scale"]}
        )
        assert_names(TypeError, "k_scale", tk.append_kv_, *args, **{**beside, "k_scale": beside["k_scale"].float()})
        assert_names(ValueError, "k_scale", tk.append_kv_, *args, **{**beside, "k_scale": beside["k_scale"][1:]})
        flat = beside["v_scale"].transpose(0, 1).contiguous().transpose(0, 1)
        assert_names(ValueError, "v_scale", tk.append_kv_, *args, **{**beside, "v_scale": flat})
        other = torch.zeros_like(cache.k[0], dtype=torch.float32)
        assert_names(TypeError, "v_cache", tk.append_kv_, cache.k[0], other, k, v, slots, **beside)
        assert_names(ValueError, "k", tk.append_kv_, *args[:2], k[..., 1:], v, slots, **beside)
        assert_names(TypeError, "v", tk.append_kv_, *args[:3], v.half(), slots, **beside)
        assert_same_memory(cache, before)
    plain = inputs(torch.float32, 9)
    assert_names(TypeError, "k_scale", tk.append_kv_, *plain, k_scale=torch.zeros(3, 16, 3, dtype=torch.float16))


# ---- fp8 -----------------------------------------------------------------------------------------------------


def nearest_e4m3(x: Tensor) -> Tensor:
    """Bytes of the numbers of float8_e4m3fn nearest to those of x, by looking for them."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    size = x.double().abs().clamp(max=448)
    high = torch.searchsorted(grid, size).clamp(max=126)
    low = (high - 1).clamp(min=0)
    up, down = grid[high] - size, size - grid[low]
    code = torch.where((up < down) | ((up == down) & (high % 2 == 0)), high, low)
    return torch.where(x.isnan(), 127, code + 128 * x.signbit()).to(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_fp8_cache_gets_the_nearest_numbers(dtype: torch.dtype) -> None:
    """Numbers between two of them, subnormal ones, those beyond 448, infinities and NaN among them."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = [(grid[1:] + grid[:-1]) / 2, grid, grid * 1.03, torch.tensor([460.0, 470.0, 6e4, torch.inf, torch.nan])]
    sizes = torch.cat([*between, 2.0 ** torch.linspace(-14, 10, 121)])
    new = torch.cat([sizes, -sizes]).to(dtype)
    new = new[: len(new) // 20 * 20].view(-1, 2, 10)
    cache = tk.KVCache(1, len(new) // 4 + 2, 2, 10, page_size=4, dtype="fp8")
    slots = torch.randperm(len(cache.k[0]) * 4)[: len(new)]
    for t in cache.tensors():
        t.fill_(9)
    with reading_fp8("append_kv_"):
        cache.append(0, new, -new, slots)
    others = torch.ones(len(cache.k[0]) * 4, dtype=torch.bool)
    others[slots] = False
    for written, values in zip(cache.tensors(), (new, -new), strict=True):
        bytes_ = written.flatten(0, 1)[slots]
        bytes_[bytes_ == 255] = 127  # NaN has a sign, of which a GPU makes nothing when it widens float16
        assert torch.equal(bytes_, nearest_e4m3(values))
        assert (written.flatten(0, 1)[others] == 9).all()


def test_an_fp8_cache_is_refused_on_a_cpu() -> None:
    with torch.device("cpu"):
        cache = tk.KVCache(1, 3, 3, 20, dtype=torch.float8_e4m3fn)
        _, _, k, v, slots = inputs(torch.float32, 9)
        assert_refuses_fp8(cache.append, 0, k, v, slots)
