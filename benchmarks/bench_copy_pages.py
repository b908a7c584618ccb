"""`copy_pages_` over every layer's caches against torch's indexing layer by layer, and memcpy of the same bytes.

Bound: the rate of one large copy in memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import compare

import tts_kernels as tk


@pytest.mark.parametrize("pages", [4, 48])
@pytest.mark.parametrize("heads", [3, 8])
def test_copy_pages(benchmark: Any, pages: int, heads: int) -> None:
    """32 layers' keys and values, bfloat16, pages of 16 tokens in any order."""
    dim = 128 if heads == 8 else 64
    caches = [torch.randn(4 * pages, 16, heads, dim).to(torch.bfloat16) for _ in range(64)]
    order = torch.randperm(4 * pages)
    src, dst = order[:pages], order[pages : 2 * pages]
    source = torch.stack([cache[:pages] for cache in caches])
    target = torch.empty_like(source)

    def torchs() -> None:
        for cache in caches:
            cache[dst] = cache[src]

    baselines = {"torch": torchs, "memcpy": lambda: target.copy_(source)}
    benchmark.group = "copy_pages_, 32 layers, bfloat16"
    compare(benchmark, lambda: tk.copy_pages_(caches, src, dst), baselines, rounds=25)
