"""linear_logprob: log softmax(hidden @ weight.T / temperature)[target] without the logits [N, V].

Two launches. A program of the first launch multiplies BLOCK_M rows with BLOCK_N rows of the weight at a time. It goes
through TILES such tiles of the vocabulary with an online softmax, and writes (max, sum) of its part. If a row's target
is in its part, it writes that logit, too. The second launch merges the parts of a row in order. Programs of the same
part and different rows are neighbours, so they find its weights in the cache. Bytes: the weight once (for up to BLOCK_M
rows), and hidden once for each part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .numerics import dense_rows, dot

TILES = 4


@triton.jit(do_not_specialize=["rows", "part_sum"])
def part_kernel(
    hidden, weight, targets, rows, vocab, width, hidden_stride, weight_stride, inverse_temperature, part_max, part_sum,
    logits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """(max, sum) [parts, N] of each row's logits over TILES x BLOCK_N tokens; the target's logit [N]."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1).to(tl.int64)
    there = n < rows
    target = tl.load(targets + n, mask=there, other=-1).to(tl.int64)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(TILES):
        token = (part * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, width, BLOCK_K):
            i = start + tl.arange(0, BLOCK_K)
            a = tl.load(
                hidden + n[:, None] * hidden_stride + i[None, :], mask=there[:, None] & (i < width)[None, :], other=0.0
            )
            b = tl.load(
                weight + token[None, :] * weight_stride + i[:, None],
                mask=(token < vocab)[None, :] & (i < width)[:, None],
                other=0.0,
            )
            x = dot(a, b, x)
        x = tl.where((token < vocab)[None, :], x * inverse_temperature, float("-inf"))
        hit = token[None, :] == target[:, None]
        found = tl.sum(tl.where(hit, x, 0.0), 1)
        tl.store(logits + n, found, mask=there & (tl.max(hit.to(tl.int32), 1) > 0))
        higher = tl.maximum(top, tl.max(x, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus itself would be NaN
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        top = higher
    tl.store(part_max + part * rows + n, top, mask=there)
    tl.store(part_sum + part * rows + n, total, mask=there)


@triton.jit(do_not_specialize=["rows", "part_sum"])
def merge_kernel(part_max, part_sum, logits, out, rows, parts, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = n < rows
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    at = n
    for _ in range(parts):
        x = tl.load(part_max + at, mask=there, other=0.0)
        s = tl.load(part_sum + at, mask=there, other=0.0)
        at += rows
        higher = tl.maximum(top, x)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + s * tl.exp(x - base)
        top = higher
    logprob = tl.load(logits + n, mask=there, other=0.0) - top - tl.log(total)  # no finite logit: -inf + inf is NaN
    tl.store(out + n, logprob, mask=there)


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """[N] float32."""
    hidden, weight = dense_rows(hidden), dense_rows(weight)
    (rows, width), vocab = hidden.shape, weight.shape[0]
    out = hidden.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return out
    narrow = hidden.dtype == weight.dtype != torch.float32
    options = config("linear_logprob" if narrow else "linear_logprob_float32", hidden.device)
    parts = triton.cdiv(vocab, options["BLOCK_N"] * TILES)
    part_max, part_sum = hidden.new_empty((2, parts, rows), dtype=torch.float32)
    logits = hidden.new_empty(rows, dtype=torch.float32)
    block_m = 16 if rows <= 16 or not narrow else 64
    part_kernel[(triton.cdiv(rows, block_m), parts)](
        hidden, weight, targets.contiguous(), rows, vocab, width, hidden.stride(0), weight.stride(0), 1.0 / temperature,
        part_max, part_sum, logits, BLOCK_M=block_m, TILES=TILES, **options,
    )  # fmt: skip
    merge_kernel[(triton.cdiv(rows, 32),)](part_max, part_sum, logits, out, rows, parts, BLOCK=32, num_warps=1)
    return out
