"""append_kv_: the keys and values of new tokens into their slots.

A program per token copies its row of k and of v, Hkv D elements each, as integers of their width: bit for bit. Bytes:
twice the new tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config

BITS = {4: torch.int32, 2: torch.int16, 1: torch.int8}


@triton.jit
def append_kernel(
    k_cache, v_cache, k, v, slots, page_size, heads, dim,
    k_page, k_slot, k_head, v_page, v_slot, v_head, k_token, k_from, k_element, v_token, v_from, v_element,
    BLOCK: tl.constexpr,
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
        tl.store(k_cache + page * k_page + offset * k_slot + head * k_head + d, x, mask=there)
        y = tl.load(v + t * v_token + head * v_from + d * v_element, mask=there)
        tl.store(v_cache + page * v_page + offset * v_slot + head * v_head + d, y, mask=there)


def refuse_quantized(*beside: Tensor | None) -> None:
    """NotImplementedError for the scales of a quantised cache."""
    if any(t is not None for t in beside):
        raise NotImplementedError(
            "quantised KV caches (int8, int4) have no Triton kernels: use a cache of float elements"
        )


def append_kv_(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, *beside: Tensor | None) -> None:
    """Writes every token to its slot."""
    refuse_quantized(*beside)
    tokens, heads, dim = k.shape
    if k.numel() == 0:
        return
    bits = BITS[k.element_size()]
    strides = (*k_cache.stride()[:3], *v_cache.stride()[:3], *k.stride(), *v.stride())
    append_kernel[(tokens,)](
        k_cache.view(bits), v_cache.view(bits), k.view(bits), v.view(bits), slots.contiguous(),
        k_cache.shape[1], heads, dim, *strides,
        BLOCK=min(1024, triton.next_power_of_2(heads * dim)), **config("rows", k.device),
    )  # fmt: skip
