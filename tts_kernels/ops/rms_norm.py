"""RMSNorm, optionally after adding x to the residual stream."""

from __future__ import annotations

from torch import Tensor

from .. import checks, reference
from ..op import Op


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Add the residual, then norm: ``h = x + residual``, ``normed = h / sqrt(mean(h**2) + eps) * weight``.

    Parameters
    ----------
    x
        [T, H] float; rows may be strided.
    weight
        [H] of x's dtype.
    eps
        At least 0.
    residual
        [T, H] of x's dtype, or None.

    Returns
    -------
    normed
        [T, H] of x's dtype.
    new_residual
        h [T, H], rounded to x's dtype before the norm; x itself without a residual.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape or device, or an eps that is negative or not finite.

    Notes
    -----
    Reads each input and writes each output once; one launch. "Root Mean Square Layer Normalization" (arXiv 1910.07467).

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> normed, h = tk.rms_norm(torch.tensor([[1.0, 7.0]]), torch.ones(2), 0.0, residual=torch.tensor([[2.0, -3.0]]))
    >>> h, normed
    (tensor([[3., 4.]]), tensor([[0.8485, 1.1314]]))
    """
    normed, summed = rms_norm_op(x, weight, eps, residual)
    return normed, x if residual is None else summed


def _check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> None:
    checks.tensor("x", x, shape=["T", "H"])
    checks.tensor("weight", weight, (x.dtype,), [x.shape[1]], x.device)
    checks.number("eps", eps, low=0.0)
    if residual is not None:
        checks.tensor("residual", residual, (x.dtype,), list(x.shape), x.device)


def _fake(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    rows, width = x.shape
    return x.new_empty(rows, width), x.new_empty(rows if residual is not None else 0, width)


rms_norm_op = Op("rms_norm", reference=reference.rms_norm, check=_check, fake=_fake)
