"""rope_append_: from the projection of queries, keys and values to the KV cache.

One program for each token; its Hq + 2 Hkv heads are a tile. Heads of q and k are normed (if there are weights) and
rotated in float32, and rounded once; the pairs that are rotated are the halves of a head. q goes to the output, k and v
go to the token's slot, and v is copied bit for bit. Sums of two products say which of them is rounded: left to the
compiler, that could differ from cache to cache. A cache of fp8 or codes gets the same bytes as from append_kv_.
Bytes: each element once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .append_kv import BITS, FP8, as_bits, put_codes, quantized
from .configs import config
from .numerics import dense_rows, narrow, to_e4m3


@triton.jit
def rope_kernel(
    qkv, row_stride, out, k_cache, v_cache, positions, cos_sin, slots, page_size, num_q_heads, num_kv_heads,
    q_norm, k_norm, eps, k_page, k_slot, k_head, v_page, v_slot, v_head, k_scale, v_scale, k_zero, v_zero,
    FP8: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    heads = tl.arange(0, HEADS)
    head = heads[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    column = d < HALF
    is_q = head < num_q_heads
    is_k = (head >= num_q_heads) & (head < num_q_heads + num_kv_heads)
    is_v = (head >= num_q_heads + num_kv_heads) & (head < num_q_heads + 2 * num_kv_heads)
    source = qkv + t * row_stride + head * (2 * HALF) + d
    there = column & (is_q | is_k | is_v)
    raw_low = tl.load(source, mask=there, other=0.0)
    raw_high = tl.load(source + HALF, mask=there, other=0.0)
    low = raw_low.to(tl.float32)
    high = raw_high.to(tl.float32)

    if q_norm is not None or k_norm is not None:
        scale = 1.0 / tl.sqrt_rn(tl.sum(tl.fma(low, low, high * high), 1)[:, None] / (2 * HALF) + eps)
        if q_norm is not None:
            weight_low = tl.load(q_norm + d, mask=column, other=0.0).to(tl.float32)
            weight_high = tl.load(q_norm + HALF + d, mask=column, other=0.0).to(tl.float32)
            low = tl.where(is_q, low * scale * weight_low, low)
            high = tl.where(is_q, high * scale * weight_high, high)
        if k_norm is not None:
            weight_low = tl.load(k_norm + d, mask=column, other=0.0).to(tl.float32)
            weight_high = tl.load(k_norm + HALF + d, mask=column, other=0.0).to(tl.float32)
            low = tl.where(is_k, low * scale * weight_low, low)
            high = tl.where(is_k, high * scale * weight_high, high)

    angle = cos_sin + tl.load(positions + t).to(tl.int64) * (2 * HALF) + d
    cos = tl.load(angle, mask=column, other=0.0)
    sin = tl.load(angle + HALF, mask=column, other=0.0)
    rotated_low = narrow(tl.fma(low, cos, -(high * sin)), dtype)
    rotated_high = narrow(tl.fma(low, sin, high * cos), dtype)

    query = out + (t * num_q_heads + head) * (2 * HALF) + d
    tl.store(query, rotated_low, mask=column & is_q)
    tl.store(query + HALF, rotated_high, mask=column & is_q)
    slot = tl.load(slots + t).to(tl.int64)
    page = slot // page_size
    offset = slot % page_size
    of_k = (heads - num_q_heads).to(tl.int64)  # index of the KV head
    of_v = of_k - num_kv_heads
    k_at = page * k_page + offset * k_slot + of_k * k_head
    v_at = page * v_page + offset * v_slot + of_v * v_head
    if k_scale is None:
        if FP8:
            rotated_low = to_e4m3(rotated_low.to(tl.float32))
            rotated_high = to_e4m3(rotated_high.to(tl.float32))
            raw_low = to_e4m3(raw_low.to(tl.float32))
            raw_high = to_e4m3(raw_high.to(tl.float32))
        key = k_cache + k_at[:, None] + d
        tl.store(key, rotated_low, mask=column & is_k)
        tl.store(key + HALF, rotated_high, mask=column & is_k)
        value = v_cache + v_at[:, None] + d
        tl.store(value, raw_low, mask=column & is_v)
        tl.store(value + HALF, raw_high, mask=column & is_v)
    else:
        own = column & (is_k | is_v)
        low = tl.where(is_k, rotated_low, raw_low).to(tl.float32)
        high = tl.where(is_k, rotated_high, raw_high).to(tl.float32)
        four: tl.constexpr = k_zero is not None
        low_codes, high_codes, scale_bits, zero_bits = quantized(low, high, own, own, four)
        put_codes(low_codes, high_codes, own, own, d, k_cache, k_at, k_scale, k_zero, slot * num_kv_heads + of_k,
                  scale_bits, zero_bits, (of_k >= 0) & (of_v < 0), HALF, four)  # fmt: skip
        put_codes(low_codes, high_codes, own, own, d, v_cache, v_at, v_scale, v_zero, slot * num_kv_heads + of_v,
                  scale_bits, zero_bits, (of_v >= 0) & (of_v < num_kv_heads), HALF, four)  # fmt: skip


def rope_append_(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> Tensor:
    """Queries [T, Hq, D]."""
    qkv, tokens, head_dim = dense_rows(qkv), qkv.shape[0], cos_sin.shape[1]
    out = qkv.new_empty(tokens, num_q_heads, head_dim)
    if qkv.numel():
        fp8 = k_cache.dtype == FP8
        caches = (cache.view(BITS[1]) if fp8 else cache for cache in (k_cache, v_cache))
        norms = (None if norm is None else norm.contiguous() for norm in (q_norm, k_norm))
        rope_kernel[(tokens,)](
            qkv, qkv.stride(0), out, *caches, positions.contiguous(), cos_sin.contiguous(),
            slots.contiguous(), k_cache.shape[1], num_q_heads, num_kv_heads, *norms, eps,
            *k_cache.stride()[:3], *v_cache.stride()[:3], *as_bits(k_scale, v_scale, k_zero, v_zero),
            FP8=fp8, HALF=head_dim // 2,
            HEADS=triton.next_power_of_2(num_q_heads + 2 * num_kv_heads), BLOCK=triton.next_power_of_2(head_dim // 2),
            **config("rows", qkv.device),
        )  # fmt: skip
    return out
