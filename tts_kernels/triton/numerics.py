"""Code that kernels share: the layout of inputs, conversions, products, and the order of scores.

Triton's interpreter (3.7) rounds to bfloat16 wrongly, multiplies bfloat16 matrices wrongly and does not fuse `tl.fma`.
Where `INTERPRETED` is set, the code avoids these operations.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)

LOG2E = tl.constexpr(1.44269504088896341)
LN2 = tl.constexpr(0.693147180559945309)


def dense_rows(x: Tensor) -> Tensor:
    """[T, H] with contiguous elements in a row. There may be gaps between rows."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, total):
    """``total + a @ b``: on tensor cores if both have the same 16-bit dtype, else in float32."""
    if INTERPRETED or (a.dtype != b.dtype or a.dtype == tl.float32):
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:  # after a return, this branch would be compiled too, for types that it does not support
        total = tl.dot(a, b, total)
    return total


@triton.jit
def fused(a, b, c):
    """``a * b + c`` of float32, rounded once."""
    if INTERPRETED:  # exact product and sum rounded to odd in float64, so that the second rounding is harmless
        product = a.to(tl.float64) * b.to(tl.float64)
        wide = c.to(tl.float64)
        total = product + wide
        part = total - product
        error = (product - (total - part)) + (wide - part)
        bits = total.to(tl.int64, bitcast=True)
        odd = bits + tl.where((error > 0) == (total > 0), 1, -1)
        inexact = (error < 0) | (error > 0)  # not if it is NaN: infinities stay as they are
        bits = tl.where(inexact & ((bits & 1) == 0), odd, bits)
        return bits.to(tl.float64, bitcast=True).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Within a few units in the last place. Near 0 it is a polynomial, because the quotient would cancel."""
    y = x * x
    near = x + x * y * (-0.333333333 + y * (0.133333333 + y * (-0.0539682540 + y * 0.0218694885)))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


# ---- numbers of few bits: csrc/include/quantized_kv.h, to the bit ---------------------------------------------------


@triton.jit
def is_finite(x):
    return (x - x) == 0.0


@triton.jit
def scale_and_zero(span, least, finite, STEPS: tl.constexpr):
    """Bits in float16 of ``span / STEPS`` and of ``least``. ``finite`` says whether a group's elements are finite.

    As integers, because a kernel of floats might store another NaN than 0x7E00.
    """
    scale = tl.div_rn(span, tl.full(span.shape, STEPS, tl.float32)).to(tl.float16)
    zero = least.to(tl.float16)
    good = finite & is_finite(scale.to(tl.float32)) & is_finite(zero.to(tl.float32))
    zero_bits = tl.where(zero == 0.0, 0, zero.to(tl.int16, bitcast=True))  # never -0.0
    scale_bits = tl.where(good, scale.to(tl.int16, bitcast=True), 0x7E00)
    return scale_bits.to(tl.int16), tl.where(finite, zero_bits, 0x7E00).to(tl.int16)


@triton.jit
def of_half(bits):
    """float32 of the bits of a float16."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def codes(x, scale, zero, bottom, top):
    """``(x - zero) / scale`` as whole numbers from ``bottom`` to ``top``, int32; 0 for a scale of 0 or NaN."""
    some = scale > 0.0
    code = tl.div_rn(x - tl.where(some, zero, 0.0), tl.where(some, scale, tl.full(x.shape, 1.0, tl.float32)))
    code = tl.minimum(tl.maximum(code, bottom), top)
    code = (code + 12582912.0) - 12582912.0  # to the nearest even: above 2**23 the step of a float is 1
    return tl.where(some, code, 0.0).to(tl.int32)


# ---- float8_e4m3fn, in whole numbers: not every GPU has it, nor does the interpreter ---------------------------------


@triton.jit
def to_e4m3(x):
    """The byte nearest to a float32; ties go to the even one. Above 448 it is that of 448."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    whole = size.to(tl.int32, bitcast=True)
    normal = ((whole + 0x7FFFF + ((whole >> 20) & 1)) >> 20) - (120 << 3)  # 3 bits of 23, a bias of 7 for 127
    small = ((size * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)  # steps of 2**-9
    code = tl.where(x != x, 0x7F, tl.where(size < 0.015625, small, normal))
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)


@triton.jit
def of_e4m3(byte):
    """float32 of a byte, through float16: 4 more bits of mantissa, and a bias of 15 instead of 7."""
    code = byte.to(tl.int32)
    x = of_half(((code & 0x80) << 8) | ((code & 0x7F) << 7)) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), x)


# ---- order: csrc/include/total_order.h ---------------------------------------------------------------------------


@triton.jit
def order_key(x):
    """A signed integer, greater for a better score: NaN below -inf, -0.0 equal to 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, -2147483648, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def key_score(key):
    """The float of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ranked(key, index):
    """A key and an index below 2**32 as one number. A better pair is greater, and no two are equal."""
    return key.to(tl.int64) * 4294967296 + (4294967295 - index.to(tl.int64))
