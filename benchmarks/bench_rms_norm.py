"""`rms_norm` with its residual against torch's, eager and compiled: 64 rows of a decode step, 2048 of a prefill."""

from __future__ import annotations

from typing import Any

import costs
import pytest
import torch
from measure import compare
from torch import Tensor
from torch.nn import functional

import tts_kernels as tk


def plain(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return functional.rms_norm(h, weight.shape, weight, 1e-5), h


@pytest.mark.parametrize(("rows", "width"), [(16, 576), (64, 576), (64, 4096), (2048, 2048)])
def test_rms_norm(benchmark: Any, rows: int, width: int) -> None:
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.rand(width)
    x, residual, weight = x.bfloat16(), residual.bfloat16(), weight.bfloat16()
    compiled = torch.compile(plain, dynamic=False)
    baselines = {"torch": lambda: plain(x, weight, residual), "compiled": lambda: compiled(x, weight, residual)}
    bound = costs.rms_norm(rows, width, x.dtype) if rows * width > 2**21 else None  # small ones stay in cache
    benchmark.group = "rms_norm, bfloat16"
    repeats = max(1, 2**21 // (rows * width))
    compare(
        benchmark, lambda: tk.rms_norm(x, weight, 1e-5, residual), baselines, rounds=9, repeats=repeats, bound=bound
    )
