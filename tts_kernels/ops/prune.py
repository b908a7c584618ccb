"""Chooses the k best candidates of each group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op


class Pruned(NamedTuple):
    """The result of `prune`.

    Attributes
    ----------
    indices
        [G, K] int64: positions in ``scores``, best first (or in candidate order), padded with -1.
    counts
        [G] int32: how many candidates each row has.
    """

    indices: Tensor
    counts: Tensor


def prune(
    scores: Tensor, indptr: Tensor, k: int | Tensor, *, max_k: int | None = None, keep_order: bool = False
) -> Pruned:
    """Keep the k best candidates of each group.

    The higher score is better, then the lower index; NaN ranks below -inf; -0.0 equals 0.0.

    Parameters
    ----------
    scores
        [S] float: the candidates' scores, those of a group next to each other.
    indptr
        [G + 1] int: group g owns ``scores[indptr[g]:indptr[g + 1]]``; groups may be empty.
    k
        How many to keep in every group, at least 1; or a tensor [G] of ints >= 0, one for each group.
    max_k
        The width K of the result where ``k`` is a tensor (with an int it is that int); no value of ``k`` may be above
        it. By default the largest value of ``k``, which must then be on the CPU and not under torch.compile.
    keep_order
        Whether survivors stay in candidate order instead of best first.

    Returns
    -------
    Pruned
        ``indices`` [G, K] int64, padded with -1, and ``counts`` [G] int32.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape or device, offsets that do not rise from 0 to S, a ``k`` that is too small or above
        ``max_k``, or a ``max_k`` that is missing.

    Notes
    -----
    O(S) operations for K up to 16, O(S + G K log K) above; one launch. The result depends only on the scores: ties are
    not left to chance, as in torch.topk.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> scores = torch.tensor([0.1, 0.7, 0.4, 0.9, 0.9])
    >>> tk.prune(scores, torch.tensor([0, 3, 5]), 2).indices
    tensor([[1, 2],
            [3, 4]])
    """
    per_group, width = survivors(k, max_k)
    return Pruned(*_op(scores, indptr, width, per_group, keep_order))


def survivors(k: int | Tensor, max_k: int | None) -> tuple[Tensor | None, int]:
    """``k`` as the operators take it: a tensor or None, and the width K."""
    if not isinstance(k, Tensor):
        checks.integer("k", k, 1)
        if max_k is not None:
            checks.integer("max_k", max_k, k)
        return None, k
    if max_k is not None:
        checks.integer("max_k", max_k, 0)
        return k, max_k
    checks.tensor("k", k, checks.INDEX, ["G"])
    if torch.compiler.is_compiling() or k.device.type != "cpu":
        raise ValueError("max_k: expected an int with a tensor k on a GPU or under torch.compile, got None")
    return k, max(int(k.max()), 0) if k.numel() else 0


def check_survivors(groups: int, width: int, k: Tensor | None, device: torch.device) -> None:
    """Errors that name ``k``."""
    if k is None:
        checks.integer("k", width, 1)
        return
    checks.integer("max_k", width, 0)
    checks.tensor("k", k, checks.INDEX, [groups], device)
    if not checks.readable(k):
        return
    wrong = [v for v in k.tolist() if not 0 <= v <= width]
    if wrong:
        raise ValueError(f"k: expected values in [0, max_k = {width}], got {wrong[0]}")


def _check(scores: Tensor, indptr: Tensor, width: int, k: Tensor | None, _keep_order: bool) -> None:
    checks.tensor("scores", scores, shape=["S"])
    checks.indptr("indptr", indptr, scores.shape[0], scores.device)
    check_survivors(indptr.shape[0] - 1, width, k, scores.device)


def _fake(scores: Tensor, indptr: Tensor, width: int, _k: Tensor | None, _keep_order: bool) -> tuple[Tensor, Tensor]:
    groups = indptr.shape[0] - 1
    return scores.new_empty((groups, width), dtype=torch.int64), scores.new_empty(groups, dtype=torch.int32)


_op = Op("prune", reference=reference.prune, check=_check, fake=_fake)
