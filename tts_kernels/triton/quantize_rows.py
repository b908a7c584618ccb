"""quantize_rows: rows of numbers in 8, 4, 3 or 2 bits, with a scale and a zero for each group of columns.

Two launches. A program of the first launch finds the scales and zeros of a row, for all groups at a time, and writes
them after the codes. A byte of a plane has columns that are far apart and in different groups, so a program of the
second launch makes a block of a row's bytes of each plane. Bytes: x twice, the second time from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .numerics import codes, dense_rows, is_finite, of_half, scale_and_zero

BLOCK = 256


@triton.jit
def put_half(at, bits, mask):
    """Stores a float16 as bytes; its address may be odd."""
    tl.store(at, (bits & 255).to(tl.uint8), mask=mask)
    tl.store(at + 1, ((bits >> 8) & 255).to(tl.uint8), mask=mask)


@triton.jit
def half_at(at, mask):
    """The float32 of a float16 whose address may be odd."""
    low = tl.load(at, mask=mask, other=0).to(tl.int32)
    return of_half(low | tl.load(at + 1, mask=mask, other=0).to(tl.int32) << 8)


@triton.jit
def group_kernel(
    x, out, x_stride, row_bytes, groups, size, numbers,
    TOP: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Scales and zeros of a row's groups of ``size`` columns, from byte ``numbers`` of the row on."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = tl.arange(0, SIZE)[None, :]
    there = (group < groups)[:, None] & (column < size)
    value = tl.load(x + row * x_stride + group[:, None] * size + column, mask=there, other=0.0).to(tl.float32)
    finite = tl.max((there & (is_finite(value) == 0)).to(tl.int32), 1) == 0
    least = tl.min(tl.where(there, value, float("inf")), 1)
    span = tl.max(tl.where(there, value, float("-inf")), 1) - least
    scale, zero = scale_and_zero(tl.where(finite, span, 0.0), tl.where(finite, least, 0.0), finite, TOP)
    to = out + row * row_bytes + numbers + 2 * group
    put_half(to, scale.to(tl.int32), group < groups)
    put_half(to + 2 * groups, zero.to(tl.int32), group < groups)


@triton.jit
def plane_kernel(
    x, out, x_stride, row_bytes, groups, size, numbers, plane, count,
    BITS: tl.constexpr, OF_PLANE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of the ``count`` bytes of a row's plane at byte ``plane``: bits of the codes from ``SHIFT`` on."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.zeros([BLOCK], tl.int32)
    top: tl.constexpr = (1 << BITS) - 1
    for part in tl.static_range(0, 8 // OF_PLANE):
        column = i + part * count
        at = out + row * row_bytes + numbers + 2 * (column // size)
        scale = half_at(at, i < count)
        zero = half_at(at + 2 * groups, i < count)
        value = tl.load(x + row * x_stride + column, mask=i < count, other=0.0).to(tl.float32)
        code = codes(value, scale, zero, 0.0, top * 1.0) >> SHIFT
        byte |= (code & ((1 << OF_PLANE) - 1)) << (part * OF_PLANE)
    tl.store(out + row * row_bytes + plane + i, byte.to(tl.uint8), mask=i < count)


def planes_of(bits: int, width: int) -> list[tuple[int, int, int, int]]:
    """For each plane of a row: its bits, the first bit of a code in it, its first byte, its number of bytes."""
    sizes = [(2, 0), (1, 2)] if bits == 3 else [(bits, 0)]
    return [(of_plane, shift, width * shift // 8, width * of_plane // 8) for of_plane, shift in sizes]


def quantize_rows(x: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes in planes, scales, zeros: uint8 [N, bytes] of rows [N, W]."""
    rows, width = x.shape
    groups, numbers = width // group_size, width * bits // 8
    out = x.new_empty(rows, numbers + 4 * groups, dtype=torch.uint8)
    if out.numel() == 0:
        return out
    x = dense_rows(x)
    group_kernel[(rows,)](
        x, out, x.stride(0), out.shape[1], groups, group_size, numbers, TOP=2.0**bits - 1,
        GROUPS=triton.next_power_of_2(groups), SIZE=triton.next_power_of_2(group_size), **config("rows", x.device),
    )  # fmt: skip
    for of_plane, shift, plane, count in planes_of(bits, width):
        plane_kernel[(rows, triton.cdiv(count, BLOCK))](
            x, out, x.stride(0), out.shape[1], groups, group_size, numbers, plane, count,
            BITS=bits, OF_PLANE=of_plane, SHIFT=shift, BLOCK=BLOCK, **config("rows", x.device),
        )  # fmt: skip
    return out
