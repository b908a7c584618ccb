"""The definition of every op, in plain torch.

Slow and obvious on purpose. Each function takes the arguments of the operator of its name, works in any floating
dtype (tests call it in float64) and is what the kernels are held against.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32: the dtype to compute in."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


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
    """``act(w . mlp(norm(hidden[positions])) + b)``; [S] float32 (float64 for float64 inputs)."""
    wide = _wide(hidden, weight)
    x = hidden[positions.long()].to(wide)
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide)
    if w1 is not None:
        x = torch.relu(x @ w1.to(wide).T + (0 if b1 is None else b1.to(wide)))
    z = x @ weight.to(wide) + (0 if bias is None else bias.to(wide))
    return torch.sigmoid(z) if sigmoid else z


def aggregate_steps(scores: Tensor, indptr: Tensor, how: str) -> Tensor:
    """One reduction a segment, in float64 for products; [C]."""
    return _aggregate([scores[a:b] for a, b in _segments(indptr)], how, scores)


def _segments(indptr: Tensor) -> list[tuple[int, int]]:
    offsets = indptr.tolist()
    return list(zip(offsets, offsets[1:], strict=False))


def _aggregate(segments: list[Tensor], how: str, like: Tensor) -> Tensor:
    reduce = {
        "last": lambda s: s[-1],
        "min": torch.amin,
        "prod": torch.prod,
        "mean": torch.mean,
        "max": torch.amax,
        "sum": torch.sum,
    }[how]
    wide = _wide(like)
    out = like.new_full((len(segments),), -torch.inf, dtype=wide)
    for c, segment in enumerate(segments):
        if segment.numel():
            out[c] = reduce(segment.double()).to(wide)
    return out
