"""Copies whole KV pages, in the caches of every layer at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import checks, reference
from ..op import Op


def copy_pages_(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copy pages within each cache, in place: ``cache[dst] = cache[src]`` for all caches in one launch.

    Parameters
    ----------
    caches
        Tensors [P, page_size, Hkv, D] float, int8 or uint8, such as every layer's keys and values; each may have its
        own shape, dtype and strides (last dimension contiguous). Scales [P, page_size, Hkv] go as ``scale[..., None]``.
    src, dst
        [n] int: pages read and written, in [0, P). No page is written twice, or both read and written.

    Raises
    ------
    TypeError
        For a wrong dtype, or caches that are not tensors.
    ValueError
        For a wrong shape or device, or a page in `dst` that occurs twice or also in `src`.
    IndexError
        For a page outside [0, P).

    Notes
    -----
    Reads and writes n pages of each cache. `KVForest.append` returns `src` and `dst`: the shared tail pages that a
    branch is about to write.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> cache = torch.arange(3.0).view(3, 1, 1, 1)
    >>> tk.copy_pages_([cache], torch.tensor([0]), torch.tensor([2]))
    >>> cache.flatten()
    tensor([0., 1., 0.])
    """
    _op(list(caches), src, dst)


def _check(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    device = caches[0].device if caches and isinstance(caches[0], Tensor) else None
    for i, cache in enumerate(caches):
        checks.cache(f"caches[{i}]", cache, checks.CACHE, device=device, written=True)
    checks.tensor("src", src, checks.INDEX, ["n"], device)
    checks.tensor("dst", dst, checks.INDEX, [src.shape[0]], device)
    for cache in caches:
        checks.index_range("src", src, 0, cache.shape[0])
        checks.index_range("dst", dst, 0, cache.shape[0])
    if checks.readable(src, dst):
        _check_independent(src.tolist(), dst.tolist())


def _check_independent(src: list[int], dst: list[int]) -> None:
    read, written = set(src), set[int]()
    for i, page in enumerate(dst):
        if page in written or page in read:
            why = "twice" if page in written else "in src too"
            raise ValueError(
                f"dst: expected pages that are all different and not in src, got {page} {why} at index {i}"
            )
        written.add(page)


def _fake(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:  # noqa: ARG001
    return None


_op = Op("copy_pages_", reference=reference.copy_pages_, check=_check, fake=_fake)
