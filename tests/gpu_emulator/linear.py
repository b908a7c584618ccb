"""`linear` as on a GPU: floats by our kernel (`deterministic`), whole numbers dequantised.

Run by test_operators.py and test_triton.py in the emulator.
"""

from __future__ import annotations

import pytest
import torch
from rules import DTYPES, assert_rule
from torch import Tensor

import tts_kernels as tk
from tts_kernels.ops.linear import linear_op

# rows, outputs, depth: single ones, odd ones, both heights of a tile, panels and a depth that end within a tile, rows
# at multiples of 16 bytes and not, one chunk of the depth and several
SIZES = [(1, 1, 1), (5, 40, 63), (3, 130, 64), (2, 20, 1096), (17, 33, 128), (33, 18, 520), (70, 16, 72)]
FORMATS = [("int8", None), ("int8", 32), ("int4", None), ("int4", 32), ("int4", 128)]


def tensors(rows: int, outputs: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(rows * 31 + outputs)
    x, weight = torch.randn(rows, depth), torch.randn(outputs, depth) / depth**0.5
    return tuple(t.to(dtype) for t in (x, weight, torch.randn(outputs), torch.randn(rows, outputs)))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Of a weight [N, K], as a GPU has it; past the checks of a CPU's layout."""
    with tk.debug_checks(False):
        return linear_op(x, weight, weight.shape[1], weight.shape[0], bias, residual)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    for added in (bias, residual):
        y = y if added is None else y + added.double()
    return y


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_floats(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias, residual = tensors(*size, dtype)
    for b, r in ((None, None), (bias, residual)):
        slack = 2e-7 if dtype == torch.float32 else 1e-6
        assert_rule(plain(x, weight, b, r), exact(x, weight, b, r), by_torch(x, weight, b, r), slack=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMATS)
def test_whole_numbers(form: tuple[str, int | None], size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias, residual = tensors(*size, dtype)
    packed = tk.pack_linear(weight, quantize=form[0], group_size=form[1])
    dense = packed.unpack().to(dtype)
    for b, r in ((None, None), (bias, residual)):
        slack = 2e-7 if dtype == torch.float32 else 1e-6
        assert_rule(tk.linear(x, packed, b, r), exact(x, dense, b, r), by_torch(x, dense, b, r), slack=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_zero_points(bits: int, dtype: torch.dtype) -> None:
    x, _, _, residual = tensors(9, 50, 192, dtype)
    if bits == 8:
        q = torch.randint(-128, 128, (50, 192), dtype=torch.int8)
    else:
        q = torch.randint(0, 256, (50, 96), dtype=torch.uint8)
    packed = tk.PackedLinear.from_quantized(q, torch.rand(50, 3) / 100, torch.rand(50, 3) * 9, 64)
    dense = packed.unpack().to(dtype)
    out = tk.linear(x, packed, None, residual)
    assert_rule(out, exact(x, dense, None, residual), by_torch(x, dense, None, residual), slack=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [None, *FORMATS[1::2]])
def test_a_row_does_not_depend_on_its_company(form: tuple[str, int | None] | None, dtype: torch.dtype) -> None:
    """To the bit: in blocks of 16 rows and of more, whose depth several blocks share or one has."""
    x, weight, bias, residual = tensors(70, 20, 1032, dtype)
    packed = None if form is None else tk.pack_linear(weight, quantize=form[0], group_size=form[1])

    def run(rows: Tensor) -> Tensor:
        if packed is None:
            return plain(x[rows], weight, bias, residual[rows])
        return tk.linear(x[rows], packed, bias, residual[rows])

    whole = run(torch.arange(70))
    for rows in (1, 16, 17, 64):
        picked = torch.randperm(70)[:rows]
        assert torch.equal(run(picked), whole[picked]), rows


def test_strided_rows() -> None:
    x, weight, bias, residual = tensors(40, 21, 48, torch.bfloat16)
    packed = tk.pack_linear(weight[:, :24], quantize="int8")
    for begin in (0, 8, 5):  # at multiples of 16 bytes, and not
        some, added = x[::2, begin : begin + 24], residual[20:, :21]
        assert torch.equal(plain(some, weight[:, :24].contiguous(), bias, added),
                           plain(some.contiguous(), weight[:, :24].contiguous(), bias, added))  # fmt: skip
        assert torch.equal(tk.linear(some, packed, bias), tk.linear(some.contiguous(), packed, bias))


def test_nothing_to_sum_and_nothing_to_do() -> None:
    x, weight, bias, residual = tensors(4, 6, 8, torch.bfloat16)
    expected = (bias.float() + residual.float()).bfloat16()
    assert torch.equal(plain(x[:, :0], weight[:, :0].contiguous(), bias, residual), expected)
    assert plain(x[:0], weight).shape == (0, 6)
    assert plain(x, weight[:0]).shape == (4, 0)


@pytest.mark.parametrize("form", FORMATS)
def test_a_weight_that_is_not_finite_spoils_its_output_alone(form: tuple[str, int | None]) -> None:
    x, weight, _, _ = tensors(9, 20, 130, torch.bfloat16)
    clean = tk.linear(x, tk.pack_linear(weight, quantize=form[0], group_size=form[1]))
    weight[7, 100] = torch.inf
    packed = tk.pack_linear(weight, quantize=form[0], group_size=form[1])
    out = tk.linear(x, packed)
    assert out[:, 7].isnan().all()
    others = torch.arange(20) != 7
    assert torch.equal(out[:, others], clean[:, others])
