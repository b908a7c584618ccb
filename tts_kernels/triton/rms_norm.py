"""rms_norm: ``h = x + residual``, ``normed = h / sqrt(mean(h**2) + eps) * weight``.

One program for each row. It rounds h to the inputs' dtype, writes it and sums its squares. A second pass finds the row
in the cache. Bytes: each input once, each output once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .numerics import dense_rows, narrow


@triton.jit
def norm_kernel(x, residual, weight, normed, summed, width, x_stride, residual_stride, eps, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = normed.dtype.element_ty
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        h = tl.load(x + r * x_stride + i, mask=i < width, other=0.0).to(tl.float32)
        if residual is not None:
            h += tl.load(residual + r * residual_stride + i, mask=i < width, other=0.0).to(tl.float32)
            rounded = narrow(h, dtype)
            tl.store(summed + r * width + i, rounded, mask=i < width)
            h = rounded.to(tl.float32)
        squares += h * h
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / width + eps)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        h = tl.load(x + r * x_stride + i, mask=i < width, other=0.0).to(tl.float32)
        if residual is not None:
            h += tl.load(residual + r * residual_stride + i, mask=i < width, other=0.0).to(tl.float32)
            h = narrow(h, dtype).to(tl.float32)
        w = tl.load(weight + i, mask=i < width, other=0.0).to(tl.float32)
        tl.store(normed + r * width + i, narrow(h * scale * w, dtype), mask=i < width)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """normed [T, H] and h [T, H], which is empty without a residual."""
    rows, width = x.shape
    x, weight = dense_rows(x), weight.contiguous()
    residual = None if residual is None else dense_rows(residual)
    normed = x.new_empty(rows, width)
    summed = x.new_empty(rows if residual is not None else 0, width)
    if normed.numel():
        norm_kernel[(rows,)](
            x, residual, weight, normed, summed, width, x.stride(0), 0 if residual is None else residual.stride(0),
            eps, BLOCK=min(4096, triton.next_power_of_2(width)), **config("rows", x.device),
        )  # fmt: skip
    return normed, summed
