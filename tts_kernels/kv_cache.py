"""The KV cache of a model: pages for every layer."""

from __future__ import annotations

from typing import Final, TypedDict

import torch
from torch import Tensor

from . import checks
from .ops.append_kv import append_kv_
from .ops.copy_pages import copy_pages_

_CODES: Final = {"int8": torch.int8, "int4": torch.uint8}
_STORED: Final = {**_CODES, "fp8": checks.FP8}


class Beside(TypedDict, total=False):
    """What lies beside the caches of a layer, as operators take it."""

    k_scale: Tensor
    v_scale: Tensor
    k_zero: Tensor
    v_zero: Tensor


class KVCache:
    """Pages of keys and values for every layer; `KVForest` says which page is whose.

    Parameters
    ----------
    num_layers, num_pages, num_kv_heads, head_dim, page_size
        Sizes, at least 1 each.
    dtype
        float32, bfloat16 or float16; or "int8" or "int4", which store each head of a token as whole numbers with a
        scale of its own (`append_kv_`): D + 2 and D / 2 + 4 bytes; or "fp8", for GPUs: float8_e4m3fn, no scale.
    device
        Where; the default device if None.

    Attributes
    ----------
    k, v
        Tuples over layers of tensors [num_pages, page_size, num_kv_heads, head_dim], not initialised: memory that no
        token was written to is never touched. In int4 uint8 [..., head_dim / 2].
    k_scale, v_scale, k_zero, v_zero
        Tuples over layers of float16 [num_pages, page_size, num_kv_heads] beside int8 and int4 (zeros: int4 only); else
        empty.

    Raises
    ------
    TypeError
        For a size that is not an int, or another dtype.
    ValueError
        For a size below 1, or an odd head_dim in int4.

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
        dtype: torch.dtype | str = torch.float32,
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
        dtype = "fp8" if dtype == checks.FP8 else dtype
        if dtype not in (*checks.FLOAT, *_STORED):
            names = [*map(str, checks.FLOAT), *map(repr, _STORED)]
            raise TypeError(f"dtype: expected {' or '.join(names)}, got {dtype!r}")
        if dtype == "int4" and head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for int4, got {head_dim}")
        self.page_size = page_size
        self.dtype = dtype
        stored = dtype if isinstance(dtype, torch.dtype) else _STORED[dtype]
        heads = (num_pages, page_size, num_kv_heads)
        width = head_dim // 2 if dtype == "int4" else head_dim

        def of_layers(count: int, shape: tuple[int, ...], kind: torch.dtype) -> tuple[Tensor, ...]:
            return tuple(torch.empty(shape, dtype=kind, device=device) for _ in range(count))

        self.k, self.v = (of_layers(num_layers, (*heads, width), stored) for _ in range(2))
        scales, zeros = num_layers * (dtype in _CODES), num_layers * (dtype == "int4")
        self.k_scale, self.v_scale = (of_layers(scales, heads, torch.float16) for _ in range(2))
        self.k_zero, self.v_zero = (of_layers(zeros, heads, torch.float16) for _ in range(2))

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers, with what lies beside them."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All of its memory as caches [P, page_size, Hkv, n]: what `copy_pages_` copies of a page."""
        beside = (*self.k_scale, *self.v_scale, *self.k_zero, *self.v_zero)
        heads = (t.view(torch.uint8) if t.dtype == checks.FP8 else t for t in (*self.k, *self.v))
        return [*heads, *(t[..., None] for t in beside)]

    def beside(self, layer: int) -> Beside:
        """The scales and zeros of a layer, under the names that operators take them by; none of a plain cache."""
        beside = Beside()
        if self.k_scale:
            beside |= Beside(k_scale=self.k_scale[layer], v_scale=self.v_scale[layer])
        if self.k_zero:
            beside |= Beside(k_zero=self.k_zero[layer], v_zero=self.v_zero[layer])
        return beside

    def append(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Write new tokens k, v [T, Hkv, D] of a layer into their slots [T]: `append_kv_`."""
        append_kv_(self.k[layer], self.v[layer], k, v, slots, **self.beside(layer))

    def copy_pages(self, src: Tensor, dst: Tensor) -> None:
        """Copy pages in every layer: `copy_pages_`."""
        copy_pages_(self.tensors(), src, dst)
