"""sample: one token from each row of logits [V], after temperature, top-k, top-p and min-p.

Weights are the integers of csrc/include/fixed_exp.h, so every sum is exact and the draw is the CPU's to the bit.
csrc/cpu/sample.cpp explains the options. There is one program for each row. Its passes over the row are:

  1  the maximum, NaN, infinities;  2  all weights, with and without temperature;
  3  for top-k and for top-p, the cut: each pass halves the range of keys in which it lies, until the range is one key;
  4  the weights that are kept;  5  the token at which their running sum exceeds the draw.

Bytes: V logits from memory in the first pass. Later passes read L2: four of them, and up to 32 for each cut. One
launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .numerics import dense_rows, fused, key_score, order_key

ONE = tl.constexpr(549755813888.0)  # 2**39, the weight of the largest logit


# ---- weights: csrc/include/fixed_exp.h ---------------------------------------------------------------------------


@triton.jit
def weight_scale(temperature):
    """log2(e) / T, rounded once from float64."""
    scale = tl.full((), 1.4426950408889634, tl.float64) / temperature.to(tl.float64)
    low = tl.full((), 7.888609052210118e-31, tl.float64)  # 2**-100
    high = tl.full((), 1.2676506002282294e30, tl.float64)  # 2**100
    return tl.minimum(tl.maximum(scale, low), high).to(tl.float32)


@triton.jit
def float_weights(d, scale):
    """2**39 exp(d / T) of d = logit - max, not yet rounded to whole numbers."""
    lowest = (tl.full((), -42.0, tl.float64) / scale.to(tl.float64)).to(tl.float32)
    d = tl.maximum(d, lowest)
    s = tl.zeros_like(d) + scale
    one = tl.zeros_like(d) + 1.0
    shifted = fused(d, s, one * 12582912.0)
    f = fused(d, s, 12582912.0 - shifted)
    p = one * 729236096.0  # 0x1.5bba14p+29
    p = fused(p, f, one * 5316970496.0)  # 0x1.3cea88p+32
    p = fused(p, f, one * 30515480576.0)  # 0x1.c6b752p+34
    p = fused(p, f, one * 132063674368.0)  # 0x1.ebf9bcp+36
    p = fused(p, f, one * 381061595136.0)  # 0x1.62e42ap+38
    p = fused(p, f, one * 549755813888.0)  # 0x1p+39
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def whole(w):
    """Rounded to nearest even, as uint64."""
    magic = 8388608.0  # 2**23: adding it leaves no fraction
    return tl.where(w < magic, (w + magic) - magic, w).to(tl.int64).to(tl.uint64)


# ---- Philox4x32-10: csrc/include/philox.h ------------------------------------------------------------------------


@triton.jit
def philox_draw(seed, offset):
    """64 bits of draw number `offset` of stream `seed`."""
    a = (offset & 0xFFFFFFFF).to(tl.uint32)
    b = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c = tl.zeros_like(a)
    d = tl.zeros_like(a)
    key_low = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        x = a.to(tl.uint64) * tl.full((), 0xD2511F53, tl.uint64)
        y = c.to(tl.uint64) * tl.full((), 0xCD9E8D57, tl.uint64)
        a = (y >> 32).to(tl.uint32) ^ b ^ key_low
        c = (x >> 32).to(tl.uint32) ^ d ^ key_high
        b = y.to(tl.uint32)
        d = x.to(tl.uint32)
        key_low = key_low + tl.full((), 0x9E3779B9, tl.uint32)
        key_high = key_high + tl.full((), 0xBB67AE85, tl.uint32)
    return (b.to(tl.uint64) << 32) | a.to(tl.uint64)


@triton.jit
def high_product(a, b):
    """The upper 64 bits of the product of two uint64."""
    mask = tl.full((), 0xFFFFFFFF, tl.uint64)
    a_low, a_high = a & mask, a >> 32
    b_low, b_high = b & mask, b >> 32
    middle = a_high * b_low + ((a_low * b_low) >> 32)
    other = a_low * b_high + (middle & mask)
    return a_high * b_high + (middle >> 32) + (other >> 32)


@triton.jit
def part_of(p, total):
    """ceil(ceil(p * 2**32) * total / 2**32), at least 1."""
    fraction = tl.ceil(p.to(tl.float64) * 4294967296.0).to(tl.int64).to(tl.uint64)
    high = high_product(fraction, total)
    low = fraction * total
    rest = (low & tl.full((), 0xFFFFFFFF, tl.uint64)) != 0
    part = (high << 32) + (low >> 32) + rest.to(tl.uint64)
    return tl.where(part == 0, tl.full((), 1, tl.uint64), part)


# ---- passes over a row -------------------------------------------------------------------------------------------


@triton.jit
def load_logits(row, start, vocab, infinite, BLOCK: tl.constexpr):
    """Logits and their ids; -inf after the end. In a row with +inf, these become 0 and all others -inf."""
    i = start + tl.arange(0, BLOCK)
    x = tl.load(row + i, mask=i < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(infinite, tl.where(x == float("inf"), 0.0, float("-inf")), x), i


@triton.jit
def measure(row, vocab, infinite, top, scale, least_key, key, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """How many logits have at least `key` (COUNT); else the weight of those with at least `key` and `least_key`."""
    total = tl.full((), 0, tl.uint64)
    for start in range(0, vocab, BLOCK):
        x, i = load_logits(row, start, vocab, infinite, BLOCK)
        keys = order_key(x)
        if COUNT:
            there = (keys >= key) & (i < vocab)
            total += tl.sum(there.to(tl.int32), 0).to(tl.uint64)
        else:
            there = (keys >= key) & (keys >= least_key)
            total += tl.sum(tl.where(there, whole(float_weights(x - top, scale)), 0).to(tl.uint64), 0)
    return total


@triton.jit
def find_cut(row, vocab, infinite, top, scale, least_key, wanted, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest key for which the measure of all keys from it upwards reaches `wanted`."""
    low = tl.full((), -2147483648, tl.int64)
    high = order_key(top).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        reached = measure(
            row, vocab, infinite, top, scale, least_key, middle.to(tl.int32), COUNT, BLOCK
        ) >= wanted  # fmt: skip
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def kept_weights(x, top, scale, cut, ties, seen, least):
    """Weights of the tokens that may be drawn, 0 for others, and the number so far that equal the cut."""
    keys = order_key(x)
    tie = keys == cut
    count = seen + tl.cumsum(tie.to(tl.int32), 0)
    w = float_weights(x - top, scale)
    keep = ((keys > cut) | (tie & (count <= ties))) & (w >= least)
    return tl.where(keep, whole(w), 0).to(tl.uint64), seen + tl.sum(tie.to(tl.int32), 0)


@triton.jit(do_not_specialize=["top_k"])
def sample_kernel(
    logits, row_stride, vocab, seeds, offsets, temperature, top_k, top_p, min_p,
    temperatures, top_ks, top_ps, min_ps, tokens, logprobs, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * row_stride
    t = tl.full((), 0.0, tl.float32) + temperature if temperatures is None else tl.load(temperatures + r)
    k = tl.full((), 0, tl.int64) + top_k if top_ks is None else tl.load(top_ks + r).to(tl.int64)
    p = tl.full((), 0.0, tl.float32) + top_p if top_ps is None else tl.load(top_ps + r)
    least = (tl.full((), 0.0, tl.float32) + min_p if min_ps is None else tl.load(min_ps + r)) * ONE

    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)  # 1: NaN, 2: finite
    for start in range(0, vocab, BLOCK):
        x, i = load_logits(row, start, vocab, False, BLOCK)
        broken |= tl.where(x != x, 1, 0) | tl.where((x - x) == 0.0, 2, 0)
        tops = tl.where(x > tops, x, tops)
    flags = tl.max(broken & 1, 0) | tl.max(broken & 2, 0)
    top = tl.max(tops, 0)
    if flags != 2:
        tl.store(tokens + r, tl.full((), -1, tl.int64))
        tl.store(logprobs + r, float("nan"))
    else:
        infinite = top == float("inf")
        top = tl.where(infinite, 0.0, top)
        greedy = t == 0.0
        scale = weight_scale(tl.where(greedy, 1.0, t))
        plain_scale = weight_scale(tl.full((), 1.0, tl.float32))

        total = tl.full((), 0, tl.uint64)
        untempered = tl.full((), 0, tl.uint64)
        token = tl.full((), 0, tl.int32) + vocab
        for start in range(0, vocab, BLOCK):
            x, i = load_logits(row, start, vocab, infinite, BLOCK)
            untempered += tl.sum(whole(float_weights(x - top, plain_scale)), 0)
            total += tl.sum(whole(float_weights(x - top, scale)), 0)
            token = tl.minimum(token, tl.min(tl.where(x == top, i, vocab), 0))  # the lowest id with the maximum

        if not greedy:
            cut = tl.full((), -2147483647, tl.int32)
            ties = tl.full((), 0, tl.int32) + vocab
            if (k > 0) & (k < vocab):
                cut = find_cut(row, vocab, infinite, top, scale, cut, k.to(tl.uint64), True, BLOCK)
            if p < 1.0:
                total = measure(row, vocab, infinite, top, scale, cut, cut, False, BLOCK)
                target = part_of(p, total)
                cut = find_cut(row, vocab, infinite, top, scale, cut, target, False, BLOCK)
                above = measure(row, vocab, infinite, top, scale, cut + 1, cut + 1, False, BLOCK)
                each = whole(float_weights(key_score(cut) - top, scale))
                ties = ((target - above + each - 1) // each).to(tl.int32)
            if (cut > -2147483647) | (least > 0.0):
                total = tl.full((), 0, tl.uint64)
                seen = tl.full((), 0, tl.int32)
                for start in range(0, vocab, BLOCK):
                    x, i = load_logits(row, start, vocab, infinite, BLOCK)
                    w, seen = kept_weights(x, top, scale, cut, ties, seen, least)
                    total += tl.sum(w, 0)
            target = high_product(philox_draw(tl.load(seeds + r), tl.load(offsets + r)), total)
            before = tl.full((), 0, tl.uint64)
            seen = tl.full((), 0, tl.int32)
            for start in range(0, vocab, BLOCK):
                x, i = load_logits(row, start, vocab, infinite, BLOCK)
                w, seen = kept_weights(x, top, scale, cut, ties, seen, least)
                here = tl.sum(w, 0)
                if (before <= target) & (target < before + here):
                    token = tl.min(tl.where(before + tl.cumsum(w, 0) > target, i, vocab), 0)
                before += here

        tl.store(tokens + r, token.to(tl.int64))
        drawn = tl.load(row + token).to(tl.float32)
        drawn = tl.where(infinite, 0.0, drawn)
        log_sum = tl.log(untempered.to(tl.float64) / ONE)
        tl.store(logprobs + r, (drawn.to(tl.float64) - top.to(tl.float64) - log_sum).to(tl.float32))


@triton.jit
def likeliest_kernel(
    logits, row_stride, vocab, tokens, logprobs, top_ids, top_logprobs, TOP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """csrc/cuda/likeliest.cuh: in each round the best logit below the last, a logit and its id being one number."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * row_stride
    token = tl.load(tokens + r)
    own = tl.load(logprobs + r).to(tl.float64)
    drawn = tl.load(row + tl.maximum(token, 0)).to(tl.float32)
    low = tl.full((), 4294967295, tl.int64)
    last = tl.full((), 9223372036854775807, tl.int64)
    for j in range(TOP):
        best = tl.full([BLOCK], -9223372036854775808, tl.int64)
        for start in range(0, vocab, BLOCK):
            x, i = load_logits(row, start, vocab, False, BLOCK)
            rank = (order_key(x).to(tl.int64) << 32) | (low - i.to(tl.int64))
            best = tl.where((i < vocab) & (rank < last) & (rank > best), rank, best)
        last = tl.max(best, 0)
        value = key_score((last >> 32).to(tl.int32))
        if j == 0:
            drawn = tl.where(value == float("inf"), value, drawn)
        logprob = (value.to(tl.float64) - drawn.to(tl.float64) + own).to(tl.float32)
        logprob = tl.where(value == drawn, own.to(tl.float32), logprob)  # +inf minus itself is NaN
        at = r * TOP + j
        tl.store(top_ids + at, tl.where(token < 0, -1, low - (last & low)))
        tl.store(top_logprobs + at, tl.where(token < 0, float("nan"), logprob))


def sample(
    logits: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    min_ps: Tensor | None,
    top_logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B] int64 and float32; [B, top_logprobs] int64 and float32."""
    rows, vocab = logits.shape
    logits = dense_rows(logits)
    tokens, logprobs = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)
    shape = (rows, top_logprobs)
    ids, likeliest = logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)
    if rows:
        options = dict(config("sample", logits.device))
        block = min(options["BLOCK"], max(triton.next_power_of_2(vocab), 32))
        options |= {"BLOCK": block, "num_warps": max(1, min(options["num_warps"], block // 256))}
        by_row = (None if o is None else o.contiguous() for o in (temperatures, top_ks, top_ps, min_ps))
        sample_kernel[(rows,)](
            logits, logits.stride(0), vocab, seeds.contiguous(), offsets.contiguous(), temperature, top_k, top_p, min_p,
            *by_row, tokens, logprobs, **options,
        )  # fmt: skip
        if top_logprobs:
            likeliest_kernel[(rows,)](
                logits, logits.stride(0), vocab, tokens, logprobs, ids, likeliest, TOP=top_logprobs, **options
            )
    return tokens, logprobs, ids, likeliest
