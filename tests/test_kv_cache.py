from __future__ import annotations

from typing import Any

import pytest
import torch
from rules import assert_names

import tts_kernels as tk
from tts_kernels import reference


def test_shapes_and_bytes() -> None:
    cache = tk.KVCache(3, 5, num_kv_heads=2, head_dim=8, page_size=4, dtype=torch.bfloat16)
    assert len(cache.k) == len(cache.v) == 3
    assert all(t.shape == (5, 4, 2, 8) and t.dtype == torch.bfloat16 for t in (*cache.k, *cache.v))
    assert cache.nbytes == 3 * 2 * 5 * 4 * 2 * 8 * 2
    assert tk.KVCache(1, 1, 1, 1).page_size == 16
    assert tk.KVCache(1, 1, 1, 1, device="meta").k[0].device.type == "meta"


def test_append_and_copy() -> None:
    cache = tk.KVCache(2, 4, num_kv_heads=1, head_dim=2, page_size=2)
    k, v = torch.randn(3, 1, 2), torch.randn(3, 1, 2)
    cache.append(1, k, v, torch.tensor([4, 5, 0]))
    cache.copy_pages(torch.tensor([2]), torch.tensor([3]))
    assert torch.equal(cache.k[1][3], k[:2])
    assert torch.equal(cache.v[1][3], v[:2])
    assert torch.equal(cache.v[1][0, 0], v[2])


def test_bad_input_names_the_argument() -> None:
    assert_names(ValueError, "num_layers", tk.KVCache, 0, 1, 1, 1)
    assert_names(ValueError, "num_pages", tk.KVCache, 1, 0, 1, 1)
    assert_names(TypeError, "num_kv_heads", tk.KVCache, 1, 1, 1.5, 1)
    assert_names(ValueError, "head_dim", tk.KVCache, 1, 1, 1, -1)
    assert_names(ValueError, "page_size", tk.KVCache, 1, 1, 1, 1, page_size=0)
    assert_names(TypeError, "dtype", tk.KVCache, 1, 1, 1, 1, dtype=torch.int32)
    assert_names(TypeError, "dtype", tk.KVCache, 1, 1, 1, 1, dtype="int2")
    assert_names(ValueError, "head_dim", tk.KVCache, 1, 1, 1, 5, dtype="int4")


@pytest.mark.parametrize(("dtype", "stored", "width"), [("int8", torch.int8, 8), ("int4", torch.uint8, 4)])
def test_a_quantised_cache_has_scales_beside_its_codes(dtype: str, stored: torch.dtype, width: int) -> None:
    cache = tk.KVCache(3, 5, num_kv_heads=2, head_dim=8, page_size=4, dtype=dtype)
    assert all(t.shape == (5, 4, 2, width) and t.dtype == stored for t in (*cache.k, *cache.v))
    beside: dict[str, Any] = {**cache.beside(1)}
    assert list(beside) == ["k_scale", "v_scale"] + ["k_zero", "v_zero"] * (dtype == "int4")
    assert all(t.shape == (5, 4, 2) and t.dtype == torch.float16 for t in beside.values())
    assert cache.nbytes == 3 * 5 * 4 * 2 * (2 * width + 2 * len(beside))
    assert tk.KVCache(1, 1, 1, 1).beside(0) == {}


@pytest.mark.parametrize(("dtype", "head_dim", "most"), [("int8", 64, 0.53), ("int4", 64, 0.29), ("int4", 128, 0.27)])
def test_bytes_of_a_quantised_cache_against_bfloat16(dtype: str, head_dim: int, most: float) -> None:
    plain = tk.KVCache(2, 8, 3, head_dim, dtype=torch.bfloat16)
    assert tk.KVCache(2, 8, 3, head_dim, dtype=dtype).nbytes <= most * plain.nbytes


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_append_and_copy_of_a_quantised_cache(dtype: str) -> None:
    """A copied page is the same tokens: codes, scales and zeros."""
    cache = tk.KVCache(2, 4, num_kv_heads=3, head_dim=6, page_size=2, dtype=dtype)
    k, v = torch.randn(3, 3, 6), torch.randn(3, 3, 6)
    cache.append(1, k, v, torch.tensor([4, 5, 0]))
    cache.copy_pages(torch.tensor([2]), torch.tensor([3]))
    for t in (cache.k[1], cache.v[1], *cache.beside(1).values()):
        assert torch.equal(t[3], t[2])
    step = {"int8": 1 / 127, "int4": 1 / 7.5}[dtype]
    beside = cache.beside(1)
    again = reference.dequantize_kv(cache.v[1], beside["v_scale"], beside.get("v_zero"), dtype=torch.float32)
    assert (again[3] - v[:2]).abs().max() < 0.6 * step * v.abs().max()
    assert (again[0, 0] - v[2]).abs().max() < 0.6 * step * v.abs().max()


def test_an_fp8_cache_has_a_byte_for_each_element() -> None:
    cache = tk.KVCache(2, 4, num_kv_heads=3, head_dim=6, page_size=2, dtype="fp8")
    assert all(t.shape == (4, 2, 3, 6) and t.dtype == torch.float8_e4m3fn for t in (*cache.k, *cache.v))
    assert cache.nbytes == 2 * 2 * 4 * 2 * 3 * 6
    assert tk.KVCache(1, 1, 1, 1, dtype=torch.float8_e4m3fn).dtype == cache.dtype == "fp8"
    cache.v[1].view(torch.uint8)[2] = 77
    cache.copy_pages(torch.tensor([2]), torch.tensor([3]))
    assert (cache.v[1].view(torch.uint8)[3] == 77).all()
