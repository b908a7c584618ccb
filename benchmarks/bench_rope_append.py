"""`rope_append_` against the ops of transformers between a projection and the attention, with an index_put_."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import compare
from torch import Tensor

import tts_kernels as tk

HEADS, PAGE_SIZE, POSITIONS = {"SmolLM2-135M": (9, 3, 64), "Qwen3-1.7B": (16, 8, 128)}, 16, 4096


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


@pytest.mark.parametrize("tokens", [16, 64, 1024])
@pytest.mark.parametrize("model", HEADS)
def test_rope_append(benchmark: Any, model: str, tokens: int) -> None:
    q_heads, kv_heads, head_dim = HEADS[model]
    qkv = torch.randn(tokens, (q_heads + 2 * kv_heads) * head_dim).bfloat16()
    k_cache, v_cache = torch.zeros(2, POSITIONS // PAGE_SIZE, PAGE_SIZE, kv_heads, head_dim, dtype=torch.bfloat16)
    slots, positions = torch.randperm(POSITIONS)[:tokens], torch.randint(0, POSITIONS, (tokens,))
    theta = torch.arange(POSITIONS)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    cos_sin = torch.cat([theta.cos(), theta.sin()], dim=-1)
    cos, sin = (t.repeat(1, 2).bfloat16()[positions][:, None] for t in (theta.cos(), theta.sin()))  # once a forward

    def ours() -> Tensor:
        return tk.rope_append_(
            qkv, k_cache, v_cache, positions, cos_sin, slots, num_q_heads=q_heads, num_kv_heads=kv_heads
        )

    def theirs() -> Tensor:
        q, k, v = qkv.view(tokens, -1, head_dim).split([q_heads, kv_heads, kv_heads], dim=1)
        k_cache.flatten(0, 1)[slots] = rotated(k, cos, sin)
        v_cache.flatten(0, 1)[slots] = v
        return rotated(q, cos, sin)

    benchmark.group = f"rope_append_, bfloat16, {model}"
    compare(benchmark, ours, {"torch": theirs}, rounds=9, repeats=max(1, 1024 // tokens))
