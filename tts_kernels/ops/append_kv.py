"""Writes the keys and values of new tokens into their slots of one layer's KV cache."""

from __future__ import annotations

from torch import Tensor

from .. import checks, reference
from ..op import Op


def append_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> None:
    """Write the keys and values of new tokens into a layer's pages, in place.

    ``k_cache[slots[t] // page_size, slots[t] % page_size] = k[t]``, and the same for v. Quantised caches get whole
    numbers; each head of a token has its own scale. int8: ``x / scale`` with ``scale = max |x| / 127``. int4: ``(x -
    zero) / scale`` with ``zero = min x``, ``scale = (max x - min x) / 15``. Scale and zero are rounded to float16
    before they are used. If an element, scale or zero of a head is not finite, the head is NaN. fp8 caches get the
    nearest number of 8 bits; numbers beyond 448 become 448, and NaN stays NaN.

    Parameters
    ----------
    k_cache, v_cache
        [P, page_size, Hkv, D] float, fp8 (float8_e4m3fn) or int8, or uint8 [P, page_size, Hkv, D / 2] for 4 bits: byte
        j has element j and, in its high half, element j + D / 2. May be strided views, last dimension contiguous, but
        not expanded ones.
    k, v
        [T, Hkv, D], of the caches' dtype, or any float dtype where they are fp8 or quantised. Rows and heads may be
        strided.
    slots
        [T] int: page * page_size + offset, as `KVForest.append` returns them. All must be different: if two tokens have
        the same slot, the result is undefined.
    k_scale, v_scale, k_zero, v_zero
        The scales and zeros of quantised caches: [P, page_size, Hkv] float16, contiguous. int8 caches have scales, int4
        caches also zeros, plain caches neither.

    Raises
    ------
    TypeError
        For a wrong dtype, or if scales or zeros do not match the caches' format.
    ValueError
        For a wrong shape or device, or an expanded cache; under `debug_checks` for a slot that occurs twice.
    IndexError
        For a slot outside [0, P * page_size).

    Notes
    -----
    Reads and writes 2 T Hkv D elements; one launch. Copy the pages that `KVForest.append` names first (`copy_pages_`).
    fp8 is for GPUs.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> k_cache, v_cache = torch.zeros(2, 2, 1, 1), torch.zeros(2, 2, 1, 1)
    >>> tk.append_kv_(k_cache, v_cache, torch.tensor([[[7.0]]]), torch.tensor([[[8.0]]]), torch.tensor([3]))
    >>> k_cache.flatten(), v_cache.flatten()
    (tensor([0., 0., 0., 7.]), tensor([0., 0., 0., 8.]))
    """
    _op(k_cache, v_cache, k, v, slots, k_scale, v_scale, k_zero, v_zero)


def _check(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> None:
    beside = {"k_scale": k_scale, "v_scale": v_scale, "k_zero": k_zero, "v_zero": v_zero}
    heads = checks.caches("k_cache", k_cache, "v_cache", v_cache, beside=beside, written=True)
    checks.tensor("slots", slots, checks.INDEX, ["T"], k_cache.device)
    shape = [slots.shape[0], *heads]
    narrow = k_scale is not None or k_cache.dtype == checks.FP8
    checks.tensor("k", k, checks.FLOAT if narrow else (k_cache.dtype,), shape, k_cache.device)
    checks.tensor("v", v, (k.dtype,), shape, k_cache.device)
    checks.index_range("slots", slots, 0, k_cache.shape[0] * k_cache.shape[1])
    checks.distinct("slots", slots)


def _fake(*args: Tensor | None) -> None:  # noqa: ARG001
    return None


_op = Op(
    "append_kv_",
    reference=reference.append_kv_,
    check=_check,
    fake=_fake,
    no_cpp_for=lambda *args: checks.no_cpp_for(*args[:2]),
)
