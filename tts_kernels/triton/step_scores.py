"""step_scores: the score of a process reward model at the last token of each step.

    out[s] = act(w . norm(hidden[positions[s]]) + b)

One program for each step. RMSNorm needs no pass of its own: w . (x g / rms) = (w g . x) / rms, and the squares are
summed in the same loop. Bytes: S rows of H elements; the head's row comes from the cache after the first step.

With a hidden layer, z = w . relu(W1 norm(x) + b1) + b, there are two launches. A program of the first launch multiplies
a tile of gathered rows with BLOCK_N rows of W1, and folds its hidden units into one number for each step, so [S, H1] is
never stored. The second launch adds these numbers up. Bytes: W1 once for each tile of rows; operations: 2 S H H1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .numerics import dense_rows, dot, sigmoid


@triton.jit
def activated(z, bias, SIGMOID: tl.constexpr):
    if bias is not None:
        z += tl.load(bias)
    return sigmoid(z) if SIGMOID else z


@triton.jit
def score_row(x, weight, norm_weight, eps, width, BLOCK: tl.constexpr):
    """w . norm(x) of one row, a scalar."""
    products = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        v = tl.load(x + i, mask=i < width, other=0.0).to(tl.float32)
        w = tl.load(weight + i, mask=i < width, other=0.0)
        if norm_weight is not None:
            squares += v * v
            v = v * tl.load(norm_weight + i, mask=i < width, other=0.0).to(tl.float32)
        products += v * w
    z = tl.sum(products, 0)
    if norm_weight is not None:
        z = z / tl.sqrt_rn(tl.sum(squares, 0) / width + eps)
    return z


@triton.jit
def score_partials(partials, step, steps, blocks, BLOCK: tl.constexpr):
    """The sum of a step's partials over the blocks of hidden units, a scalar."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, blocks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partials + i.to(tl.int64) * steps + step, mask=i < blocks, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def step_score(
    hidden, stride, positions, step, steps, weight, bias, norm_weight, eps, width, partials, blocks,
    SIGMOID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The score of one step, from its row or from the partials of a hidden layer."""
    if partials is not None:
        z = score_partials(partials, step, steps, blocks, BLOCK)
    else:
        row = tl.load(positions + step).to(tl.int64)
        z = score_row(hidden + row * stride, weight, norm_weight, eps, width, BLOCK)
    return activated(z, bias, SIGMOID)


@triton.jit(do_not_specialize=["steps"])
def step_kernel(
    hidden, stride, positions, steps, weight, bias, norm_weight, eps, width, partials, blocks, out,
    SIGMOID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    score = step_score(
        hidden, stride, positions, s, steps, weight, bias, norm_weight, eps, width, partials, blocks, SIGMOID, BLOCK
    )
    tl.store(out + s, score)


@triton.jit(do_not_specialize=["steps"])
def hidden_kernel(
    hidden, stride, positions, steps, weight, w1, b1, hidden_width, norm_weight, eps, width, partials,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partials[block][s] = sum over the block's units j of w[j] relu(z[s][j] + b1[j])."""
    s = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1).to(tl.int64)
    unit = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(positions + s, mask=s < steps, other=0).to(tl.int64)
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            hidden + row[:, None] * stride + i[None, :], mask=(s < steps)[:, None] & (i < width)[None, :], other=0.0
        )
        rows = tl.load(
            w1 + unit[None, :] * width + i[:, None],
            mask=(unit < hidden_width)[None, :] & (i < width)[:, None],
            other=0.0,
        )
        if norm_weight is not None:
            x = x.to(tl.float32)
            squares += tl.sum(x * x, 1)
            x = x * tl.load(norm_weight + i, mask=i < width, other=0.0).to(tl.float32)[None, :]
        z = dot(x, rows, z)
    if norm_weight is not None:
        z = z / tl.sqrt_rn(squares / width + eps)[:, None]
    if b1 is not None:
        z += tl.load(b1 + unit, mask=unit < hidden_width, other=0.0).to(tl.float32)[None, :]
    w = tl.load(weight + unit, mask=unit < hidden_width, other=0.0)
    active = tl.where(z < 0, 0.0, z) * w[None, :]  # keeps NaN
    active = tl.where((unit < hidden_width)[None, :], active, 0.0)
    tl.store(partials + block * steps + s, tl.sum(active, 1), mask=s < steps)


def hidden_layer(
    hidden: Tensor, positions: Tensor, weight: Tensor, w1: Tensor, b1: Tensor | None, norm: Tensor | None, eps: float
) -> Tensor:
    """The first launch of a head with a hidden layer; partials [blocks, S]."""
    narrow = hidden.dtype == w1.dtype != torch.float32 and norm is None
    options = config("hidden_layer" if narrow else "hidden_layer_float32", hidden.device)
    steps, (hidden_width, width) = positions.shape[0], w1.shape
    block_m = 16 if steps <= 16 else 64
    blocks = triton.cdiv(hidden_width, options["BLOCK_N"])
    partials = hidden.new_empty((blocks, steps), dtype=torch.float32)
    if steps and blocks:
        hidden_kernel[(triton.cdiv(steps, block_m), blocks)](
            hidden, hidden.stride(0), positions, steps, weight, w1, b1, hidden_width, norm, eps, width, partials,
            BLOCK_M=block_m, **options,
        )  # fmt: skip
    return partials


def head_arguments(
    hidden: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `step_score` from `hidden` to `blocks`, and its configuration. Launches a hidden layer."""
    hidden, positions, options = dense_rows(hidden), positions.contiguous(), dict(config("step_scores", hidden.device))
    partials, blocks, width = None, 0, hidden.shape[1]
    if w1 is not None:
        partials = hidden_layer(hidden, positions, weight, w1.contiguous(), b1, norm_weight, eps)
        blocks, norm_weight = partials.shape[0], None
    options["BLOCK"] = min(options["BLOCK"], max(triton.next_power_of_2(blocks or width), 32))
    head = (weight, bias, norm_weight, eps, width, partials, blocks)
    return (hidden, hidden.stride(0), positions, positions.shape[0], *head), options


def step_scores(
    hidden: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    sigmoid: bool,
) -> Tensor:
    """[S] float32."""
    steps = positions.shape[0]
    out = hidden.new_empty(steps, dtype=torch.float32)
    if steps:
        arguments, options = head_arguments(hidden, positions, weight, bias, w1, b1, norm_weight, eps)
        step_kernel[(steps,)](*arguments, out, SIGMOID=sigmoid, **options)
    return out
