"""The gated activation of a decoder's MLP."""

from __future__ import annotations

from torch import Tensor

from .. import checks, reference
from ..op import Op


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for gate and up next to each other, as they come from one projection.

    Parameters
    ----------
    gate_up
        [T, 2 I] float: gate [T, I], then up [T, I]; rows may be strided.

    Returns
    -------
    Tensor
        [T, I] of the same dtype; computed in float32, rounded once.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape.

    Notes
    -----
    Reads and writes each element once; one launch. "GLU Variants Improve Transformer" (arXiv 2002.05202).

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> tk.swiglu(torch.tensor([[0.0, 1.0, 5.0, 2.0]]))
    tensor([[0.0000, 1.4621]])
    """
    out: Tensor = swiglu_op(gate_up)
    return out


def _check(gate_up: Tensor) -> None:
    checks.tensor("gate_up", gate_up, shape=["T", "2 I"])
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected an even number of columns, got {checks.describe(gate_up)}")


def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


swiglu_op = Op("swiglu", reference=reference.swiglu, check=_check, fake=_fake)
