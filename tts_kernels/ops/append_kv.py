"""New tokens into their slots of one layer's KV cache."""

from __future__ import annotations

from torch import Tensor

from .. import checks, reference
from ..op import Op


def append_kv_(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write the keys and values of new tokens into a layer's pages, in place.

    ``k_cache[slots[t] // page_size, slots[t] % page_size] = k[t]``, and v alike.

    Parameters
    ----------
    k_cache, v_cache
        [P, page_size, Hkv, D] float: may be strided views, last dimension contiguous, but not expanded ones.
    k, v
        [T, Hkv, D], of the caches' dtype. Rows and heads may be strided.
    slots
        [T] int: page * page_size + offset, as `KVForest.append` returns them. All different: which of two tokens
        a slot of both ends up with is undefined.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape or device, or an expanded cache; under `debug_checks` for a slot that is there twice.
    IndexError
        For a slot outside [0, P * page_size).

    Notes
    -----
    Reads and writes 2 T Hkv D elements; one launch. Copy the pages that `KVForest.append` names first (`copy_pages_`).

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> k_cache, v_cache = torch.zeros(2, 2, 1, 1), torch.zeros(2, 2, 1, 1)
    >>> tk.append_kv_(k_cache, v_cache, torch.tensor([[[7.0]]]), torch.tensor([[[8.0]]]), torch.tensor([3]))
    >>> k_cache.flatten(), v_cache.flatten()
    (tensor([0., 0., 0., 7.]), tensor([0., 0., 0., 8.]))
    """
    _op(k_cache, v_cache, k, v, slots)


def _check(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    checks.cache("k_cache", k_cache, written=True)
    checks.cache("v_cache", v_cache, (k_cache.dtype,), k_cache.shape, k_cache.device, written=True)
    checks.tensor("slots", slots, checks.INDEX, ["T"], k_cache.device)
    shape = [slots.shape[0], *k_cache.shape[2:]]
    checks.tensor("k", k, (k_cache.dtype,), shape, k_cache.device)
    checks.tensor("v", v, (k_cache.dtype,), shape, k_cache.device)
    checks.index_range("slots", slots, 0, k_cache.shape[0] * k_cache.shape[1])
    checks.distinct("slots", slots)


def _fake(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:  # noqa: ARG001
    return None


_op = Op("append_kv_", reference=reference.append_kv_, check=_check, fake=_fake)
