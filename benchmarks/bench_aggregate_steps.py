"""`aggregate_steps` against `torch.segment_reduce`. Bound: the call for a beam search, memory for many chains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import compare

import tts_kernels as tk


@pytest.mark.parametrize("how", ["min", "prod", "mean"])
@pytest.mark.parametrize("chains", [64, 65_536])
def test_aggregate_steps(benchmark: Any, how: str, chains: int) -> None:
    scores, indptr = torch.rand(10 * chains), torch.arange(0, 10 * chains + 1, 10)
    ours = lambda: tk.aggregate_steps(scores, indptr, how)  # noqa: E731
    reduce = lambda: torch.segment_reduce(scores, how, offsets=indptr, unsafe=True)  # noqa: E731
    benchmark.group = f"aggregate_steps, {chains} chains of 10"
    compare(benchmark, ours, {"torch.segment_reduce": reduce}, rounds=30, repeats=max(1, 6400 // chains))
