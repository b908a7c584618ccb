"""`dequantize_rows` against the same in torch: the X cache's reads for 2,048 and 16,384 tokens of SmolLM2-135M."""

from __future__ import annotations

from typing import Any

import costs
import pytest
import torch
from measure import compare

import tts_kernels as tk
from tts_kernels import reference


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("rows", [2048, 16384])
def test_dequantize_rows(benchmark: Any, rows: int, bits: int) -> None:
    codes = tk.quantize_rows(torch.randn(rows, 192).bfloat16(), bits, 96)
    options = (192, bits, 96, torch.bfloat16)
    bound = costs.dequantize_rows(rows, 192, codes.shape[1], torch.bfloat16) if rows > 8192 else None
    benchmark.group = f"dequantize_rows, {bits} bits to bfloat16"
    baselines = {"torch": lambda: reference.dequantize_rows(codes, *options)}
    repeats = 16384 // rows
    compare(benchmark, lambda: tk.dequantize_rows(codes, *options), baselines, rounds=9, repeats=repeats, bound=bound)


def test_quantize_rows(benchmark: Any) -> None:
    x = torch.randn(2048, 192).bfloat16()
    benchmark.group = "quantize_rows, bfloat16 to 4 bits"
    baselines = {"torch": lambda: reference.quantize_rows(x, 4, 96)}
    compare(benchmark, lambda: tk.quantize_rows(x, 4, 96), baselines, rounds=9, repeats=8)
