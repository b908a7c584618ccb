"""dequantize_rows: the numbers of quantised rows, ``code * scale + zero``.

A program makes a block of a row's columns. A code of 3 bits comes from two planes. The product is exact, so the result
is the same whether or not the sum is fused with it. Bytes: each byte of a plane is read once for each of its columns;
only the first of these reads goes beyond L1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .numerics import dense_rows, narrow
from .quantize_rows import BLOCK, half_at


@triton.jit
def bits_of(plane, column, count, mask, BITS: tl.constexpr):
    """The bits of columns that are in a plane of ``count`` bytes."""
    byte = tl.load(plane + column % count, mask=mask, other=0).to(tl.int32)
    return (byte >> (column // count * BITS)) & ((1 << BITS) - 1)


@triton.jit
def dequantize_kernel(
    rows, out, row_stride, width, groups, size, numbers, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    source = rows + row * row_stride
    if BITS == 3:
        code = bits_of(source, column, width // 4, there, 2)
        code |= bits_of(source + width // 4, column, width // 8, there, 1) << 2
    else:
        code = bits_of(source, column, width * BITS // 8, there, BITS)
    at = source + numbers + 2 * (column // size)
    x = code.to(tl.float32) * half_at(at, there) + half_at(at + 2 * groups, there)
    tl.store(out + row * width + column, narrow(x, out.dtype.element_ty), mask=there)


def dequantize_rows(rows: Tensor, width: int, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """[N, W]."""
    out = rows.new_empty(rows.shape[0], width, dtype=dtype)
    if out.numel():
        rows = dense_rows(rows)
        dequantize_kernel[(rows.shape[0], triton.cdiv(width, BLOCK))](
            rows, out, rows.stride(0), width, width // group_size, group_size, width * bits // 8,
            BITS=bits, BLOCK=BLOCK, **config("rows", rows.device),
        )  # fmt: skip
    return out
