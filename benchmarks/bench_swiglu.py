"""`swiglu` against torch's, eager and compiled: rows of SmolLM2-135M's decode step, and of prefills."""

from __future__ import annotations

from typing import Any

import costs
import pytest
import torch
from measure import compare
from torch import Tensor
from torch.nn import functional

import tts_kernels as tk


def plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


@pytest.mark.parametrize(("rows", "width"), [(16, 1536), (64, 1536), (2048, 1536), (2048, 8960)])
def test_swiglu(benchmark: Any, rows: int, width: int) -> None:
    gate_up = torch.randn(rows, 2 * width).bfloat16()
    compiled = torch.compile(plain, dynamic=False)
    bound = costs.swiglu(rows, width, gate_up.dtype) if rows * width > 2**22 else None  # small ones stay in cache
    benchmark.group = "swiglu, bfloat16"
    repeats = max(1, 2**21 // (rows * width))
    baselines = {"torch": lambda: plain(gate_up), "compiled": lambda: compiled(gate_up)}
    compare(benchmark, lambda: tk.swiglu(gate_up), baselines, rounds=9, repeats=repeats, bound=bound)
