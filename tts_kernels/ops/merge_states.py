"""Merges two attention results over disjoint keys into the result over all of these keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two attention results over disjoint sets of keys.

    ``out = (exp(lse_a) out_a + exp(lse_b) out_b) / (exp(lse_a) + exp(lse_b))``, ``lse = logaddexp(lse_a, lse_b)``

    Parameters
    ----------
    out_a, out_b
        [T, H, D] float, of one dtype.
    lse_a, lse_b
        [T, H] float32: natural log-sum-exps of the scores.

    Returns
    -------
    out : Tensor
        [T, H, D] of the inputs' dtype.
    lse : Tensor
        [T, H] float32.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape or device.

    Notes
    -----
    The empty state is (0, -inf): merging with it returns the other one bit for bit. Merging is commutative to the bit
    and associative up to rounding. Reads and writes each row once; one launch. The formula is that of
    "FlashInfer" (arXiv 2501.01005), section 2.2, which states it in base 2; here it is natural.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> a, b = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    >>> out, lse = tk.merge_states(a, torch.zeros(1, 1), b, torch.zeros(1, 1))
    >>> out
    tensor([[[0.5000, 0.5000]]])
    >>> lse
    tensor([[0.6931]])
    """
    out: tuple[Tensor, Tensor] = _op(out_a, lse_a, out_b, lse_b)
    return out


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    checks.tensor("out_a", out_a, shape=["T", "H", "D"])
    checks.tensor("lse_a", lse_a, (torch.float32,), out_a.shape[:2], out_a.device)
    checks.tensor("out_b", out_b, (out_a.dtype,), out_a.shape, out_a.device)
    checks.tensor("lse_b", lse_b, (torch.float32,), out_a.shape[:2], out_a.device)


def _fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return out_a.new_empty(out_a.shape), out_a.new_empty(out_a.shape[:2], dtype=torch.float32)


_op = Op("merge_states", reference=reference.merge_states, check=_check, fake=_fake)
