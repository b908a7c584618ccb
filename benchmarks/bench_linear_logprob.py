"""`linear_logprob` against torch's logits + log_softmax + gather.

With few rows the bound is reading the weight once; from about 20 bfloat16 rows on it is arithmetic: 2 N H V operations.
"""

from __future__ import annotations

from typing import Any

import costs
import pytest
import torch
from measure import compare
from torch import Tensor

import tts_kernels as tk


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [*((torch.bfloat16, rows) for rows in (1, 4, 32, 128)), *((torch.float32, rows) for rows in (4, 32))],
)
def test_linear_logprob(benchmark: Any, rows: int, dtype: torch.dtype) -> None:
    width, vocabulary = 1536, 151_936
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocabulary, width) / width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))

    def logits() -> Tensor:
        return torch.nn.functional.linear(hidden, weight)

    def full() -> Tensor:
        """The least work; it rounds to ``dtype``."""
        return logits().log_softmax(-1).gather(-1, targets[:, None])

    def in_float32() -> Tensor:
        """What keeps a bfloat16 model's probabilities right to three digits."""
        return logits().float().log_softmax(-1).gather(-1, targets[:, None])

    baselines = {"torch": full} | ({"torch in float32": in_float32} if dtype != torch.float32 else {})
    bound = costs.linear_logprob(rows, width, vocabulary, dtype)
    benchmark.group = f"linear_logprob, {str(dtype)[6:]}"
    ours = lambda: tk.linear_logprob(hidden, weight, targets)  # noqa: E731
    compare(benchmark, ours, baselines, rounds=7, bound=bound)
