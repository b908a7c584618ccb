"""prune: the k best candidates of each group, in the order of csrc/include/total_order.h.

One program for each group. Up to BLOCK candidates are placed by counting, for each of them, the candidates that beat
it. Their ranks (a key and an index in 64 bits) are all different, so no sort is needed. A larger group is first reduced
to its k best: the key of the last of them is found bit by bit (32 counts over the group), and ties stay from the lowest
index up. Then these k are placed by counting, too. O(n) bytes 33 times from the cache, k**2 comparisons.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .numerics import order_key, ranked


@triton.jit
def load_keys(scores, i, n):
    """Keys of candidates i. Missing candidates have the lowest key."""
    key = order_key(tl.load(scores + i, mask=i < n, other=0.0).to(tl.float32))
    return tl.where(i < n, key, -2147483648).to(tl.int64)  # equal to NaN's; ties go to the lower index


@triton.jit
def place_few(scores, n, k, first, out, KEEP_ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """A group of n <= BLOCK."""
    i = tl.arange(0, BLOCK)
    mine = ranked(load_keys(scores, i, n), i)
    others = ranked(load_keys(scores, i, n), i)
    better = tl.sum((others[None, :] > mine[:, None]).to(tl.int32), 1)
    stays = (i < n) & (better < k)
    place = better
    if KEEP_ORDER:
        place = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(out + place, first + i, mask=stays)


@triton.jit
def kth_key(scores, n, k, BLOCK: tl.constexpr):
    """The k-th largest of n keys, and how many are greater."""
    low = tl.full((), -2147483648, tl.int64)
    high = tl.full((), 2147483647, tl.int64)
    greater = tl.full((), 0, tl.int64)
    while low < high:  # at least k keys are >= low; `greater` of them are > high
        middle = (low + high + 1) >> 1
        above = tl.full((), 0, tl.int64)
        for start in range(0, n, BLOCK):
            key = load_keys(scores, start + tl.arange(0, BLOCK).to(tl.int64), n)
            above += tl.sum((key >= middle).to(tl.int64), 0)
        low = tl.where(above >= k, middle, low)
        greater = tl.where(above >= k, greater, above)
        high = tl.where(above >= k, high, middle - 1)
    return low, greater


@triton.jit
def place_many(scores, n, k, first, out, ranks, KEEP_ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """A group of any size. `ranks` [k] is scratch; KEEP_ORDER does not use it."""
    cut, greater = kth_key(scores, n, k, BLOCK)
    ties_left = k - greater
    kept = tl.full((), 0, tl.int64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        key = load_keys(scores, i, n)
        tie = ((key == cut) & (i < n)).to(tl.int64)
        stays = ((key > cut) | ((tie > 0) & (tl.cumsum(tie, 0) <= ties_left))) & (i < n)
        place = kept + tl.cumsum(stays.to(tl.int64), 0) - 1
        if KEEP_ORDER:
            tl.store(out + place, first + i, mask=stays)
        else:
            tl.store(ranks + place, ranked(key, i), mask=stays)
        ties_left -= tl.sum(tie, 0)
        kept += tl.sum(stays.to(tl.int64), 0)
    if not KEEP_ORDER:
        tl.debug_barrier()  # all threads have written their ranks
        for start in range(0, k, BLOCK):
            i = start + tl.arange(0, BLOCK).to(tl.int64)
            mine = tl.load(ranks + i, mask=i < k, other=0)
            better = tl.zeros([BLOCK], tl.int32)
            for other in range(0, k, BLOCK):
                j = other + tl.arange(0, BLOCK).to(tl.int64)
                theirs = tl.load(ranks + j[None, :], mask=(j < k)[None, :], other=-9223372036854775808)
                better += tl.sum((theirs > mine[:, None]).to(tl.int32), 1)
            tl.store(out + better, first + (4294967295 - (mine & 4294967295)), mask=i < k)


@triton.jit
def prune_group(
    g, scores, indptr, wanted, width, indices, counts, ranks, KEEP_ORDER: tl.constexpr, BLOCK: tl.constexpr
):
    """Prunes group g. `wanted` is [G], or None: keep `width` of each."""
    first = tl.load(indptr + g).to(tl.int64)
    n = tl.load(indptr + g + 1).to(tl.int64) - first
    k = tl.minimum(n, width)
    if wanted is not None:
        k = tl.minimum(k, tl.maximum(tl.load(wanted + g).to(tl.int64), 0))
    out = indices + g * width
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        tl.store(out + j, tl.full([BLOCK], -1, tl.int64), mask=(j >= k) & (j < width))
    tl.store(counts + g, k.to(tl.int32))
    if k > 0:
        if n <= BLOCK:
            place_few(scores + first, n, k, first, out, KEEP_ORDER, BLOCK)
        else:
            place_many(scores + first, n, k, first, out, ranks + g * width, KEEP_ORDER, BLOCK)


@triton.jit(do_not_specialize=["width"])
def prune_kernel(scores, indptr, wanted, width, indices, counts, ranks, KEEP_ORDER: tl.constexpr, BLOCK: tl.constexpr):
    g = tl.program_id(0).to(tl.int64)
    prune_group(g, scores, indptr, wanted, width, indices, counts, ranks, KEEP_ORDER, BLOCK)


def outputs(like: Tensor, groups: int, width: int, keep_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """indices [G, K], counts [G], and the scratch for ranks."""
    indices = like.new_empty((groups, width), dtype=torch.int64)
    ranks = indices if keep_order else torch.empty_like(indices)
    return indices, like.new_empty(groups, dtype=torch.int32), ranks


def options(like: Tensor) -> dict[str, Any]:
    """The configuration for `prune_group`."""
    return config("prune", like.device)


def prune(scores: Tensor, indptr: Tensor, width: int, k: Tensor | None, keep_order: bool) -> tuple[Tensor, Tensor]:
    """[G, K] int64 and [G] int32."""
    scores, indptr, groups = scores.contiguous(), indptr.contiguous(), indptr.shape[0] - 1
    indices, counts, ranks = outputs(scores, groups, width, keep_order)
    if groups:
        wanted = None if k is None else k.contiguous()
        prune_kernel[(groups,)](
            scores, indptr, wanted, width, indices, counts, ranks, KEEP_ORDER=keep_order, **options(scores)
        )
    return indices, counts
