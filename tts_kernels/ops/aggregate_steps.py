"""One score for each candidate from the scores of its steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op

HOW = ("last", "min", "prod", "mean", "max", "sum")


def aggregate_steps(scores: Tensor, indptr: Tensor, how: str) -> Tensor:
    """Aggregate step scores into one score for each candidate.

    Parameters
    ----------
    scores
        [S] float: step scores, those of a candidate next to each other.
    indptr
        [C + 1] int: candidate c owns ``scores[indptr[c]:indptr[c + 1]]``.
    how
        "last", "min", "prod", "mean", "max" or "sum". Products are computed in float64. NaN propagates (except that
        "last" only reads the last score).

    Returns
    -------
    Tensor
        [C] float32; -inf for a candidate without steps.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape, device or name, or offsets that do not rise from 0 to S.

    Notes
    -----
    O(S); one launch. The aggregates are those of "Scaling LLM Test-Time Compute Optimally" (arXiv 2408.03314,
    appendix) and of search-and-learn.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> tk.aggregate_steps(torch.tensor([0.9, 0.5, 0.8]), torch.tensor([0, 2, 3]), "min")
    tensor([0.5000, 0.8000])
    """
    out: Tensor = _op(scores, indptr, how)
    return out


def _check(scores: Tensor, indptr: Tensor, how: str) -> None:
    checks.tensor("scores", scores, shape=["S"])
    checks.choice("how", how, HOW)
    checks.indptr("indptr", indptr, scores.shape[0], scores.device)


def _fake(scores: Tensor, indptr: Tensor, _how: str) -> Tensor:
    return scores.new_empty(indptr.shape[0] - 1, dtype=torch.float32)


_op = Op("aggregate_steps", reference=reference.aggregate_steps, check=_check, fake=_fake)
