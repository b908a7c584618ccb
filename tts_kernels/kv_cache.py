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
    """Scales and zeros of a layer's caches, as arguments of operators."""

    k_scale: Tensor
    v_scale: Tensor
    k_zero: Tensor
    v_zero: Tensor


class KVCache:
    """Pages of keys and values for every layer. `KVForest` knows which branches use a page.

    Parameters
    ----------
    num_layers, num_pages, num_kv_heads, head_dim, page_size
        Sizes, at least 1 each.
    dtype
        float32, bfloat16 or float16. Or "int8" or "int4": each head of a token is stored as whole numbers with its own
        scale (`append_kv_`), in D + 2 and D / 2 + 4 bytes. Or "fp8", for GPUs: float8_e4m3fn, without a scale.
    device
        The device; None: the default device.

    Attributes
    ----------
    k, v
        Tuples over layers of tensors [num_pages, page_size, num_kv_heads, head_dim], not initialised: memory is only
        touched when a token is written to it. In int4 uint8 [..., head_dim / 2].
    k_scale, v_scale, k_zero, v_zero
        Tuples over layers of float16 [num_pages, page_size, num_kv_heads] for int8 and int4 (zeros: int4 only); else
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
        """Number of bytes of all pages of all layers, with scales and zeros."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All of its memory as caches [P, page_size, Hkv, n], for `copy_pages_`."""
        beside = (*self.k_scale, *self.v_scale, *self.k_zero, *self.v_zero)
        heads = (t.view(torch.uint8) if t.dtype == checks.FP8 else t for t in (*self.k, *self.v))
        return [*heads, *(t[..., None] for t in beside)]

    def beside(self, layer: int) -> Beside:
        """The scales and zeros of a layer, by the names of operators' arguments; empty for a plain cache."""
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
