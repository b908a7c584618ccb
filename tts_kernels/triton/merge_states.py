"""merge_states: two partial attention results over different keys become one.

    lse = log(exp(lse_a) + exp(lse_b)),  out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)

A program takes one of the T H rows and its D elements. A state with lse = -inf is empty and its row is not used, so
merging with it returns the other state bit for bit. Bytes: both inputs once, the output once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .numerics import narrow


@triton.jit
def merge_kernel(out_a, lse_a, out_b, lse_b, out, lse, dim, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    a = tl.load(lse_a + r)
    b = tl.load(lse_b + r)
    no_a = a == float("-inf")
    no_b = b == float("-inf")
    top = tl.where(b > a, b, a)
    weight_a = tl.exp(a - top)
    weight_b = tl.exp(b - top)
    total = weight_a + weight_b
    merged = top + tl.log(total)
    tl.store(lse + r, tl.where(no_a, b, tl.where(no_b, a, merged)))
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(out_a + r * dim + d, mask=d < dim, other=0.0).to(tl.float32)
        y = tl.load(out_b + r * dim + d, mask=d < dim, other=0.0).to(tl.float32)
        mixed = (weight_a * x + weight_b * y) / total
        result = tl.where(no_a, y, tl.where(no_b, x, mixed))
        tl.store(out + r * dim + d, narrow(result, out.dtype.element_ty), mask=d < dim)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [T, H]."""
    a, b = out_a.contiguous(), out_b.contiguous()
    out = torch.empty_like(a)
    lse = a.new_empty(a.shape[:2], dtype=torch.float32)
    if lse.numel():
        dim = a.shape[2]
        merge_kernel[(lse.numel(),)](
            a, lse_a.contiguous(), b, lse_b.contiguous(), out, lse, dim,
            BLOCK=min(1024, triton.next_power_of_2(max(dim, 32))), **config("rows", a.device),
        )  # fmt: skip
    return out, lse
