"""Quantises rows of numbers to few bits, and turns them back into numbers."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op

BITS: Final = (2, 3, 4, 8)
MOST_IN_GROUP: Final = 128


def quantize_rows(x: Tensor, bits: int, group_size: int) -> Tensor:
    """Rows as whole numbers of few bits: each group of columns is mapped from its smallest to its largest element.

    ``zero = min x``, ``scale = (max x - min x) / (2**bits - 1)``, both rounded to float16 before they are used, and
    ``code = (x - zero) / scale`` rounded to the nearest even whole number. If an element, scale or zero of a group is
    not finite, the group is NaN.

    Parameters
    ----------
    x
        [N, W] float; rows may be strided.
    bits
        2, 3, 4 or 8.
    group_size
        Columns that share a scale: at most 128, a divisor of W. W is a multiple of 16.

    Returns
    -------
    Tensor
        [N, bytes] uint8, with ``bytes = row_bytes(W, bits, group_size)``: the codes, the scales of the groups, their
        zeros. Codes are stored in planes: 2, 4 and 8 bits in one plane each, 3 bits in a plane of 2 bits for their low
        bits and a plane of 1 bit. In a plane of b bits, byte i has columns i, i + w, i + 2 w, ... for w = W b / 8, from
        its low end on.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape, number of bits or group size.

    Notes
    -----
    Reads x once. A row's bytes do not depend on the other rows. The quantiser of KIVI (arXiv 2402.02750) and XQuant
    (arXiv 2508.10395). On a GPU it runs in Triton, or else in plain torch.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> rows = tk.quantize_rows(torch.arange(16.0)[None], 4, 16)
    >>> rows.shape
    torch.Size([1, 12])
    >>> tk.dequantize_rows(rows, 16, 4, 16, torch.float32)[0, :4]
    tensor([0., 1., 2., 3.])
    """
    rows: Tensor = _quantize(x, bits, group_size)
    return rows


def dequantize_rows(rows: Tensor, width: int, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Decode rows of `quantize_rows`: ``code * scale + zero``.

    Parameters
    ----------
    rows
        [N, bytes] uint8.
    width
        W, the columns that the rows had.
    bits, group_size
        As given to `quantize_rows`.
    dtype
        The dtype of the result: float32, bfloat16 or float16; rounded once.

    Returns
    -------
    Tensor
        [N, W].

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape, number of bits or group size.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> x = torch.tensor([[0.0, 3.0] * 8])
    >>> tk.dequantize_rows(tk.quantize_rows(x, 2, 8), 16, 2, 8, torch.float32).equal(x)
    True
    """
    x: Tensor = dequantize_op(rows, width, bits, group_size, dtype)
    return x


def row_bytes(width: int, bits: int, group_size: int) -> int:
    """Bytes of a row of `quantize_rows`: bits / 8 for each column and 4 for each group.

    Examples
    --------
    >>> import tts_kernels as tk
    >>> tk.row_bytes(128, 4, 64)
    72
    """
    return width * bits // 8 + 4 * (width // group_size)


def check_bits(bits: int) -> None:
    """Raise ValueError if codes cannot have so many bits."""
    if bits not in BITS or type(bits) is not int:
        raise ValueError(f"bits: expected one of {', '.join(map(str, BITS))}, got {bits!r}")


def _check_format(what: str, width: int, bits: int, group_size: int) -> None:
    check_bits(bits)
    if width < 0 or width % 16:
        raise ValueError(f"{what}: expected a multiple of 16 columns, got {width}")
    checks.integer("group_size", group_size, 1, MOST_IN_GROUP + 1)
    if width % group_size:
        raise ValueError(f"group_size: expected a divisor of {width} columns, got {group_size}")


def _check_quantize(x: Tensor, bits: int, group_size: int) -> None:
    checks.tensor("x", x, shape=["N", "W"])
    _check_format("x", x.shape[1], bits, group_size)


def _check_dequantize(rows: Tensor, width: int, bits: int, group_size: int, dtype: torch.dtype) -> None:
    checks.integer("width", width, 0, 2**31)
    _check_format("width", width, bits, group_size)
    checks.tensor("rows", rows, (torch.uint8,), ["N", row_bytes(width, bits, group_size)])
    if dtype not in checks.FLOAT:
        raise TypeError(f"dtype: expected {' or '.join(map(str, checks.FLOAT))}, got {dtype!r}")


def _fake_quantize(x: Tensor, bits: int, group_size: int) -> Tensor:
    return x.new_empty(x.shape[0], row_bytes(x.shape[1], bits, group_size), dtype=torch.uint8)


def _fake_dequantize(rows: Tensor, width: int, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return rows.new_empty(rows.shape[0], width, dtype=dtype)


_quantize = Op("quantize_rows", reference=reference.quantize_rows, check=_check_quantize, fake=_fake_quantize)
dequantize_op = Op(
    "dequantize_rows", reference=reference.dequantize_rows, check=_check_dequantize, fake=_fake_dequantize
)
