"""A round of beam search, 16 problems x 16 candidates x one new step: one call against its three parts and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import compare
from torch import Tensor

import tts_kernels as tk

GROUPS, SIZE, KEEP = 16, 16, 4


@pytest.mark.parametrize("width", [1536, 4096])
def test_score_and_prune(benchmark: Any, width: int) -> None:
    candidates = GROUPS * SIZE
    hidden = torch.randn(candidates * 8, width).bfloat16()
    rows = (torch.randn(2, width) / width**0.5).bfloat16()
    head = tk.ScoreHead.label_pair(rows[0], rows[1])
    positions, steps = torch.arange(7, candidates * 8, 8), torch.arange(candidates + 1)
    groups = torch.arange(0, candidates + 1, SIZE)
    prior, counts = torch.rand(candidates), torch.full((candidates,), 3)

    def ours() -> tk.ScoredPruned:
        arguments = (hidden, positions, steps, head, groups, KEEP)
        return tk.score_and_prune(*arguments, how="min", prior=prior, prior_counts=counts)

    def parts() -> tk.Pruned:
        scores = torch.minimum(prior, tk.aggregate_steps(tk.step_scores(hidden, positions, head), steps, "min"))
        return tk.prune(scores, groups, KEEP)

    def plain() -> Tensor:
        scores = torch.softmax((hidden[positions] @ rows.T).float(), -1)[:, 0]
        return torch.topk(torch.minimum(prior, scores).view(GROUPS, SIZE), KEEP).indices

    benchmark.group = "score_and_prune, 16 groups of 16"
    compare(benchmark, ours, {"its parts": parts, "torch": plain}, rounds=50, repeats=10)
