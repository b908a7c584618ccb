"""`step_scores` and `aggregate_steps` against torch on the label rows alone, and against full logits.

The bound is reading the gathered rows for a one-row head; for a hidden layer, W1 once or 2 S H H1 operations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import costs
import pytest
import torch
from measure import compare
from torch import Tensor

import tts_kernels as tk

STEPS, TOKENS = 32, 4096
INDPTR = torch.arange(0, STEPS + 1, 8)


@pytest.mark.parametrize("width", [1536, 4096, 8192])
def test_label_pair(benchmark: Any, width: int) -> None:
    """Scores and their minimum for four chains of eight steps."""
    hidden = torch.randn(TOKENS, width).bfloat16()
    rows = (torch.randn(2, width) / width**0.5).bfloat16()
    positions = torch.randint(0, TOKENS, (STEPS,))
    head = tk.ScoreHead.label_pair(rows[0], rows[1])

    def ours() -> Tensor:
        return tk.aggregate_steps(tk.step_scores(hidden, positions, head), INDPTR, "min")

    def torch_rows() -> Tensor:
        """Without the aggregation."""
        return torch.softmax((hidden[positions] @ rows.T).float(), -1)[:, 0]

    benchmark.group = "step_scores, a pair of label rows"
    compare(benchmark, ours, {"torch": torch_rows}, rounds=50, repeats=20)


def test_full_logits(benchmark: Any) -> None:
    """What a verifier that keeps the LM head does."""
    width, vocabulary = 1536, 151_936
    hidden = torch.randn(TOKENS, width).bfloat16()
    lm_head = (torch.randn(vocabulary, width) / width**0.5).bfloat16()
    positions = torch.randint(0, TOKENS, (STEPS,))
    head = tk.ScoreHead.label_pair(lm_head[1], lm_head[0])
    benchmark.group = "step_scores, a pair of label rows"
    compare(
        benchmark,
        lambda: tk.aggregate_steps(tk.step_scores(hidden, positions, head), INDPTR, "min"),
        {"full logits": lambda: torch.softmax((hidden[positions] @ lm_head.T)[:, :2].float(), -1)[:, 1]},
        rounds=7,
    )


@pytest.mark.parametrize("width", [1536, 3584])
def test_hidden_layer(benchmark: Any, width: int) -> None:
    """Qwen2.5-Math-PRM: H1 = H."""
    hidden = torch.randn(TOKENS, width).bfloat16()
    w1, w2 = (torch.randn(n, width).bfloat16() / width**0.5 for n in (width, 2))
    b1, b2 = torch.randn(width).bfloat16(), torch.randn(2).bfloat16()
    positions = torch.randint(0, TOKENS, (STEPS,))
    head = tk.ScoreHead.mlp(w1, b1, w2, b2)
    linear = torch.nn.functional.linear

    def torch_head() -> Tensor:
        units = torch.relu(linear(hidden[positions], w1, b1))
        return torch.softmax(linear(units, w2, b2).float(), -1)[:, 1]

    benchmark.group = "step_scores, a hidden layer"
    bound = replace(costs.hidden_layer(STEPS, width, width, torch.bfloat16), bytes=0)  # W1 stays in cache
    ours = lambda: tk.step_scores(hidden, positions, head)  # noqa: E731
    compare(benchmark, ours, {"torch": torch_head}, rounds=30, bound=bound)
