"""Weights of 8 and 4 bits with the scales of their file, before they are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

import tts_kernels as tk

__all__ = ["Loader", "Quantised", "Weight", "join", "nearest", "pack", "whole", "with_minimum"]

_ROWS: Final = 2048  # rows that are processed at a time; a multiple of a panel's 16


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight [N, K] of whole numbers: ``(numbers - zero) * scale``.

    Attributes
    ----------
    numbers : Tensor
        [N, K], int8; with 4 bits uint8 from 0 to 15.
    scale : Tensor
        [N, groups] float.
    zero : Tensor or None
        [N, groups]: the number that means 0. None: 0, or 8 with 4 bits.
    group_size : int or None
        Number of columns that share a scale; None: all of a row.
    """

    numbers: Tensor
    scale: Tensor
    zero: Tensor | None = None
    group_size: int | None = None

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.numbers.shape

    @property
    def kind(self) -> Literal["int8", "int4"]:
        """The kind, in the words of `tts_kernels.pack_linear`."""
        return "int8" if self.numbers.dtype == torch.int8 else "int4"

    def __getitem__(self, rows: slice | Tensor) -> Quantised:
        """Some of the rows."""
        zero = None if self.zero is None else self.zero[rows]
        return Quantised(self.numbers[rows], self.scale[rows], zero, self.group_size)

    def to(self, device: torch.device) -> Quantised:
        """The same weight on a device."""
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, numbers=self.numbers.to(device), scale=self.scale.to(device), zero=zero)

    def in_8_bits(self) -> Quantised:
        """The same weight in numbers of 8 bits."""
        if self.kind == "int8":
            return self
        zero = torch.full_like(self.scale, 8) if self.zero is None else self.zero
        return replace(self, numbers=self.numbers.to(torch.int8), zero=zero)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] as floats."""
        out = torch.empty(self.shape, dtype=dtype, device=self.numbers.device)
        zero = 8 if self.kind == "int4" else 0
        for first in range(0, len(out), _ROWS):
            part = self[first : first + _ROWS]
            spread = self.group_size or max(self.shape[1], 1)
            scale, zeros = (
                None if each is None else each.float().repeat_interleave(spread, 1)[:, : self.shape[1]]
                for each in (part.scale, part.zero)
            )
            assert scale is not None
            out[first : first + _ROWS] = (part.numbers.float() - (zero if zeros is None else zeros)) * scale
        return out


Weight = Tensor | Quantised
# Functions that load a weight when it is needed. Two names of one weight share one loader.
Loader = Callable[[], Weight]


def with_minimum(numbers: Tensor, scale: Tensor, minimum: Tensor, group_size: int) -> Quantised:
    """The weight ``numbers * scale + minimum``. Where the scale is 0, the weight is the minimum."""
    empty = scale == 0
    zero = torch.where(empty, -1.0, -minimum / torch.where(empty, 1.0, scale))
    blank = empty.repeat_interleave(group_size, 1)[:, : numbers.shape[1]]
    return Quantised(numbers.masked_fill(blank, 0), torch.where(empty, minimum, scale), zero, group_size)


def nearest(weight: Tensor, group_size: int) -> Quantised:
    """A weight [N, K] in 8 bits, by the largest magnitude of each group; K is a multiple of the group."""
    groups = torch.unflatten(weight.float(), 1, (-1, group_size))
    scale = groups.abs().amax(2) / 127
    numbers = (groups / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().nan_to_num()
    return Quantised(numbers.flatten(1).to(torch.int8), scale, None, group_size)


def whole(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight in a floating type."""
    return weight.dequantised(dtype) if isinstance(weight, Quantised) else weight.to(dtype)


def join(parts: Sequence[Weight], dtype: torch.dtype | None = None) -> Weight:
    """Weights stacked along their rows. If they have no common quantised form, they are joined in ``dtype``."""
    if len(parts) == 1:
        return parts[0]
    few = [part for part in parts if isinstance(part, Quantised)]
    if not few:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    if len(few) < len(parts) or len({part.group_size for part in few}) > 1:
        kind = dtype or torch.float32
        return torch.cat([whole(part, kind) for part in parts])
    if len({part.kind for part in few}) > 1:
        few = [part.in_8_bits() for part in few]
    zero = None
    if any(part.zero is not None for part in few):
        middle = 8 if few[0].kind == "int4" else 0
        zero = torch.cat([torch.full_like(p.scale, middle) if p.zero is None else p.zero for p in few])
    return Quantised(
        torch.cat([part.numbers for part in few]), torch.cat([part.scale for part in few]), zero, few[0].group_size
    )


def pack(
    weight: Weight, quantize: Literal["int8", "int4"] | None = None, group_size: int | None = None
) -> tk.PackedLinear:
    """Pack a weight [N, K]. Quantised weights stay as they are; others are packed by `tts_kernels.pack_linear`.

    Panels of 16 rows are independent, so quantising needs memory only for `_ROWS` rows at a time.
    """
    if isinstance(weight, Tensor) and quantize is None:
        return tk.pack_linear(weight)
    parts = [_pack(weight[first : first + _ROWS], quantize, group_size) for first in range(0, weight.shape[0], _ROWS)]
    rows = sum(part.out_features for part in parts)
    weights, scales, zeros = ([getattr(p, name) for p in parts] for name in ("weight", "scale", "zero"))
    zero = None if zeros[0] is None else torch.cat(zeros)
    return tk.PackedLinear(torch.cat(weights), weight.shape[1], rows, torch.cat(scales), zero)


def _pack(weight: Weight, quantize: Literal["int8", "int4"] | None, group_size: int | None) -> tk.PackedLinear:
    if isinstance(weight, Tensor):
        return tk.pack_linear(weight, quantize=quantize, group_size=group_size)
    numbers = weight.numbers
    if weight.kind == "int4":
        numbers = numbers[:, 0::2] | numbers[:, 1::2] << 4
    return tk.PackedLinear.from_quantized(numbers, weight.scale, weight.zero, weight.group_size)
