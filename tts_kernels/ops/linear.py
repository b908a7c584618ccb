"""Linear layers on weights that were packed once, fast for few rows and the same for each row in any company."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import checks, reference
from ..op import Op

PANEL = 16


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A weight matrix in the layout that `linear` reads; made by `pack_linear`. A pytree with one tensor.

    Attributes
    ----------
    weight
        [ceil(N / 16), ceil(K / s), 16, s]: panels of 16 rows of W, K outermost; s = 2 for bfloat16, else 1. The padding
        is zero. The layout is the same for every instruction set. On a GPU it is W itself, [N, K], as its libraries
        read it.
    in_features, out_features
        K and N.
    """

    weight: Tensor
    in_features: int
    out_features: int

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights, which the input of `linear` must share."""
        return self.weight.dtype

    def unpack(self) -> Tensor:
        """The weight [N, K] that was packed."""
        return reference.unpack_linear(self.weight, self.in_features, self.out_features)


pytree.register_pytree_node(
    PackedLinear,
    lambda packed: ([packed.weight], (packed.in_features, packed.out_features)),
    lambda values, context: PackedLinear(*values, *context),
    serialized_type_name="tts_kernels.PackedLinear",
)


def pack_linear(weight: Tensor) -> PackedLinear:
    """Pack the weight of a linear layer for `linear`.

    Parameters
    ----------
    weight
        [N, K] float, as ``torch.nn.Linear`` holds it.

    Returns
    -------
    PackedLinear
        About the same number of bytes: on a CPU N is padded to a multiple of 16, K to an even number in bfloat16. On a
        GPU it is the weight, uncopied if it is contiguous.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape.

    Notes
    -----
    Reads and writes the weight once; meant to be done once, when a model is loaded.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> tk.pack_linear(torch.eye(3, 5)).unpack().shape
    torch.Size([3, 5])
    """
    packed = _pack(weight)
    return PackedLinear(packed, weight.shape[1], weight.shape[0])


def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias + residual``, summed in float32 and rounded once.

    On a CPU a row's result does not depend on the other rows, on their number, or on the number of threads, to the bit.
    On a GPU torch's library multiplies, which may choose another order of summation for another number of rows.

    Parameters
    ----------
    x
        [T, K] float; rows may be strided.
    packed
        The weight [N, K], packed by `pack_linear`, of x's dtype.
    bias
        [N] of x's dtype, or None.
    residual
        [T, N] of x's dtype, or None: added before rounding, as the residual stream of a decoder layer.

    Returns
    -------
    Tensor
        [T, N] of x's dtype.

    Raises
    ------
    TypeError
        For a wrong dtype, or a weight that is not packed.
    ValueError
        For a wrong shape or device.

    Notes
    -----
    2 T N K operations; reads the weight from memory once for each 256 rows (it is the bound below 25 rows or so). In
    bfloat16 with AVX512-BF16, products of subnormal numbers count as zero.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> packed = tk.pack_linear(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    >>> tk.linear(torch.tensor([[1.0, 1.0]]), packed, bias=torch.tensor([0.5, 0.0]))
    tensor([[3.5000, 3.0000]])
    """
    if not isinstance(packed, PackedLinear):
        raise TypeError(f"packed: expected a PackedLinear from pack_linear, got {checks.describe(packed)}")
    out: Tensor = linear_op(x, packed.weight, packed.in_features, packed.out_features, bias, residual)
    return out


def _step(dtype: torch.dtype) -> int:
    """Elements of K that lie next to each other."""
    return 2 if dtype == torch.bfloat16 else 1


def packed_shape(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> list[int]:
    """Shape of the packed weight of a layer."""
    if device.type not in ("cpu", "meta"):
        return [outputs, inputs]
    step = _step(dtype)
    return [-(-outputs // PANEL), -(-inputs // step), PANEL, step]


def _check_pack(weight: Tensor) -> None:
    checks.tensor("weight", weight, shape=["N", "K"])


def _fake_pack(weight: Tensor) -> Tensor:
    return weight.new_empty(packed_shape(weight.shape[0], weight.shape[1], weight.dtype, weight.device))


def _check(
    x: Tensor, weight: Tensor, in_features: int, out_features: int, bias: Tensor | None, residual: Tensor | None
) -> None:
    checks.tensor("x", x, shape=["T", "K"])
    if x.shape[1] != in_features:
        raise ValueError(f"x: expected shape [T, {in_features}], got {checks.describe(x)}")
    checks.tensor(
        "packed.weight", weight, (x.dtype,), packed_shape(out_features, in_features, x.dtype, x.device), x.device
    )
    if not weight.is_contiguous():
        raise ValueError("packed.weight: expected a contiguous tensor, got a strided one")
    if bias is not None:
        checks.tensor("bias", bias, (x.dtype,), [out_features], x.device)
    if residual is not None:
        checks.tensor("residual", residual, (x.dtype,), [x.shape[0], out_features], x.device)


def _fake(x: Tensor, weight: Tensor, in_features: int, out_features: int, *added: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], out_features)


def _by_torch(
    x: Tensor, weight: Tensor, in_features: int, out_features: int, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """One product of torch's library, which adds a bias or a residual before it rounds."""
    weight = reference.unpack_linear(weight, in_features, out_features)
    if residual is not None and bias is None:
        return torch.addmm(residual, x, weight.T)
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


_pack = Op(
    "pack_linear",
    reference=reference.pack_linear,
    check=_check_pack,
    fake=_fake_pack,
    composed=reference.pack_linear,
)
linear_op = Op("linear", reference=reference.linear, check=_check, fake=_fake, composed=_by_torch)
