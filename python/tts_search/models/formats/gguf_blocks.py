"""The blocks of weights in GGUF files, as whole numbers and scales or as floats.

A row of a tensor is cut into blocks of 32 weights, or of 256 in K types; ggml's ``ggml-common.h`` has their layouts.
The numbers and scales of a block are kept as they are. The exception is Q6_K, whose scales are for 16 weights: its
weights become floats here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from tts_search.models.quantised import Quantised, Weight, with_minimum

__all__ = ["GROUP", "blocks"]

GROUP: Final = 32  # weights that share a scale


def blocks(data: Tensor, kind: str) -> Weight:
    """Weights [N, K] from rows [N, bytes] uint8 of a type."""
    if kind in ("F32", "F16", "BF16"):
        return data.view({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
    return _LAYOUTS[kind](data)


def _split(data: Tensor, *sizes: int) -> list[Tensor]:
    """The parts of each block [N, blocks, size]."""
    return list(torch.split(data.view(len(data), -1, sum(sizes)), list(sizes), 2))


def _float(part: Tensor) -> Tensor:
    """[N, blocks] of two bytes each."""
    return part.contiguous().view(torch.float16)[..., 0].float()


def _halves(part: Tensor) -> Tensor:
    """The low halves of some bytes, then the high halves [..., 2 * size]."""
    return torch.cat([part & 15, part >> 4], -1)


def _bits(part: Tensor) -> Tensor:
    """Bits of bytes, the lowest first [N, blocks, 8 * size] uint8."""
    return (part[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(2)


def _q8_0(data: Tensor) -> Quantised:
    scale, numbers = _split(data, 2, 32)
    return Quantised(numbers.flatten(1).view(torch.int8), _float(scale), None, GROUP)


def _q4_0(data: Tensor) -> Quantised:
    scale, numbers = _split(data, 2, 16)
    return Quantised(_halves(numbers).flatten(1), _float(scale), None, GROUP)


def _q4_1(data: Tensor) -> Quantised:
    scale, minimum, numbers = _split(data, 2, 2, 16)
    return with_minimum(_halves(numbers).flatten(1), _float(scale), _float(minimum), GROUP)


def _q5_0(data: Tensor) -> Quantised:
    scale, high, low = _split(data, 2, 4, 16)
    numbers = (_halves(low) | _bits(high) << 4).to(torch.int8) - 16
    return Quantised(numbers.flatten(1), _float(scale), None, GROUP)


def _q5_1(data: Tensor) -> Quantised:
    scale, minimum, high, low = _split(data, 2, 2, 4, 16)
    numbers = (_halves(low) | _bits(high) << 4).to(torch.int8)
    return with_minimum(numbers.flatten(1), _float(scale), _float(minimum), GROUP)


def _q4_k(data: Tensor) -> Quantised:
    scale, minimum, packed, numbers = _split(data, 2, 2, 12, 128)
    fours = _halves(torch.unflatten(numbers, 2, (4, 32))).flatten(1)
    return with_minimum(fours, *_of_groups(scale, minimum, packed), GROUP)


def _q5_k(data: Tensor) -> Quantised:
    scale, minimum, packed, high, low = _split(data, 2, 2, 12, 32, 128)
    # Bit g of byte i belongs to weight i of group g.
    fifth = high[..., None, :] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1  # [N, blocks, 8, 32]
    fives = _halves(torch.unflatten(low, 2, (4, 32))).view(fifth.shape) | fifth << 4
    return with_minimum(fives.to(torch.int8).flatten(1), *_of_groups(scale, minimum, packed), GROUP)


def _of_groups(scale: Tensor, minimum: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima [N, groups] of the 8 groups of each block: 6 bits each, packed in 12 bytes, times a float."""
    first, second, third = torch.split(packed, 4, 2)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], 2)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], 2)
    return (_float(scale)[..., None] * scales).flatten(1), -(_float(minimum)[..., None] * minima).flatten(1)


def _q6_k(data: Tensor) -> Tensor:
    low, high, scales, scale = _split(data, 128, 64, 16, 2)
    # Each half block of 128 weights has 64 bytes of low bits and 32 of high bits. A byte of high bits has two bits for
    # one weight of each quarter.
    quarters = torch.unflatten(_halves(torch.unflatten(low, 2, (2, 64))), 3, (4, 32))
    top = torch.unflatten(high, 2, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    numbers = (quarters | top << 4).to(torch.int8) - 32
    each = _float(scale)[..., None] * scales.view(torch.int8)
    return (torch.unflatten(numbers.flatten(2), 2, (16, 16)) * each[..., None]).flatten(1)


_LAYOUTS: Final[dict[str, Callable[[Tensor], Weight]]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
