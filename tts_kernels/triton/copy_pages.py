"""copy_pages_: whole pages within each cache, which the first write after a fork needs.

    cache[dst[i]] = cache[src[i]] for all caches

One launch for all caches of one layout. The addresses of the caches are in a table on the device. It is made when a set
of caches is first seen, and never freed (8 bytes for each cache). So later calls copy no addresses, and a captured
graph can read the table. A program copies one page of one cache, as integers of the elements' width, bit for bit. The
pages may be copied in any order, because no page is both read and written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .append_kv import BITS
from .configs import config


@triton.jit
def copy_kernel(
    like, table, num_caches, src, dst, page_size, heads, dim, page_stride, slot_stride, head_stride, BLOCK: tl.constexpr
):
    """``table`` [caches]: addresses of caches. ``like`` has their element type."""
    i = tl.program_id(0) // num_caches
    address = tl.load(table + tl.program_id(0) % num_caches)
    cache = address.to(like.dtype)
    source = cache + tl.load(src + i).to(tl.int64) * page_stride
    target = cache + tl.load(dst + i).to(tl.int64) * page_stride
    for start in range(0, page_size * heads * dim, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = (at // dim).to(tl.int64)
        there = at < page_size * heads * dim
        offset = row // heads * slot_stride + row % heads * head_stride + at % dim
        tl.store(target + offset, tl.load(source + offset, mask=there), mask=there)


@functools.cache
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64).to(device)


def copy_pages_(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copies ``src[i]`` to ``dst[i]`` in every cache."""
    layouts: dict[tuple[object, ...], list[Tensor]] = {}
    for cache in caches:
        if cache[:1].numel():
            layouts.setdefault((cache.element_size(), cache.shape[1:], cache.stride()), []).append(cache)
    if src.numel() == 0:
        return
    src, dst = src.contiguous(), dst.contiguous()
    for alike in layouts.values():
        first = alike[0]
        table = _table(tuple(c.data_ptr() for c in alike), first.device)
        elements = first[0].numel()
        copy_kernel[(len(alike) * src.shape[0],)](
            first.view(BITS[first.element_size()]), table, len(alike), src, dst, *first.shape[1:], *first.stride()[:3],
            BLOCK=min(4096, triton.next_power_of_2(elements)), **config("rows", first.device),
        )  # fmt: skip
