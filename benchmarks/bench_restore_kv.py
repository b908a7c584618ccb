"""`restore_kv_` against the operators that it stands for, and in torch: 2,048 and 16,384 tokens of SmolLM2-135M."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import costs
import pytest
import torch
from measure import compare

import tts_kernels as tk
from tts_kernels import reference
from tts_kernels.ops.rope_append import rope_append_op

HEADS, DIM, BLOCK = 3, 64, 128
OURS = SimpleNamespace(dequantize_rows=tk.dequantize_rows, rope_append_=rope_append_op)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("tokens", [2048, 16384])
def test_restore_kv(benchmark: Any, tokens: int, bits: int) -> None:
    blocks, width = tokens // BLOCK, HEADS * DIM
    keys, values = (
        tk.quantize_rows(torch.randn(blocks * rows, columns), bits, group).unflatten(0, (blocks, rows))
        for rows, columns, group in ((width, BLOCK, BLOCK), (BLOCK, width, DIM))
    )
    caches = [torch.empty(tokens // 16, 16, HEADS, DIM, dtype=torch.bfloat16) for _ in range(2)]
    at, angles = torch.arange(tokens), torch.rand(tokens, DIM)
    args = (keys, values, torch.randperm(blocks), *caches, at, angles, at, bits, DIM)
    stored = (keys.nbytes + values.nbytes) / tokens
    bound = costs.restore_kv(tokens, HEADS, DIM, stored, torch.bfloat16) if tokens > 8192 else None
    benchmark.group = f"restore_kv_, {bits} bits to bfloat16"
    baselines = {
        "our operators": lambda: reference.restore_kv_(*args, ops=OURS),
        "torch": lambda: reference.restore_kv_(*args),
    }
    ours = lambda: tk.restore_kv_(*args[:8], bits=bits, group_size=DIM)  # noqa: E731
    compare(benchmark, ours, baselines, rounds=9, repeats=16384 // tokens, bound=bound)
