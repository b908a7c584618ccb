"""Norm and rotary embedding of queries and keys, and the append to the KV cache, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op


def rope_append_(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys, write keys and values into their cache slots, return the queries.

    Parameters
    ----------
    qkv
        [T, (Hq + 2 Hkv) D] float: the query heads of a token, its key heads, its value heads; rows may be strided.
    k_cache, v_cache
        [P, page_size, Hkv, D] of qkv's dtype, or quantised as in `append_kv_`; last dimension contiguous, not expanded.
        Written in place, as by `append_kv_`.
    positions
        [T] int: the row of ``cos_sin`` for each token.
    cos_sin
        [max_position, D] float32: the cosines of the D / 2 angles of a position, then their sines, including the factor
        of a scaled rope. D is even.
    slots
        [T] int: where a token's key and value go, ``page * page_size + offset``; no two the same.
    num_q_heads, num_kv_heads
        Hq and Hkv.
    q_norm, k_norm
        [D] of qkv's dtype, or None: RMSNorm weights of each head before the rotation (Qwen3).
    eps
        The epsilon of these norms.
    k_scale, v_scale, k_zero, v_zero
        The scales and zeros of quantised caches: [P, page_size, Hkv] float16, contiguous. int8 caches have scales, int4
        caches also zeros, plain caches neither.

    Returns
    -------
    Tensor
        Queries [T, Hq, D] of qkv's dtype.

    Raises
    ------
    TypeError
        For a wrong dtype, or if scales or zeros do not match the caches' format.
    ValueError
        For a wrong shape, stride, device or number; under `debug_checks` for a slot that occurs twice.
    IndexError
        For a position outside [0, max_position) or a slot outside [0, P * page_size).

    Notes
    -----
    Reads and writes each element once; one launch; computed in float32, rounded once. "RoFormer" (arXiv 2104.09864);
    the halves of a head are the pairs, as in transformers' Llama: ``y = x * cos + (-x[D/2:], x[:D/2]) * sin``.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> k, v = torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2)
    >>> quarter = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # cos and sin of 0 and of 90 degrees
    >>> qkv = torch.tensor([[1.0, 0.0, 0.0, 1.0, 5.0, 6.0]])
    >>> at, slot = torch.tensor([1]), torch.tensor([2])
    >>> tk.rope_append_(qkv, k, v, at, quarter, slot, num_q_heads=1, num_kv_heads=1)
    tensor([[[0., 1.]]])
    >>> k[0, 2, 0], v[0, 2, 0]
    (tensor([-1.,  0.]), tensor([5., 6.]))
    """
    q: Tensor = rope_append_op(
        qkv, k_cache, v_cache, positions, cos_sin, slots, num_q_heads, num_kv_heads, q_norm, k_norm, eps,
        k_scale, v_scale, k_zero, v_zero,
    )  # fmt: skip
    return q


def _check(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> None:
    checks.tensor("qkv", qkv, shape=["T", "(Hq + 2 Hkv) D"])
    checks.integer("num_q_heads", num_q_heads, 1, 2**31)
    checks.integer("num_kv_heads", num_kv_heads, 1, 2**31)
    tokens, device = qkv.shape[0], qkv.device  # an int(...) here would be compiled again for every number of tokens
    checks.tensor("cos_sin", cos_sin, (torch.float32,), ["max_position", "D"], device)
    head_dim = cos_sin.shape[1]
    if head_dim % 2:
        raise ValueError(f"cos_sin: expected an even number of columns, got {checks.describe(cos_sin)}")
    checks.tensor("qkv", qkv, shape=["T", (num_q_heads + 2 * num_kv_heads) * head_dim])
    beside = {"k_scale": k_scale, "v_scale": v_scale, "k_zero": k_zero, "v_zero": v_zero}
    shape: list[int | str] = ["P", "page_size", num_kv_heads, head_dim]
    checks.caches("k_cache", k_cache, "v_cache", v_cache, qkv.dtype, shape, device, beside, written=True)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            checks.tensor(name, norm, (qkv.dtype,), [head_dim], device)
    checks.number("eps", eps, low=0.0)
    checks.tensor("positions", positions, checks.INDEX, [tokens], device)
    checks.tensor("slots", slots, checks.INDEX, [tokens], device)
    checks.index_range("positions", positions, 0, cos_sin.shape[0])
    checks.index_range("slots", slots, 0, k_cache.shape[0] * k_cache.shape[1])
    checks.distinct("slots", slots)


def _fake(qkv: Tensor, *rest: Any) -> Tensor:
    cos_sin, num_q_heads = rest[3], rest[5]
    return qkv.new_empty((qkv.shape[0], num_q_heads, cos_sin.shape[1]))


rope_append_op = Op(
    "rope_append_",
    reference=reference.rope_append_,
    check=_check,
    fake=_fake,
    no_cpp_for=lambda *args: checks.no_cpp_for(*args[1:3]),
)
