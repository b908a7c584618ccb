from __future__ import annotations

import pytest
import torch
from rules import DTYPES, assert_names
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
