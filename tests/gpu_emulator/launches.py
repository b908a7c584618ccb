"""How many launches an operator takes; run by test_operators.py, in a process that emulates."""

from __future__ import annotations

import pytest
import torch

import tts_kernels as tk

from .library import Library

ONE_ROW = tk.ScoreHead.scalar(torch.ones(8))
HIDDEN_LAYER = tk.ScoreHead.mlp(torch.ones(3, 8), None, torch.rand(2, 3), None)


@pytest.mark.parametrize(("head", "launches"), [(ONE_ROW, 1), (HIDDEN_LAYER, 2)])
def test_a_round_of_search(emulated: Library, head: tk.ScoreHead, launches: int) -> None:
    offsets, groups = torch.arange(6), torch.tensor([0, 2, 2, 5])
    tk.score_and_prune(torch.rand(9, 8), torch.arange(5), offsets, head, groups, 2)
    assert len(emulated.launches) == launches


@pytest.mark.parametrize(("head", "launches"), [(ONE_ROW, 1), (HIDDEN_LAYER, 2)])
def test_step_scores(emulated: Library, head: tk.ScoreHead, launches: int) -> None:
    tk.step_scores(torch.rand(9, 8), torch.arange(5), head)
    assert len(emulated.launches) == launches


def test_linear_logprob_reads_the_weight_by_chunks_and_merges_them(emulated: Library) -> None:
    tk.linear_logprob(torch.rand(20, 8), torch.rand(600, 8), torch.arange(20))
    assert [launch.grid[0] for launch in emulated.launches] == [3, 5]


def test_nothing_to_do_is_no_launch(emulated: Library) -> None:
    tk.step_scores(torch.rand(9, 8), torch.arange(0), ONE_ROW)
    tk.linear_logprob(torch.rand(0, 8), torch.rand(600, 8), torch.arange(0))
    assert emulated.launches == []
