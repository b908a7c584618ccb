"""`merge_states` against the same in torch. Bound: reading two rows and writing one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import compare
from torch import Tensor

import tts_kernels as tk


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rows", [16, 1024])
def test_merge_states(benchmark: Any, rows: int, dtype: torch.dtype) -> None:
    """32 heads of 128."""
    out_a, out_b = torch.randn(2, rows, 32, 128).to(dtype)
    lse_a, lse_b = torch.randn(2, rows, 32)

    def torchs() -> tuple[Tensor, Tensor]:
        weight = torch.sigmoid(lse_b - lse_a)[..., None].to(dtype)
        return torch.lerp(out_a, out_b, weight), torch.logaddexp(lse_a, lse_b)

    benchmark.group = f"merge_states, {str(dtype)[6:]}"
    ours = lambda: tk.merge_states(out_a, lse_a, out_b, lse_b)  # noqa: E731
    compare(benchmark, ours, {"torch": torchs}, rounds=25, repeats=10)
