"""FlashInfer's and vLLM's paged KV caches for our attention: views of the same memory, and page tables in one form.

The results are arguments for :func:`tts_kernels.tree_attention` and :func:`~tts_kernels.plan_attention`.

Both frameworks keep the keys and values of a layer in one tensor. The kernels take strided caches [P, page_size, Hkv,
D], so nothing is copied. vLLM's ``block_table`` and ``seq_lens`` are the ``page_table`` and ``kv_lens`` of
`plan_attention`. The differences of its ``query_start_loc``, or of FlashInfer's ``qo_indptr``, are ``q_lens``. The
planner finds the blocks that requests share, through prefix caching or a fork, and they are read once.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["flashinfer_caches", "flashinfer_page_table", "vllm_caches"]


def flashinfer_caches(
    paged_kv_cache: Tensor | tuple[Tensor, Tensor], kv_layout: Literal["NHD", "HND"] = "NHD"
) -> tuple[Tensor, Tensor]:
    """Keys and values [P, page_size, Hkv, D] of one layer, as views.

    Parameters
    ----------
    paged_kv_cache
        [P, 2, page_size, Hkv, D] (NHD) or [P, 2, Hkv, page_size, D] (HND); or a pair of tensors without the 2.
    kv_layout
        FlashInfer's name of the layout.

    Raises
    ------
    ValueError
        For another layout or shape.

    Examples
    --------
    >>> import torch
    >>> cache = torch.empty(100, 2, 4, 16, 64)  # HND: 4 heads, pages of 16
    >>> k, v = flashinfer_caches(cache, "HND")
    >>> k.shape, k.data_ptr() == cache.data_ptr()
    (torch.Size([100, 16, 4, 64]), True)
    """
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f'kv_layout: expected "NHD" or "HND", got {kv_layout!r}')
    if isinstance(paged_kv_cache, Tensor):
        if paged_kv_cache.dim() != 5 or paged_kv_cache.shape[1] != 2:
            raise ValueError(f"paged_kv_cache: expected [P, 2, ., ., D], got {list(paged_kv_cache.shape)}")
        k, v = paged_kv_cache.unbind(1)
    else:
        k, v = paged_kv_cache
        if k.dim() != 4 or k.shape != v.shape:
            raise ValueError(f"paged_kv_cache: expected two tensors [P, ., ., D], got {list(k.shape)}, {list(v.shape)}")
    return (k, v) if kv_layout == "NHD" else (k.transpose(1, 2), v.transpose(1, 2))


def flashinfer_page_table(
    paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """``page_table`` [B, max] and ``kv_lens`` [B] from FlashInfer's compressed rows.

    Parameters
    ----------
    paged_kv_indptr
        [B + 1] int: request b has the pages ``paged_kv_indices[paged_kv_indptr[b]:paged_kv_indptr[b + 1]]``.
    paged_kv_indices
        [>= paged_kv_indptr[-1]] int.
    paged_kv_last_page_len
        [B] int: number of tokens in each request's last page; ignored for a request without pages.
    page_size
        Number of token slots in a page.

    Raises
    ------
    ValueError
        If the tensors do not fit together.

    Examples
    --------
    >>> import torch
    >>> table, kv_lens = flashinfer_page_table(
    ...     torch.tensor([0, 2, 5]), torch.tensor([7, 3, 7, 9, 1]), torch.tensor([4, 16]), page_size=16
    ... )
    >>> table.tolist(), kv_lens.tolist()
    ([[7, 3, 0], [7, 9, 1]], [20, 48])
    """
    indptr, indices, last = (t.cpu() for t in (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len))
    counts = indptr.diff()
    if indptr.numel() == 0 or indptr[0] != 0 or (counts < 0).any() or indptr[-1] > indices.numel():
        raise ValueError(
            f"paged_kv_indptr: expected numbers that rise from 0 to at most {indices.numel()}, the length of "
            f"paged_kv_indices, got {indptr.tolist()}"
        )
    if last.shape != counts.shape or ((counts > 0) & ((last < 1) | (last > page_size))).any():
        raise ValueError(
            f"paged_kv_last_page_len: expected {counts.numel()} numbers in [1, {page_size}], got {last.tolist()}"
        )
    table = indices.new_zeros(counts.numel(), max(counts.tolist(), default=0))
    table[torch.arange(table.shape[1]) < counts[:, None]] = indices[: int(indptr[-1])]
    return table, torch.where(counts > 0, (counts - 1) * page_size + last, 0)


def vllm_caches(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [num_blocks, block_size, Hkv, D] of one layer, as views.

    Parameters
    ----------
    kv_cache
        [2, num_blocks, block_size, Hkv, D], as vLLM's attention for GPUs had it, or [num_blocks, Hkv, block_size, 2 D]
        with arbitrary strides, as it has it now (0.32). vLLM's CPU kernels rearrange keys within a block, so their
        cache cannot be read.

    Raises
    ------
    ValueError
        For another shape.

    Examples
    --------
    >>> import torch
    >>> k, v = vllm_caches(torch.empty(100, 4, 16, 128))
    >>> v.shape, v.storage_offset()
    (torch.Size([100, 16, 4, 64]), 64)
    """
    if kv_cache.dim() == 5 and kv_cache.shape[0] == 2:
        k, v = kv_cache.unbind(0)
        return k, v
    if kv_cache.dim() == 4 and kv_cache.shape[-1] % 2 == 0:
        k, v = kv_cache.transpose(1, 2).chunk(2, dim=-1)
        return k, v
    raise ValueError(
        "kv_cache: expected [2, num_blocks, block_size, Hkv, D] or [num_blocks, Hkv, block_size, 2 D], got "
        f"{list(kv_cache.shape)}"
    )
