"""Scores of reasoning steps from the hidden states at their last tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op
from ..score_head import ScoreHead, check_head, unpacked


def step_scores(hidden: Tensor, positions: Tensor, head: ScoreHead) -> Tensor:
    """Score steps: the PRM head at one position each, without logits of any other token or label.

    ``out[s] = head(hidden[positions[s]])``

    Parameters
    ----------
    hidden
        [T, H] float: hidden states of the tokens (before the final norm if ``head`` holds it). Rows may be strided.
    positions
        [S] int: the token that ends each step, in [0, T).
    head
        The PRM's head; its tensors may differ from ``hidden`` in dtype.

    Returns
    -------
    Tensor
        [S] float32; probabilities unless the head ends in the identity.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape or device.
    IndexError
        For a position outside [0, T).

    Notes
    -----
    Reads S rows of ``hidden`` and the head once: O(S H) operations, O(S H1 H) with a hidden layer; one launch, two
    with a hidden layer. Full logits would cost O(T H V).

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> head = tk.ScoreHead.scalar(torch.tensor([1.0, -1.0]))
    >>> tk.step_scores(torch.tensor([[0.0, 0.0], [9.0, 1.0]]), torch.tensor([0]), head)
    tensor([0.5000])
    """
    out: Tensor = _op(hidden, positions, *unpacked(head))
    return out


def _check(hidden: Tensor, positions: Tensor, *head: Any) -> None:
    checks.tensor("hidden", hidden, shape=["T", "H"])
    checks.tensor("positions", positions, checks.INDEX, ["S"], hidden.device)
    check_head(hidden, *head[:-1])
    checks.index_range("positions", positions, 0, hidden.shape[0])


def _fake(hidden: Tensor, positions: Tensor, *_head: Any) -> Tensor:
    return hidden.new_empty(positions.shape[0], dtype=torch.float32)


_op = Op("step_scores", reference=reference.step_scores, check=_check, fake=_fake)
