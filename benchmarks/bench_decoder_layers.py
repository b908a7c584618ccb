"""`decoder_layers_` against its operators one after another from Python: the layers of SmolLM2-135M in a decode step.

N branches share a prompt of P tokens. The bound is the linear layers alone: their weights once, or their operations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import Bound, compare
from torch import Tensor

import tts_kernels as tk

LAYERS, HIDDEN, INNER, Q_HEADS, KV_HEADS, HEAD_DIM, EPS = 30, 576, 1536, 9, 3, 64, 1e-5
INPUTS = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
WEIGHTS = LAYERS * (INPUTS * HIDDEN + Q_HEADS * HEAD_DIM * HIDDEN + 3 * INNER * HIDDEN)


def random_layer() -> tk.DecoderLayer:
    def packed(rows: int, columns: int) -> tk.PackedLinear:
        return tk.pack_linear((torch.randn(rows, columns) / columns**0.5).bfloat16())

    norm = torch.ones(HIDDEN).bfloat16()
    return tk.DecoderLayer(
        input_norm=norm,
        qkv=packed(INPUTS, HIDDEN),
        o=packed(HIDDEN, Q_HEADS * HEAD_DIM),
        post_norm=norm,
        gate_up=packed(2 * INNER, HIDDEN),
        down=packed(HIDDEN, INNER),
    )


@pytest.mark.parametrize(("branches", "prefix"), [(1, 512), (16, 512), (64, 512), (16, 2048)])
def test_decode_step(benchmark: Any, branches: int, prefix: int) -> None:
    pages = prefix // 16 + branches
    forest, cache = tk.KVForest(pages), tk.KVCache(LAYERS, pages, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    root = forest.add_root()
    forest.append([root], [prefix])
    children = forest.fork([root] * branches)
    slots = forest.append(children, [1] * branches).slots.to(cache.k[0].device)
    plan = forest.plan(children, num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    layers = tk.DecoderLayers([random_layer() for _ in range(LAYERS)])
    theta = torch.arange(prefix + 1)[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos_sin = torch.cat([theta.cos(), theta.sin()], dim=-1)
    x, positions = torch.randn(branches, HIDDEN).bfloat16(), torch.full((branches,), prefix)

    def ours() -> Tensor:
        return tk.decoder_layers_(x, layers, cache.k, cache.v, plan, positions, cos_sin, slots, eps=EPS)

    def one_by_one() -> Tensor:
        h = x
        for part, k, v in zip(layers.layers, cache.k, cache.v, strict=True):
            qkv = tk.linear(tk.rms_norm(h, part.input_norm, EPS)[0], part.qkv)
            q = tk.rope_append_(
                qkv, k, v, positions, cos_sin, slots, num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, eps=EPS
            )
            h = tk.linear(tk.tree_attention(q, k, v, plan).flatten(1), part.o, residual=h)
            units = tk.swiglu(tk.linear(tk.rms_norm(h, part.post_norm, EPS)[0], part.gate_up))
            h = tk.linear(units, part.down, residual=h)
        return h

    benchmark.group = f"decoder_layers_, bfloat16, {prefix} shared tokens"
    bound = Bound(2 * WEIGHTS, 2 * branches * WEIGHTS, torch.bfloat16)
    compare(benchmark, ours, {"one by one": one_by_one}, rounds=9, bound=bound)
