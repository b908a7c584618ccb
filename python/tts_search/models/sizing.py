"""The size of a model's KV pool, and its kind."""

from __future__ import annotations

import math
import re
from typing import Final, get_args

import torch

import tts_kernels as tk
from tts_search.models.block_cache import BlockPool, block_token_bytes, window_token_bytes
from tts_search.models.block_layers import BLOCK, KINDS, kept_layers
from tts_search.models.decoder import PAGE_SIZE, Decoder, KvDtype, KVPool
from tts_search.models.llama import LlamaDecoder

__all__ = ["parse_bytes", "pool_for"]

_OWN: Final = 1024  # tokens of a branch of its own, for which a block cache has as much room in windows as in blocks
_UNITS: Final = {"K": 1, "M": 2, "G": 3, "T": 4}


def pool_for(
    decoder: Decoder, kv_memory: int | str | None, page_size: int = PAGE_SIZE, kv_dtype: KvDtype | None = None
) -> KVPool:
    """A pool for a decoder: of ``kv_memory`` bytes, or of a size that is derived from its configuration.

    By default it holds 64 sequences of full length, and takes at most a quarter of the free memory. Keys and values
    have the decoder's dtype, or ``kv_dtype``.

    Raises
    ------
    ValueError
        If ``kv_memory`` is no size, or too small for one page, or ``kv_dtype`` is not possible.
    """
    _check_kv_dtype(decoder, kv_dtype)
    if kv_dtype in KINDS:
        return _block_pool(decoder, kv_memory, kv_dtype)
    dtype = kv_dtype or decoder.dtype
    page_bytes = page_size * decoder.shape.kv_bytes(dtype)
    memory = _memory(decoder, kv_memory, decoder.shape.kv_bytes(dtype), page_size)
    if memory < page_bytes:
        raise ValueError(
            f"kv_memory: expected room for one page of {page_size} tokens ({page_bytes} bytes), got {kv_memory!r}"
        )
    return KVPool(decoder.shape, memory // page_bytes, page_size, dtype, decoder.device)


def _memory(decoder: Decoder, kv_memory: int | str | None, token_bytes: float, page_size: int) -> int:
    """The size of a pool in bytes. If it is not given, it is at least one page."""
    if kv_memory is not None:
        return parse_bytes(kv_memory)
    page_bytes = math.ceil(page_size * token_bytes)
    wanted = 64 * -(-decoder.shape.max_length // page_size)
    return page_bytes * max(1, min(wanted, _free_memory(decoder.device) // 4 // page_bytes))


def _block_pool(decoder: Decoder, kv_memory: int | str | None, kv_dtype: KvDtype) -> BlockPool:
    """The memory is divided between blocks and windows so that branches of `_OWN` tokens fill both."""
    if not isinstance(decoder, LlamaDecoder):
        raise ValueError(f"kv_dtype: expected a model of the lean decoder for {kv_dtype}, got {type(decoder).__name__}")
    shape, dtype = decoder.shape, decoder.dtype
    layers = kept_layers(kv_dtype, decoder.layers, shape.num_kv_heads, shape.head_dim)
    block, window = (
        math.ceil(size * of(kv_dtype, shape, decoder.hidden_size, dtype))
        for size, of in ((BLOCK, block_token_bytes), (PAGE_SIZE, window_token_bytes))
    )
    pages = BLOCK // PAGE_SIZE  # of a branch's window
    fewest = 2 * pages  # a child takes a page that its parent still has
    own = BLOCK * math.ceil(min(_OWN, shape.max_length) / BLOCK)
    least, of_branch = block + fewest * window, own // BLOCK * block + pages * window
    memory = max(_memory(decoder, kv_memory, of_branch / own, BLOCK), least if kv_memory is None else 0)
    if memory < least:
        raise ValueError(f"kv_memory: expected room for {BLOCK} tokens ({least} bytes), got {kv_memory!r}")
    num_windows = max(fewest, pages * memory // of_branch)
    num_blocks = (memory - num_windows * window) // block
    return BlockPool(layers, shape, num_blocks, num_windows, dtype, kv_dtype, decoder.device)


def _check_kv_dtype(decoder: Decoder, kv_dtype: KvDtype | None) -> None:
    if kv_dtype is None:
        return
    if kv_dtype not in get_args(KvDtype):
        names = ", ".join(map(repr, get_args(KvDtype)))
        raise ValueError(f"kv_dtype: expected None or one of {names}, got {kv_dtype!r}")
    if kv_dtype == "fp8" and decoder.device.type == "cpu" and tk.backend_info().in_use in ("auto", "cpp"):
        raise ValueError("kv_dtype: expected no fp8 on cpu, as its kernels do not read it; those of GPUs do")
    if kv_dtype == "int4" and decoder.shape.head_dim % 2:
        raise ValueError(f"kv_dtype: expected no int4 for heads of an odd size, {decoder.shape.head_dim}")


def parse_bytes(size: int | str) -> int:
    """A number of bytes, or text such as "512MiB", "2GB", "1.5 GiB".

    Raises
    ------
    ValueError
        If it is neither.

    Examples
    --------
    >>> parse_bytes("2GiB")
    2147483648
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?\s*", size.upper()) if isinstance(size, str) else None
    )
    if match is None or not float(match[1]):
        raise ValueError(f"kv_memory: expected a number of bytes or a size such as '2GiB', got {size!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS.get(match[2], 0))


def _free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30
