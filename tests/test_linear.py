from __future__ import annotations

import pytest
import torch
from rules import DTYPES, assert_names, assert_rule, assert_same_by_threads, compilations
from torch.library import opcheck
from torch.utils import _pytree as pytree

import tts_kernels as tk
from tts_kernels import reference

# rows, outputs, depth: single ones, odd ones, each height of a tile's edge, several blocks of rows, tall depth
SIZES = [(1, 1, 1), (1, 16, 2), (2, 17, 3), (5, 40, 63), (7, 576, 576), (13, 33, 130), (24, 31, 65), (25, 64, 48),
         (64, 100, 1537), (3, 20, 4099), (300, 33, 64), (530, 50, 19)]  # fmt: skip


def layer(rows: int, outputs: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows * 31 + outputs)
    x, weight = torch.randn(rows, depth), torch.randn(outputs, depth) / depth**0.5
    return tuple(t.to(dtype) for t in (x, weight, torch.randn(outputs), torch.randn(rows, outputs)))


def plain(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "depth"), SIZES)
def test_equals_the_definition(rows: int, outputs: int, depth: int, dtype: torch.dtype) -> None:
    x, weight, bias, residual = layer(rows, outputs, depth, dtype)
    packed = tk.pack_linear(weight)
    for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
        out = tk.linear(x, packed, b, r)
        doubles = [None if t is None else t.double() for t in (b, r)]
        exact = reference.linear(x.double(), reference.pack_linear(weight.double()), depth, outputs, *doubles)
        assert out.dtype == dtype
        assert_rule(out, exact, plain(x, weight, b, r), slack=2e-7 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_torch_linear(dtype: torch.dtype) -> None:
    x, weight, bias, residual = layer(6, 19, 21, dtype)
    out = reference.linear(x.double(), reference.pack_linear(weight).double(), 21, 19, bias.double(), residual.double())
    torch.testing.assert_close(out, plain(x.double(), weight.double(), bias.double(), residual.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (0, 5), (5, 0), (100, 7)])
def test_packing_is_the_documented_layout(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = tk.pack_linear(weight)
    assert torch.equal(packed.weight, reference.pack_linear(weight))
    assert torch.equal(packed.unpack(), weight)
    assert (packed.out_features, packed.in_features, packed.dtype) == (*shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    """To the bit, in any number of rows, at any place among them, bias and residual included."""
    x, weight, bias, residual = layer(300, 69, 2100, dtype)
    packed = tk.pack_linear(weight)
    whole = tk.linear(x, packed, bias, residual)
    for rows in (*range(1, 31), 64, 129):
        picked = torch.randperm(300)[:rows]
        assert torch.equal(tk.linear(x[picked], packed, bias, residual[picked]), whole[picked]), rows


def test_threads_do_not_change_the_result() -> None:
    for dtype in DTYPES:
        x, weight, bias, residual = layer(70, 1111, 640, dtype)
        assert_same_by_threads(tk.linear, x, tk.pack_linear(weight), bias, residual)


def test_strided_inputs() -> None:
    x, weight, bias, residual = layer(40, 21, 30, torch.bfloat16)
    packed = tk.pack_linear(weight.T.contiguous().T)
    torch.testing.assert_close(packed.unpack(), weight)
    expected = tk.linear(x[::2, 5:20].contiguous(), tk.pack_linear(weight[:, :15]), bias, residual[20:].contiguous())
    out = tk.linear(x[::2, 5:20], tk.pack_linear(weight[:, :15]), bias, residual[20:])
    assert torch.equal(out, expected)
    assert torch.equal(
        tk.linear(x.T.contiguous().T, packed, torch.stack([bias, bias], 1)[:, 0]), tk.linear(x, packed, bias)
    )


def test_one_row_for_all() -> None:
    x, weight, _, residual = layer(5, 21, 30, torch.float32)
    packed = tk.pack_linear(weight)
    out = tk.linear(x[:1].expand(5, -1), packed, None, residual[:1].expand(5, -1))
    assert torch.equal(out, tk.linear(x[:1], packed, None, residual[:1]).expand(5, -1))


def test_empty() -> None:
    x, weight, bias, residual = layer(4, 6, 8, torch.bfloat16)
    packed = tk.pack_linear(weight)
    assert tk.linear(x[:0], packed, bias, residual[:0]).shape == (0, 6)
    assert tk.linear(x, tk.pack_linear(weight[:0])).shape == (4, 0)
    nothing_to_sum = tk.linear(x[:, :0], tk.pack_linear(weight[:, :0]), bias, residual)
    torch.testing.assert_close(nothing_to_sum, (bias.float() + residual.float()).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_stay_in_their_row_and_column(dtype: torch.dtype) -> None:
    x, weight, _, _ = layer(30, 35, 33, dtype)
    clean = tk.linear(x, tk.pack_linear(weight))
    x[3, 32], x[17, 0], weight[34, 5] = torch.inf, torch.nan, torch.nan
    out = tk.linear(x, tk.pack_linear(weight))
    assert (out[3, :34].isinf() | (weight[:34, 32] == 0)).all()
    assert out[17].isnan().all()
    assert out[:, 34].isnan().all()
    untouched = torch.ones(30, dtype=torch.bool)
    untouched[[3, 17]] = False
    assert torch.equal(out[untouched, :34], clean[untouched, :34])


def test_opcheck_compile_and_pytree() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, residual = layer(5, 18, 9, dtype)
        packed = tk.pack_linear(weight)
        opcheck(torch.ops.tts_kernels.pack_linear.default, (weight,))
        for b, r in ((None, None), (bias, residual)):
            opcheck(torch.ops.tts_kernels.linear.default, (x, packed.weight, 9, 18, b, r))

        def doubled(x: torch.Tensor, packed: tk.PackedLinear, bias: torch.Tensor) -> torch.Tensor:
            return tk.linear(x, packed, bias) * 2

        compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, packed, bias), doubled(x, packed, bias))
        (leaf,), spec = pytree.tree_flatten(packed)
        assert leaf is packed.weight
        again = pytree.tree_unflatten([leaf], spec)
        assert (again.weight, again.in_features, again.out_features) == (packed.weight, 9, 18)
        assert again != packed  # by identity: comparing tensors has no one answer
        assert hash(packed) == hash(packed)


def test_compiles_once_for_all_numbers_of_rows() -> None:
    packed = tk.pack_linear(torch.randn(16, 8))
    calls = [(torch.randn(n, 8), torch.randn(n, 16)) for n in range(2, 14)]
    assert compilations(lambda x, residual: tk.linear(x, packed, residual=residual), calls) <= 2


def test_reference_backend() -> None:
    x, weight, bias, residual = layer(5, 18, 9, torch.float32)
    packed = tk.pack_linear(weight)
    with tk.use_backend("reference"):
        slow = tk.linear(x, tk.pack_linear(weight), bias, residual)
    torch.testing.assert_close(tk.linear(x, packed, bias, residual), slow)


def test_bad_input_names_the_argument() -> None:
    x, weight, bias, residual = layer(4, 6, 9, torch.bfloat16)
    packed = tk.pack_linear(weight)
    assert_names(TypeError, "weight", tk.pack_linear, weight.double())
    assert_names(TypeError, "weight", tk.pack_linear, [1.0])
    assert_names(ValueError, "weight", tk.pack_linear, weight[0])
    assert_names(TypeError, "packed", tk.linear, x, weight)
    assert_names(TypeError, "x", tk.linear, x.double(), packed)
    assert_names(ValueError, "x", tk.linear, x[0], packed)
    assert_names(ValueError, "x", tk.linear, x[:, :8], packed)
    assert_names(ValueError, "x", tk.linear, torch.cat([x, x[:, :1]], 1), packed)  # as many pairs of bfloat16
    assert_names(TypeError, "packed.weight", tk.linear, x.float(), packed)
    assert_names(ValueError, "packed.weight", tk.linear, x, tk.PackedLinear(packed.weight[:, :3], 9, 6))
    assert_names(TypeError, "bias", tk.linear, x, packed, bias.float())
    assert_names(ValueError, "bias", tk.linear, x, packed, bias[:5])
    assert_names(ValueError, "bias", tk.linear, x, packed, bias[None])
    assert_names(TypeError, "residual", tk.linear, x, packed, None, residual.float())
    assert_names(ValueError, "residual", tk.linear, x, packed, None, residual[:3])
    assert_names(ValueError, "residual", tk.linear, x, packed, None, residual[:, :5])
