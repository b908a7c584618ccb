from __future__ import annotations

import torch
from rules import assert_names

import tts_kernels as tk


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
