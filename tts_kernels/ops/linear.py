"""Linear layers on packed weights. They are fast for few rows, and a row's result does not depend on the other rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import checks, reference
from ..choices import state
from ..op import Op

PANEL = 16


Quantize = Literal["int8", "int4"]
BITS: Final[dict[str, int]] = {"int8": 8, "int4": 4}
GROUP_SIZES: Final = (32, 64, 128)
MAX_QUANTIZED_DEPTH: Final = 2**16


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A weight matrix in the layout that `linear` reads; made by `pack_linear` or `from_quantized`. A pytree.

    Attributes
    ----------
    weight
        [ceil(N / 16), ceil(K / s), 16, s]: panels of 16 rows of W, K outermost; s = 2 for bfloat16, else 1. The padding
        is zero. The layout is the same for every instruction set. On a GPU it is W itself, [N, K], for torch's
        libraries.

        Quantised: whole numbers as uint8, with 128 or 8 added, s = 4, K padded to a multiple of 64. In 4 bits the
        second dimension is half as long: a byte has a number of an even step, and in its high half one of the next
        step. On a GPU the layout is the same.
    in_features, out_features
        K and N.
    scale, zero
        Quantised: [ceil(N / 16), groups, 16] float32: a weight is ``(number - zero) * scale``. No zero: None.
    """

    weight: Tensor
    in_features: int
    out_features: int
    scale: Tensor | None = None
    zero: Tensor | None = None

    @classmethod
    def from_quantized(
        cls, q: Tensor, scale: Tensor, zero: Tensor | None = None, group_size: int | None = None
    ) -> PackedLinear:
        """Pack weights that are already quantised, with their own scales.

        Parameters
        ----------
        q
            [N, K] int8; or [N, K / 2] uint8 for 4 bits: numbers 0 to 15, two in each byte, the first one low.
        scale
            [N, groups] float, kept in float32.
        zero
            [N, groups]: the number of a weight of 0, which need not be whole; None: 0, in 4 bits 8.
        group_size
            32, 64 or 128 columns that share a scale (the last group may be shorter); None: all columns.

        Returns
        -------
        PackedLinear
            Of the weights ``(q - zero) * scale``.

        Raises
        ------
        TypeError
            For a wrong dtype.
        ValueError
            For a wrong shape or group size, or more than 65,536 columns.

        Examples
        --------
        >>> import torch, tts_kernels as tk
        >>> q = torch.tensor([[3, -2], [100, 0]], dtype=torch.int8)
        >>> tk.PackedLinear.from_quantized(q, torch.tensor([[0.5], [0.25]])).unpack()
        tensor([[ 1.5000, -1.0000],
                [25.0000,  0.0000]])
        """
        _check_group_size(group_size)
        checks.tensor("q", q, (torch.int8, torch.uint8), ["N", "columns"])
        bits = 8 if q.dtype == torch.int8 else 4
        whole = (q.short() + 128).to(torch.uint8) if bits == 8 else torch.stack([q & 15, q >> 4], -1).flatten(1)
        rows, depth = whole.shape
        _check_depth("q", depth)
        groups = max(-(-depth // group_size), 1) if group_size else 1
        checks.tensor("scale", scale, shape=[rows, groups], device=q.device)
        zeros = None
        if zero is not None:
            kinds = (*checks.FLOAT, torch.int8, torch.uint8, torch.int16, *checks.INDEX)
            checks.tensor("zero", zero, kinds, [rows, groups], q.device)
            zeros = reference.pack_groups(zero.float() - (8 if bits == 4 else 0), depth, group_size)
        scales = reference.pack_groups(scale, depth, group_size)
        return cls(reference.pack_whole(whole, bits), depth, rows, scales, zeros)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights, which the input of `linear` must share; uint8 if quantised, for any input."""
        return self.weight.dtype

    @property
    def quantize(self) -> Quantize | None:
        """How the weights are quantised."""
        if self.scale is None:
            return None
        return "int8" if reference.quantized_bits(self.weight, self.in_features) == 8 else "int4"

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None: all of a row do, or there is none."""
        return None if self.scale is None else reference.quantized_group(self.scale, self.in_features)

    def unpack(self) -> Tensor:
        """The weight [N, K]; a quantised one is decoded to float32."""
        if self.scale is None:
            return reference.unpack_linear(self.weight, self.in_features, self.out_features)
        return reference.dequantize_linear(self.weight, self.in_features, self.out_features, self.scale, self.zero)


def _flatten(packed: PackedLinear) -> tuple[list[Tensor], tuple[int, int]]:
    leaves = [t for t in (packed.weight, packed.scale, packed.zero) if t is not None]
    return leaves, (packed.in_features, packed.out_features)


def _unflatten(leaves: Iterable[Any], features: tuple[int, int]) -> PackedLinear:
    weight, *scales = leaves
    return PackedLinear(weight, *features, *scales)


pytree.register_pytree_node(PackedLinear, _flatten, _unflatten, serialized_type_name="tts_kernels.PackedLinear")


def pack_linear(weight: Tensor, *, quantize: Quantize | None = None, group_size: int | None = None) -> PackedLinear:
    """Pack the weight of a linear layer for `linear`, unchanged or in 8 or 4 bits.

    Parameters
    ----------
    weight
        [N, K] float, as in ``torch.nn.Linear``.
    quantize
        None: keep the weight. "int8", "int4": whole numbers of 8 or 4 bits and scales, no zero points.
    group_size
        For a quantised weight: 32, 64 or 128 columns that share a scale (the last group may be shorter); None: a whole
        row.

    Returns
    -------
    PackedLinear
        It has about the same number of bytes: on a CPU N is padded to a multiple of 16, K to an even number in
        bfloat16. On a GPU it is the weight, not copied if it is contiguous. If quantised, K is padded to a multiple of
        64, and a scale takes 4 bytes.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape or option, or more than 65,536 columns to be quantised.

    Notes
    -----
    Reads and writes the weight once; to be done once, when a model is loaded. Quantising needs memory for a few copies
    in float32. The scale of a group is its largest magnitude over 127; in 4 bits it is the value of this magnitude over
    -8 (as in GGUF's Q4_0), so that all 16 numbers are used. A group with NaN or an infinity is NaN.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> tk.pack_linear(torch.eye(3, 5)).unpack().shape
    torch.Size([3, 5])
    >>> tk.pack_linear(torch.tensor([[1.0, -0.5, 0.25]]), quantize="int4").unpack()
    tensor([[ 1.0000, -0.5000,  0.2500]])
    """
    if quantize is None:
        if group_size is not None:
            raise ValueError(f"group_size: expected None without quantize, got {group_size!r}")
        packed = _pack(weight)
        return PackedLinear(packed, weight.shape[1], weight.shape[0])
    checks.choice("quantize", quantize, list(BITS))
    _check_group_size(group_size)
    checks.tensor("weight", weight, shape=["N", "K"])
    rows, depth = weight.shape
    _check_depth("weight", depth)
    whole, scale = reference.quantize_linear(weight, BITS[quantize], group_size)
    scale = reference.pack_groups(scale, depth, group_size)
    return PackedLinear(reference.pack_whole(whole, BITS[quantize]), depth, rows, scale)


def _check_group_size(group_size: int | None) -> None:
    if group_size is not None:
        checks.integer("group_size", group_size, 1)
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group_size: expected 32, 64, 128 or None, got {group_size}")


def _check_depth(name: str, depth: int) -> None:
    if depth > MAX_QUANTIZED_DEPTH:
        raise ValueError(f"{name}: expected at most {MAX_QUANTIZED_DEPTH} columns to quantise, got {depth}")


def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias + residual``, summed in float32 and rounded once.

    With a weight of 8 or 4 bits, each row of x is converted to whole numbers with its own scale. The scale lets 8 bits
    cover 8 times the mean magnitude of the row (or the largest magnitude if that is smaller); larger elements get up to
    15 bits and a sign. Products are summed exactly in each group of columns, and groups are added in float32 in
    ascending order, so every instruction set gives the same bits. A row with NaN or an infinity is NaN. On a GPU, rows
    are not converted, and are multiplied with dequantised weights.

    On a CPU a row's result does not depend on the other rows, on their number, or on the number of threads, to the bit.
    On a GPU torch's library multiplies, which may choose another order of summation for another number of rows. This
    does not happen under `deterministic` or with a quantised weight.

    Parameters
    ----------
    x
        [T, K] float; rows may be strided.
    packed
        The weight [N, K], packed by `pack_linear`: of x's dtype, or quantised.
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
    2 T N K operations. Reads the weight from memory once for each 256 rows, which is the bound below about 25 rows. In
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
    features = (packed.in_features, packed.out_features)
    out: Tensor = linear_op(x, packed.weight, *features, bias, residual, packed.scale, packed.zero)
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


def check_weight(
    prefix: str,
    x: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    scale: Tensor | None,
    zero: Tensor | None,
) -> None:
    """A packed weight for x. Errors name its tensors with ``prefix`` before "weight", "scale" or "zero"."""
    if scale is None:
        shape = packed_shape(out_features, in_features, x.dtype, x.device)
        checks.tensor(f"{prefix}weight", weight, (x.dtype,), shape, x.device)
        if zero is not None:
            raise ValueError(f"{prefix}zero: expected None without a scale, got {checks.describe(zero)}")
        parts = {f"{prefix}weight": weight}
    else:
        depth = -(-in_features // reference.INT_BLOCK) * reference.INT_BLOCK
        panels = -(-out_features // PANEL)
        checks.tensor(f"{prefix}weight", weight, (torch.uint8,), [panels, "K / 4 or K / 8", PANEL, 4], x.device)
        if weight.shape[1] not in (depth // 4, depth // 8):
            raise ValueError(
                f"{prefix}weight: expected {depth // 4} or {depth // 8} steps, got {checks.describe(weight)}"
            )
        groups = [1, *(-(-depth // size) for size in GROUP_SIZES if depth)]
        checks.tensor(f"{prefix}scale", scale, (torch.float32,), [panels, "groups", PANEL], x.device)
        if scale.shape[1] not in groups:
            raise ValueError(f"{prefix}scale: expected one of {groups} groups, got {checks.describe(scale)}")
        parts = {f"{prefix}weight": weight, f"{prefix}scale": scale}
        if zero is not None:
            checks.tensor(f"{prefix}zero", zero, (torch.float32,), list(scale.shape), x.device)
            parts[f"{prefix}zero"] = zero
    for part, tensor in parts.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{part}: expected a contiguous tensor, got a strided one")


def _check(
    x: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> None:
    checks.tensor("x", x, shape=["T", "K"])
    if x.shape[1] != in_features:
        raise ValueError(f"x: expected shape [T, {in_features}], got {checks.describe(x)}")
    check_weight("packed.", x, weight, in_features, out_features, scale, zero)
    if bias is not None:
        checks.tensor("bias", bias, (x.dtype,), [out_features], x.device)
    if residual is not None:
        checks.tensor("residual", residual, (x.dtype,), [x.shape[0], out_features], x.device)


def _fake(x: Tensor, weight: Tensor, in_features: int, out_features: int, *added: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], out_features)


def _by_torch(
    x: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """One product of torch's library, which adds a bias or a residual before it rounds."""
    if scale is None:
        weight = reference.unpack_linear(weight, in_features, out_features)
    else:
        weight = reference.dequantize_linear(weight, in_features, out_features, scale, zero).to(x.dtype)
    if residual is not None and bias is None:
        return torch.addmm(residual, x, weight.T)
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


def _by_the_library(
    x: Tensor,  # noqa: ARG001
    weight: Tensor,  # noqa: ARG001
    in_features: int,  # noqa: ARG001
    out_features: int,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,  # noqa: ARG001
    scale: Tensor | None = None,
    zero: Tensor | None = None,  # noqa: ARG001
) -> bool:
    """Torch's products of floats are faster than ours, as it may choose an order of summation for each shape."""
    return scale is None and not state.deterministic


_pack = Op(
    "pack_linear",
    reference=reference.pack_linear,
    check=_check_pack,
    fake=_fake_pack,
    composed=reference.pack_linear,
)
linear_op = Op(
    "linear",
    reference=reference.linear,
    check=_check,
    fake=_fake,
    composed=_by_torch,
    rather_composed=_by_the_library,
)
