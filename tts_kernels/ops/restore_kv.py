"""Makes keys and values of blocks of tokens from few bits, with a scale for each channel of the keys."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op
from .quantize_rows import MOST_IN_GROUP, check_bits, dequantize_op, row_bytes
from .rope_append import rope_append_op


def restore_kv_(
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    *,
    bits: int,
    group_size: int,
) -> None:
    """Decode blocks of keys and values, rotate the keys, write both into cache slots.

    Keys are stored before their rotation, with a scale and a zero for each channel of a block; values with one for each
    group of a token's channels.

    Parameters
    ----------
    keys
        [B, Hkv D, bytes] uint8, contiguous: a block's keys by channels, rows of `quantize_rows` of one group. A block
        has ``block`` tokens: a multiple of 16, at most 128.
    values
        [B, block, bytes] uint8, contiguous: a block's values by tokens, rows of `quantize_rows`.
    blocks
        [n] int: the blocks to restore.
    k_cache, v_cache
        [P, page_size, Hkv, D] float; last dimension contiguous, not expanded. Written in place.
    positions
        [n block] int: the row of ``cos_sin`` for each token.
    cos_sin
        [max_position, D] float32, as for `rope_append_`. D is even.
    slots
        [n block] int: where a token's key and value go, ``page * page_size + offset``; no two the same.
    bits
        2, 3, 4 or 8, of keys and values.
    group_size
        Channels of a token's values that share a scale: at most 128, a divisor of D.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape, stride, device or number; under `debug_checks` for a slot that occurs twice.
    IndexError
        For a block outside [0, B), a position outside [0, max_position) or a slot outside [0, P * page_size).

    Notes
    -----
    The result is that of `dequantize_rows`, rounded to the caches' dtype, and `rope_append_`, to the bit. A head of a
    block goes from its bytes to its slots at a time, and stays in L1. On a GPU these two operators do it. Keys by
    channel and before their rotation: KVQuant (arXiv 2401.18079); by channel and values by token: KIVI (arXiv
    2402.02750).

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> k = torch.arange(32.0).view(16, 2)  # 16 tokens, a head of 2 channels
    >>> keys = tk.quantize_rows(k.T.contiguous(), 4, 16)[None]
    >>> values = tk.quantize_rows(torch.ones(16, 16), 4, 2)[None]
    >>> caches = [torch.zeros(1, 16, 8, 2) for _ in range(2)]
    >>> keys = keys.repeat(1, 8, 1)  # 8 heads
    >>> angles = torch.tensor([[1.0, 0.0]])  # no rotation
    >>> at = torch.arange(16)
    >>> tk.restore_kv_(keys, values, torch.tensor([0]), *caches, 0 * at, angles, at, bits=4, group_size=2)
    >>> caches[0][0, 3, 0]
    tensor([6., 7.])
    """
    _op(keys, values, blocks, k_cache, v_cache, positions, cos_sin, slots, bits, group_size)


def _check(
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    bits: int,
    group_size: int,
) -> None:
    checks.tensor("keys", keys, (torch.uint8,), ["B", "channels", "bytes"])
    device = keys.device
    check_bits(bits)
    checks.cache("k_cache", k_cache, device=device, written=True)
    checks.cache("v_cache", v_cache, (k_cache.dtype,), k_cache.shape, device, written=True)
    num_kv_heads, head_dim = k_cache.shape[2:]
    checks.integer("group_size", group_size, 1, MOST_IN_GROUP + 1)
    if head_dim % group_size:
        raise ValueError(f"group_size: expected a divisor of heads of {head_dim}, got {group_size}")
    if (num_kv_heads * head_dim) % 16:
        raise ValueError(f"k_cache: expected a multiple of 16 channels, got {checks.describe(k_cache)}")
    checks.tensor("cos_sin", cos_sin, (torch.float32,), ["max_position", head_dim], device)
    if head_dim % 2:
        raise ValueError(f"cos_sin: expected an even number of columns, got {checks.describe(cos_sin)}")
    row = row_bytes(num_kv_heads * head_dim, bits, group_size)
    checks.tensor("values", values, (torch.uint8,), ["B", "block", row], device)
    tokens = values.shape[1]
    if not 0 < tokens <= MOST_IN_GROUP or tokens % 16:
        raise ValueError(f"values: expected blocks of a multiple of 16 tokens, at most 128, got {tokens}")
    channels = [values.shape[0], num_kv_heads * head_dim, row_bytes(tokens, bits, tokens)]
    checks.tensor("keys", keys, (torch.uint8,), channels, device)
    for name, stored in (("keys", keys), ("values", values)):
        if not stored.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tuple(stored.stride())}")
    checks.tensor("blocks", blocks, checks.INDEX, ["n"], device)
    for name, index in (("positions", positions), ("slots", slots)):
        checks.tensor(name, index, checks.INDEX, [blocks.shape[0] * tokens], device)
    checks.index_range("blocks", blocks, 0, keys.shape[0])
    checks.index_range("positions", positions, 0, cos_sin.shape[0])
    checks.index_range("slots", slots, 0, k_cache.shape[0] * k_cache.shape[1])
    checks.distinct("slots", slots)


def _fake(*args: Tensor | int) -> None:  # noqa: ARG001
    return None


_op = Op(
    "restore_kv_",
    reference=reference.restore_kv_,
    check=_check,
    fake=_fake,
    composed=partial(
        reference.restore_kv_, ops=SimpleNamespace(dequantize_rows=dequantize_op, rope_append_=rope_append_op)
    ),
)
