"""aggregate_steps: one score for each candidate from the scores of its steps.

A program takes BLOCK candidates, a lane each, and walks their steps in order in float64, so that sums and products
round as they do on the CPU (csrc/include/aggregate.h). Bytes: S scores, C + 1 offsets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def aggregate(scores, begin, end, prior, prior_count, HOW: tl.constexpr):
    """The aggregate of `prior` over `prior_count` steps and ``scores[begin:end]``; a lane for each candidate."""
    count = prior_count
    value = tl.where(count > 0, prior, 0.0).to(tl.float64)
    if HOW == "mean":
        value = value * count.to(tl.float64)
    for i in range(tl.max(end - begin, 0)):
        there = begin + i < end
        x = tl.load(scores + begin + i, mask=there, other=0.0).to(tl.float32).to(tl.float64)
        if HOW == "last":
            after = x
        elif HOW == "prod":
            after = value * x
        elif HOW == "min":
            after = tl.where((value == value) & ((x < value) | (x != x)), x, value)
        elif HOW == "max":
            after = tl.where((value == value) & ((x > value) | (x != x)), x, value)
        else:
            after = value + x
        value = tl.where(there, tl.where(count == 0, x, after), value)
        count += there.to(count.dtype)
    if HOW == "mean":
        value = value / tl.maximum(count, 1).to(tl.float64)
    return tl.where(count == 0, float("-inf"), value.to(tl.float32))


@triton.jit(do_not_specialize=["candidates"])
def aggregate_kernel(scores, indptr, out, candidates, HOW: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = c < candidates
    begin = tl.load(indptr + c, mask=there, other=0).to(tl.int64)
    end = tl.load(indptr + c + 1, mask=there, other=0).to(tl.int64)
    none = tl.zeros([BLOCK], tl.float32)
    tl.store(out + c, aggregate(scores, begin, end, none, tl.zeros([BLOCK], tl.int64), HOW), mask=there)


def aggregate_steps(scores: Tensor, indptr: Tensor, how: str) -> Tensor:
    """[C] float32."""
    scores, indptr = scores.contiguous(), indptr.contiguous()
    candidates, block = indptr.shape[0] - 1, 32
    out = scores.new_empty(candidates, dtype=torch.float32)
    if candidates:
        grid = (triton.cdiv(candidates, block),)
        aggregate_kernel[grid](scores, indptr, out, candidates, HOW=how, BLOCK=block, num_warps=1)
    return out
