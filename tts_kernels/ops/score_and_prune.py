"""A round of search in one call: scores of new steps, aggregates of candidates, survivors of groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op
from ..score_head import ScoreHead, check_head, unpacked
from .aggregate_steps import HOW
from .prune import check_survivors, survivors


class ScoredPruned(NamedTuple):
    """The result of `score_and_prune`.

    Attributes
    ----------
    indices
        [G, K] int64: candidates, best first (or in candidate order), padded with -1.
    counts
        [G] int32: how many candidates each row has.
    candidate_scores
        [C] float32: the aggregates.
    step_scores
        [S] float32: the scores of the new steps.
    """

    indices: Tensor
    counts: Tensor
    candidate_scores: Tensor
    step_scores: Tensor


def score_and_prune(
    hidden: Tensor,
    positions: Tensor,
    step_indptr: Tensor,
    head: ScoreHead,
    group_indptr: Tensor,
    k: int | Tensor,
    *,
    max_k: int | None = None,
    how: str = "last",
    prior: Tensor | None = None,
    prior_counts: Tensor | None = None,
    keep_order: bool = False,
) -> ScoredPruned:
    """Score new steps, continue each candidate's aggregate with them, keep the k best of each group.

    The same as `step_scores`, `aggregate_steps` and `prune` one after another, but an aggregate can be continued
    without its earlier scores.

    Parameters
    ----------
    hidden
        [T, H] float: hidden states of the tokens. Rows may be strided.
    positions
        [S] int: the token that ends each new step, in [0, T).
    step_indptr
        [C + 1] int: candidate c's new steps are ``positions[step_indptr[c]:step_indptr[c + 1]]``.
    head
        The PRM's head.
    group_indptr
        [G + 1] int: group g's candidates are ``group_indptr[g]`` to ``group_indptr[g + 1] - 1``.
    k, max_k, keep_order
        As in `prune`.
    how
        "last", "min", "prod", "mean", "max" or "sum", as in `aggregate_steps`.
    prior
        [C] float: each candidate's aggregate over its earlier steps; needs ``prior_counts``.
    prior_counts
        [C] int: the number of these steps; 0: there is no earlier step, and ``prior`` is not read.

    Returns
    -------
    ScoredPruned
        ``indices`` [G, K], ``counts`` [G], ``candidate_scores`` [C] (-inf for one without any step) and
        ``step_scores`` [S].

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape, device or name, offsets that do not rise, ``prior`` without ``prior_counts`` or the other
        way round, or what `prune` raises.
    IndexError
        For a position outside [0, T).

    Notes
    -----
    Reads S rows of ``hidden`` and the head once; one launch, two with a hidden layer.

    Examples
    --------
    Two candidates of one group, each with one new step behind an earlier one:

    >>> import torch, tts_kernels as tk
    >>> hidden = torch.tensor([[0.0], [2.0]])
    >>> head = tk.ScoreHead.scalar(torch.tensor([1.0]), activation="identity")
    >>> earlier = {"prior": torch.tensor([3.0, -9.0]), "prior_counts": torch.tensor([1, 1])}
    >>> round = tk.score_and_prune(
    ...     hidden, torch.tensor([0, 1]), torch.tensor([0, 1, 2]), head, torch.tensor([0, 2]), 1, how="min", **earlier)
    >>> round.indices.tolist(), round.candidate_scores.tolist()
    ([[0]], [0.0, -9.0])
    """
    per_group, width = survivors(k, max_k)
    return ScoredPruned(
        *_op(
            hidden,
            positions,
            step_indptr,
            *unpacked(head),
            group_indptr,
            width,
            per_group,
            how,
            prior,
            prior_counts,
            keep_order,
        )
    )


def _check(hidden: Tensor, positions: Tensor, step_indptr: Tensor, *rest: Any) -> None:
    head, (group_indptr, width, k, how, prior, prior_counts, _keep_order) = rest[:7], rest[7:]
    checks.tensor("hidden", hidden, shape=["T", "H"])
    device = hidden.device
    checks.tensor("positions", positions, checks.INDEX, ["S"], device)
    checks.indptr("step_indptr", step_indptr, positions.shape[0], device)
    check_head(hidden, *head[:-1])
    candidates = step_indptr.shape[0] - 1
    checks.indptr("group_indptr", group_indptr, candidates, device)
    check_survivors(group_indptr.shape[0] - 1, width, k, device)
    checks.choice("how", how, HOW)
    _check_prior(candidates, prior, prior_counts, device)
    checks.index_range("positions", positions, 0, hidden.shape[0])


def _check_prior(candidates: int, prior: Tensor | None, prior_counts: Tensor | None, device: torch.device) -> None:
    if prior is None and prior_counts is None:
        return
    if prior is None or prior_counts is None:
        missing = "prior" if prior is None else "prior_counts"
        raise ValueError(f"{missing}: expected a tensor with {'prior_counts' if prior is None else 'prior'}, got None")
    checks.tensor("prior", prior, shape=[candidates], device=device)
    checks.tensor("prior_counts", prior_counts, checks.INDEX, [candidates], device)
    if checks.readable(prior_counts) and bool((prior_counts < 0).any()):
        raise ValueError(f"prior_counts: expected values of at least 0, got {int(prior_counts.min())}")


def _fake(hidden: Tensor, positions: Tensor, step_indptr: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, width = rest[7].shape[0] - 1, rest[8]
    return (
        hidden.new_empty((groups, width), dtype=torch.int64),
        hidden.new_empty(groups, dtype=torch.int32),
        hidden.new_empty(step_indptr.shape[0] - 1, dtype=torch.float32),
        hidden.new_empty(positions.shape[0], dtype=torch.float32),
    )


_op = Op("score_and_prune", reference=reference.score_and_prune, check=_check, fake=_fake)
