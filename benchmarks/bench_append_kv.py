"""`append_kv_` of one layer against torch's indexed assignment. Bound: reading and writing the new tokens once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import compare

import tts_kernels as tk


@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_append_kv(benchmark: Any, tokens: int) -> None:
    """Hkv 8, D 128, bfloat16; decoding or prefilling."""
    cache = tk.KVCache(1, 1024, 8, 128, 16, torch.bfloat16)
    k, v = torch.randn(2, tokens, 8, 128).to(torch.bfloat16)
    slots = torch.randperm(1024 * 16)[:tokens]
    k_flat, v_flat = cache.k[0].view(-1, 8, 128), cache.v[0].view(-1, 8, 128)

    def torchs() -> None:
        k_flat[slots] = k
        v_flat[slots] = v

    def index_copy() -> None:
        k_flat.index_copy_(0, slots, k)
        v_flat.index_copy_(0, slots, v)

    baselines = {"torch": torchs, "index_copy_": index_copy}
    benchmark.group = "append_kv_, bfloat16"
    ours = lambda: tk.append_kv_(cache.k[0], cache.v[0], k, v, slots)  # noqa: E731
    compare(benchmark, ours, baselines, rounds=25, repeats=20)
