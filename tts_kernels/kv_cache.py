"""The KV cache of a model: pages for every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .ops.append_kv import append_kv_
from .ops.copy_pages import copy_pages_


class KVCache:
    """Pages of keys and values for every layer; `KVForest` says which page is whose.

    Parameters
    ----------
    num_layers, num_pages, num_kv_heads, head_dim, page_size
        Sizes, at least 1 each.
    dtype
        float32, bfloat16 or float16.
    device
        Where; the default device if None.

    Attributes
    ----------
    k, v
        Tuples over layers of tensors [num_pages, page_size, num_kv_heads, head_dim], not initialised: memory that no
        token was written to is never touched.

    Raises
    ------
    TypeError
        For a size that is not an int, or another dtype.
    ValueError
        For a size below 1.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> cache = tk.KVCache(2, 8, num_kv_heads=1, head_dim=4, page_size=16, dtype=torch.bfloat16)
    >>> cache.k[1].shape
    torch.Size([8, 16, 1, 4])
    >>> cache.nbytes
    4096
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {
            "num_layers": num_layers,
            "num_pages": num_pages,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "page_size": page_size,
        }
        for name, size in sizes.items():
            checks.integer(name, size, 1)
        if dtype not in checks.FLOAT:
            raise TypeError(f"dtype: expected {' or '.join(str(d) for d in checks.FLOAT)}, got {dtype}")
        self.page_size = page_size
        self.dtype = dtype
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        self.k = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers))
        self.v = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers))

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers."""
        return sum(t.nbytes for t in (*self.k, *self.v))

    def append(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Write new tokens k, v [T, Hkv, D] of a layer into their slots [T]: `append_kv_`."""
        append_kv_(self.k[layer], self.v[layer], k, v, slots)

    def copy_pages(self, src: Tensor, dst: Tensor) -> None:
        """Copy pages in every layer: `copy_pages_`."""
        copy_pages_((*self.k, *self.v), src, dst)
