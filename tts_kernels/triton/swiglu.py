"""swiglu: ``silu(gate) * up``; [T, 2 I] -> [T, I].

A program takes up to 1024 elements of a row. Bytes: the input once, the output once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .numerics import dense_rows, narrow


@triton.jit
def swiglu_kernel(gate_up, out, width, stride, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + r * stride + i, mask=i < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + r * stride + width + i, mask=i < width, other=0.0).to(tl.float32)
    activated = gate / (1.0 + tl.exp(-gate))
    tl.store(out + r * width + i, narrow(activated * up, out.dtype.element_ty), mask=i < width)


def swiglu(gate_up: Tensor) -> Tensor:
    """[T, I]."""
    gate_up = dense_rows(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel():
        block = min(1024, triton.next_power_of_2(width))
        swiglu_kernel[(rows, triton.cdiv(width, block))](
            gate_up, out, width, gate_up.stride(0), BLOCK=block, **config("rows", out.device)
        )
    return out
