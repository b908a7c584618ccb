"""append_kv_: the keys and values of new tokens into their slots.

One program for each token copies the token's row of k and of v, Hkv D elements each. It copies them as integers of
their width, bit for bit. Bytes: twice the new tokens. In an fp8 cache it writes the nearest bytes. In a quantised cache
it writes the bytes that csrc/include/quantized_kv.h defines: a token's heads are a tile in two halves, since a byte of
4-bit codes holds one code of each half.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .numerics import codes, is_finite, of_half, scale_and_zero, to_e4m3

BITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
FP8 = torch.float8_e4m3fn


@triton.jit
def append_kernel(
    k_cache, v_cache, k, v, slots, page_size, heads, dim,
    k_page, k_slot, k_head, v_page, v_slot, v_head, k_token, k_from, k_element, v_token, v_from, v_element,
    FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t).to(tl.int64)
    page = slot // page_size
    offset = slot % page_size
    for start in range(0, heads * dim, BLOCK):
        i = start + tl.arange(0, BLOCK)
        head = (i // dim).to(tl.int64)
        d = (i % dim).to(tl.int64)
        there = i < heads * dim
        x = tl.load(k + t * k_token + head * k_from + d * k_element, mask=there)
        y = tl.load(v + t * v_token + head * v_from + d * v_element, mask=there)
        if FP8:
            x = to_e4m3(x.to(tl.float32))
            y = to_e4m3(y.to(tl.float32))
        tl.store(k_cache + page * k_page + offset * k_slot + head * k_head + d, x, mask=there)
        tl.store(v_cache + page * v_page + offset * v_slot + head * v_head + d, y, mask=there)


@triton.jit
def quantized(low, high, in_low, in_high, FOUR: tl.constexpr):
    """Codes of the two halves [R, BLOCK] float32 of heads; bits of the scales and zeros [R] in float16."""
    infinity = float("inf")
    least = tl.minimum(tl.min(tl.where(in_low, low, infinity), 1), tl.min(tl.where(in_high, high, infinity), 1))
    most = tl.maximum(tl.max(tl.where(in_low, low, -infinity), 1), tl.max(tl.where(in_high, high, -infinity), 1))
    odd_low = tl.max((in_low & (is_finite(low) == 0)).to(tl.int32), 1)
    odd_high = tl.max((in_high & (is_finite(high) == 0)).to(tl.int32), 1)
    finite = (odd_low + odd_high) == 0
    top: tl.constexpr = 15.0 if FOUR else 127.0
    bottom: tl.constexpr = 0.0 if FOUR else -127.0
    span = most - least if FOUR else tl.abs(tl.maximum(most, -least))  # the maximum can be -0.0
    scale_bits, zero_bits = scale_and_zero(span, least if FOUR else tl.zeros_like(least), finite, top)
    scale = of_half(scale_bits)[:, None]
    zero = of_half(zero_bits)[:, None]
    return codes(low, scale, zero, bottom, top), codes(high, scale, zero, bottom, top), scale_bits, zero_bits


@triton.jit
def put_codes(low, high, in_low, in_high, d, cache, at, scale, zero, number, scale_bits, zero_bits, there,
              LOW: tl.constexpr, FOUR: tl.constexpr):  # fmt: skip
    """Stores codes of heads [R, BLOCK] from ``cache + at`` [R] on, and their scales and zeros at ``number`` [R]."""
    to = cache + at[:, None] + d
    if FOUR:
        tl.store(to, (low | high << 4).to(tl.uint8), mask=in_low & there[:, None])
        tl.store(zero + number, zero_bits, mask=there)
    else:
        tl.store(to, low.to(tl.int8), mask=in_low & there[:, None])
        tl.store(to + LOW, high.to(tl.int8), mask=in_high & there[:, None])
    tl.store(scale + number, scale_bits, mask=there)


@triton.jit
def append_quantized_kernel(
    k_cache, v_cache, k, v, slots, k_scale, v_scale, k_zero, v_zero, page_size, heads, dim,
    k_page, k_slot, k_head, v_page, v_slot, v_head, k_token, k_from, k_element, v_token, v_from, v_element,
    LOW: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, FOUR: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t).to(tl.int64)
    page = slot // page_size
    offset = slot % page_size
    head = tl.arange(0, HEADS).to(tl.int64)
    there = head < heads
    d = tl.arange(0, BLOCK)[None, :]
    in_low = (d < LOW) & there[:, None]
    in_high = (d + LOW < dim) & (d < LOW) & there[:, None]
    number = slot * heads + head
    source = k + t * k_token + (head * k_from)[:, None] + d * k_element
    low = tl.load(source, mask=in_low, other=0.0).to(tl.float32)
    high = tl.load(source + LOW * k_element, mask=in_high, other=0.0).to(tl.float32)
    low_codes, high_codes, scale_bits, zero_bits = quantized(low, high, in_low, in_high, FOUR)
    put_codes(low_codes, high_codes, in_low, in_high, d, k_cache, page * k_page + offset * k_slot + head * k_head,
              k_scale, k_zero, number, scale_bits, zero_bits, there, LOW, FOUR)  # fmt: skip
    source = v + t * v_token + (head * v_from)[:, None] + d * v_element
    low = tl.load(source, mask=in_low, other=0.0).to(tl.float32)
    high = tl.load(source + LOW * v_element, mask=in_high, other=0.0).to(tl.float32)
    low_codes, high_codes, scale_bits, zero_bits = quantized(low, high, in_low, in_high, FOUR)
    put_codes(low_codes, high_codes, in_low, in_high, d, v_cache, page * v_page + offset * v_slot + head * v_head,
              v_scale, v_zero, number, scale_bits, zero_bits, there, LOW, FOUR)  # fmt: skip


def as_bits(*beside: Tensor | None) -> list[Tensor | None]:
    """Scales and zeros as integers: with floats, a kernel might store a NaN with other bits."""
    return [None if t is None else t.view(torch.int16) for t in beside]


def append_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> None:
    """Writes every token to its slot."""
    tokens, heads, dim = k.shape
    if k.numel() == 0:
        return
    strides = (*k_cache.stride()[:3], *v_cache.stride()[:3], *k.stride(), *v.stride())
    if k_scale is not None:
        low = (dim + 1) // 2
        append_quantized_kernel[(tokens,)](
            k_cache, v_cache, k, v, slots.contiguous(), *as_bits(k_scale, v_scale, k_zero, v_zero),
            k_cache.shape[1], heads, dim, *strides,
            LOW=low, HEADS=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(low),
            FOUR=k_zero is not None, **config("rows", k.device),
        )  # fmt: skip
        return
    fp8, bits = k_cache.dtype == FP8, BITS[k_cache.element_size()]
    new = (k, v) if fp8 else (k.view(bits), v.view(bits))
    append_kernel[(tokens,)](
        k_cache.view(bits), v_cache.view(bits), *new, slots.contiguous(),
        k_cache.shape[1], heads, dim, *strides, FP8=fp8,
        BLOCK=min(1024, triton.next_power_of_2(heads * dim)), **config("rows", k.device),
    )  # fmt: skip
