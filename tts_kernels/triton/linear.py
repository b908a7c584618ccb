"""linear on weights of 8 or 4 bits: x @ dequantised.T + bias + residual. Torch's library multiplies floats.

A program multiplies BLOCK_M rows of x with BLOCK_N rows of the weight, 64 columns at a time, in order. The weights
become floats of x's type when they are loaded. Programs of the same part of the weight are neighbours. Bytes: the
weight once for each BLOCK_M rows, and only the first of these reads goes beyond L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .numerics import dense_rows, dot, narrow

GROUPS = (32, 64, 128)
BLOCK_K = 64  # the depth of the weight is padded to multiples of it


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, weight, scale, zero, bias, residual, out, rows, columns, depth, x_stride, residual_stride, groups, group,
    BITS: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weight [panels, padded depth / 4 (8 for 4 bits), 16, 4], scale and zero [panels, groups, 16]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lines = (depth + 63) // 64 * (2 * BITS)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = (n < columns)[None, :] & (k < depth)[:, None]
        line = k // 4 if BITS == 8 else k // 8
        at = ((n // 16)[None, :] * lines + line[:, None]) * 64 + (n % 16)[None, :] * 4 + (k % 4)[:, None]
        number = tl.load(weight + at, mask=there, other=0).to(tl.int32)
        if BITS == 4:
            number = (number >> (k // 4 % 2 * 4)[:, None]) & 15
        value = (number - (1 << (BITS - 1))).to(tl.float32)
        of_group = ((n // 16)[None, :] * groups + (k // group)[:, None]) * 16 + (n % 16)[None, :]
        if ZERO:
            value -= tl.load(zero + of_group, mask=there, other=0.0)
        value = narrow(value * tl.load(scale + of_group, mask=there, other=0.0), x.dtype.element_ty)
        a = tl.load(x + m[:, None] * x_stride + k[None, :], mask=(m < rows)[:, None] & (k < depth)[None, :], other=0.0)
        total = dot(a, value, total)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        total += tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m[:, None] * columns + n[None, :], narrow(total, out.dtype.element_ty), mask=inside)


def linear(
    x: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """[T, N] of x's dtype."""
    if scale is None:
        y = torch.nn.functional.linear(x, weight, bias)
        return y if residual is None else y + residual
    x = dense_rows(x)
    residual = None if residual is None else dense_rows(residual)
    out = x.new_empty(x.shape[0], out_features)
    if out.numel() == 0:
        return out
    options = config("linear" if x.dtype != torch.float32 else "linear_float32", x.device)
    depth = -(-in_features // BLOCK_K) * BLOCK_K
    groups = scale.shape[1]
    group = next((size for size in GROUPS if groups == -(-depth // size)), max(depth, 1))
    block_m = 16 if x.shape[0] <= 16 else 64
    grid = (triton.cdiv(x.shape[0], block_m), triton.cdiv(out_features, options["BLOCK_N"]))
    linear_kernel[grid](
        x, weight, scale, zero, bias, residual, out, x.shape[0], out_features, in_features, x.stride(0),
        0 if residual is None else residual.stride(0), groups, group,
        BITS=8 if weight.shape[1] * 4 == depth else 4, ZERO=zero is not None, BIAS=bias is not None,
        RESIDUAL=residual is not None, BLOCK_M=block_m, BLOCK_K=BLOCK_K, **options,
    )  # fmt: skip
    return out
