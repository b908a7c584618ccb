"""`prune` against `torch.topk`, which takes groups of one size only; ragged ones go through a Python loop.

A round of beam search is bound by the cost of a call, long groups by reading the scores.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from measure import compare
from torch import Tensor

import tts_kernels as tk


@pytest.mark.parametrize(
    ("groups", "size", "k"), [(64, 4, 1), (64, 64, 4), (64, 256, 4), (64, 4096, 8), (16, 4096, 64)]
)
def test_uniform(benchmark: Any, groups: int, size: int, k: int) -> None:
    scores, indptr = torch.randn(groups, size), torch.arange(0, groups * size + 1, size)
    flat = scores.flatten()
    benchmark.group = f"prune, {groups} x {size}, k = {k}"
    repeats = max(1, 409_600 // (groups * size))
    compare(
        benchmark,
        lambda: tk.prune(flat, indptr, k),
        {"torch.topk": lambda: torch.topk(scores, k)},
        rounds=50,
        repeats=min(repeats, 100),
    )


def test_ragged(benchmark: Any) -> None:
    """64 groups of 33 to 95 candidates."""
    sizes = torch.randint(33, 96, (64,))
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    scores, uniform = torch.randn(int(sizes.sum())), torch.randn(64, 64)
    offsets = indptr.tolist()

    def loop() -> list[Tensor]:
        return [a + torch.topk(scores[a:b], 4).indices for a, b in pairwise(offsets)]

    benchmark.group = "prune, 64 ragged groups of about 64, k = 4"
    baselines = {"torch.topk in a loop": loop, "torch.topk on 64 x 64": lambda: torch.topk(uniform, 4)}
    compare(benchmark, lambda: tk.prune(scores, indptr, 4), baselines, rounds=50, repeats=50)
