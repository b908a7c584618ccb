"""`linear` with weights of 8 and 4 bits: the bits of the definition, for any instruction set and any other rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import DTYPES, assert_names, assert_same_by_threads, compilations
from torch import Tensor
from torch.library import opcheck
from torch.utils import _pytree as pytree

import tts_kernels as tk
from tts_kernels import reference

FORMATS = [("int8", None), ("int8", 32), ("int8", 64), ("int8", 128),
           ("int4", None), ("int4", 32), ("int4", 64), ("int4", 128)]  # fmt: skip

# rows, outputs, depth: single ones, odd ones, each height of a tile's edge, tall depth
SIZES = [(1, 1, 1), (1, 16, 2), (2, 17, 3), (5, 40, 63), (7, 576, 576), (13, 33, 130), (17, 100, 192), (33, 31, 65),
         (64, 100, 1537), (3, 20, 4099), (300, 33, 64), (48, 50, 19)]  # fmt: skip


def tensors(rows: int, outputs: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(rows * 31 + outputs)
    x, weight = torch.randn(rows, depth), torch.randn(outputs, depth) / depth**0.5
    return tuple(t.to(dtype) for t in (x, weight, torch.randn(outputs), torch.randn(rows, outputs)))


def with_zeros(outputs: int, depth: int, quantize: str, group_size: int | None) -> tk.PackedLinear:
    """Random numbers, scales and zero points."""
    groups = -(-depth // group_size) if group_size else 1
    scale, zero = torch.rand(outputs, groups) - 0.3, torch.randint(0, 16, (outputs, groups))
    if quantize == "int8":
        q = torch.randint(-128, 128, (outputs, depth), dtype=torch.int8)
    else:
        q = torch.randint(0, 256, (outputs, -(-depth // 2)), dtype=torch.uint8)
        groups = -(-2 * q.shape[1] // group_size) if group_size else 1
        scale, zero = (t[:, :1].expand(-1, groups) for t in (scale, zero))
    return tk.PackedLinear.from_quantized(q, scale, zero, group_size)


def defined(x: Tensor, packed: tk.PackedLinear, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    features = (packed.in_features, packed.out_features)
    return reference.linear(x, packed.weight, *features, bias, residual, packed.scale, packed.zero)


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit; any NaN is like any other."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "depth"), SIZES)
@pytest.mark.parametrize(("quantize", "group_size"), FORMATS)
def test_has_the_bits_of_the_definition(
    rows: int, outputs: int, depth: int, quantize: str, group_size: int | None, dtype: torch.dtype
) -> None:
    x, weight, bias, residual = tensors(rows, outputs, depth, dtype)
    packed = tk.pack_linear(weight, quantize=quantize, group_size=group_size)
    for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
        assert same(tk.linear(x, packed, b, r), defined(x, packed, b, r))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    outputs=st.integers(1, 70),
    depth=st.integers(1, 200).map(lambda half: 2 * half),
    form=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-38, 1e-30, 1e-4, 1.0, 1e4, 1e30]),
    seed=st.integers(0, 2**20),
)
def test_zero_points_and_magnitudes(
    rows: int, outputs: int, depth: int, form: tuple[str, int | None], dtype: torch.dtype, magnitude: float, seed: int
) -> None:
    torch.manual_seed(seed)
    packed = with_zeros(outputs, depth, *form)
    x = (torch.randn(rows, depth) * magnitude).to(dtype)
    x[0] = 0
    assert same(tk.linear(x, packed), defined(x, packed))


def with_outliers(x: Tensor, spread: float) -> Tensor:
    """Some elements of each row are large, at most one in twenty; of some of them very much so."""
    torch.manual_seed(x.shape[1])
    tails = (spread * torch.randn(x.shape)).exp() * (torch.rand(x.shape) < torch.rand(x.shape[0], 1) / 20)
    x = x * (1 + tails)
    x[:, 0] = 30
    return x


@pytest.mark.parametrize("spread", [1.0, 3.0, 6.0])
@pytest.mark.parametrize(("rows", "outputs", "depth"), [(1, 16, 576), (3, 33, 63), (50, 40, 700), (33, 31, 4099)])
@pytest.mark.parametrize(("quantize", "group_size"), FORMATS)
def test_outliers_have_the_bits_of_the_definition(
    quantize: str, group_size: int | None, rows: int, outputs: int, depth: int, spread: float
) -> None:
    x, weight, bias, _ = tensors(rows, outputs, depth, torch.float32)
    x = with_outliers(x, spread)
    whole, _ = reference.quantize_inputs(x)
    assert 127 < whole.abs().max() <= 127 * 128
    packed = tk.pack_linear(weight, quantize=quantize, group_size=group_size)
    assert same(tk.linear(x, packed, bias), defined(x, packed, bias))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_outliers_leave_the_steps_of_the_others(quantize: str) -> None:
    """8 mean magnitudes are 2.2 times the largest of these rows: 5 times the square of the error, and not 900 times."""
    torch.manual_seed(0)
    x, weight = torch.randn(20, 1000), torch.randn(40, 1000)
    packed = tk.pack_linear(weight, quantize=quantize, group_size=64)

    def error(x: Tensor) -> Tensor:
        return (tk.linear(x, packed) - x.double() @ packed.unpack().double().T).square().mean()

    alone = error(x)
    x[:, 300] = 100
    assert error(x) < 8 * alone


@pytest.mark.parametrize("first", [1.0, 16256.0, 1e9])
def test_the_largest_sums_do_not_overflow(first: float) -> None:
    """Rows of numbers as large as they get, on weights as large as they get, at the largest depth."""
    depth = 65536
    x = torch.ones(2, depth)
    x[1] = -1
    x[:, 0] *= first
    for stored in (-128, 127):
        packed = tk.PackedLinear.from_quantized(torch.full((17, depth), stored, dtype=torch.int8), torch.ones(17, 1))
        assert same(tk.linear(x, packed), defined(x, packed))


@pytest.mark.parametrize(("quantize", "group_size"), FORMATS)
def test_a_row_does_not_depend_on_its_company(quantize: str, group_size: int | None) -> None:
    x, weight, bias, residual = tensors(300, 69, 1100, torch.bfloat16)
    x = with_outliers(x.float(), 3.0).bfloat16()
    packed = tk.pack_linear(weight, quantize=quantize, group_size=group_size)
    whole = tk.linear(x, packed, bias, residual)
    for rows in (*range(1, 35), 47, 64, 129):
        picked = torch.randperm(300)[:rows]
        assert torch.equal(tk.linear(x[picked], packed, bias, residual[picked]), whole[picked]), rows


def test_threads_do_not_change_the_result() -> None:
    x, weight, bias, residual = tensors(70, 1111, 640, torch.float32)
    for quantize, group_size in FORMATS:
        packed = tk.pack_linear(weight, quantize=quantize, group_size=group_size)
        assert_same_by_threads(tk.linear, x, packed, bias, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_nan(dtype: torch.dtype, bad: float) -> None:
    x, weight, _, _ = tensors(40, 35, 131, dtype)
    for quantize, group_size in (("int8", None), ("int4", 32)):
        packed = tk.pack_linear(weight, quantize=quantize, group_size=group_size)
        clean = tk.linear(x, packed)
        spoilt = x.clone()
        spoilt[3, 130], spoilt[17, 0], spoilt[39, 64] = bad, bad, bad
        out = tk.linear(spoilt, packed)
        assert out[[3, 17, 39]].isnan().all()
        others = [i for i in range(40) if i not in (3, 17, 39)]
        assert torch.equal(out[others], clean[others])
        assert same(out, defined(spoilt, packed))


def test_a_weight_that_is_not_finite_spoils_its_output_alone() -> None:
    x, weight, _, _ = tensors(9, 20, 130, torch.float32)
    clean = tk.linear(x, tk.pack_linear(weight, quantize="int4", group_size=64))
    weight[7, 100] = torch.inf
    out = tk.linear(x, tk.pack_linear(weight, quantize="int4", group_size=64))
    assert out[:, 7].isnan().all()
    assert torch.equal(out[:, torch.arange(20) != 7], clean[:, torch.arange(20) != 7])


def test_zero_rows_and_small_ones() -> None:
    x, weight, _, _ = tensors(4, 20, 130, torch.float32)
    x[1], x[2] = 0, x[2] * 2.0**-110
    for quantize in ("int8", "int4"):
        packed = tk.pack_linear(weight, quantize=quantize)
        out = tk.linear(x, packed)
        assert (out[1] == 0).all()
        assert (out[2].abs() < 1e-30).all()
        assert same(out, defined(x, packed))


@pytest.mark.parametrize(("quantize", "group_size"), FORMATS)
def test_is_as_far_from_the_exact_product_as_rounding_the_rows_is(quantize: str, group_size: int | None) -> None:
    x, weight, _, _ = tensors(20, 40, 700, torch.float32)
    for packed in (
        tk.pack_linear(weight, quantize=quantize, group_size=group_size),
        with_zeros(40, 700, quantize, group_size),
    ):
        dense = packed.unpack().double()
        step = reference.quantize_inputs(x)[1].double()
        allowed = step[:, None] / 2 * dense.abs().sum(1) * (1 + 1e-5) + 1e-6
        assert ((tk.linear(x, packed).double() - x.double() @ dense.T).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quantize", "group_size"), FORMATS)
def test_packing_is_within_half_a_step(quantize: str, group_size: int | None, dtype: torch.dtype) -> None:
    weight = tensors(1, 37, 300, dtype)[1]
    packed = tk.pack_linear(weight, quantize=quantize, group_size=group_size)
    assert (packed.quantize, packed.group_size) == (quantize, group_size)
    assert (packed.out_features, packed.in_features, packed.dtype) == (37, 300, torch.uint8)
    error = (packed.unpack() - weight.float()).abs()
    for begin in range(0, 300, group_size or 300):
        group = slice(begin, begin + (group_size or 300))
        largest = weight.float()[:, group].abs().amax(1)
        # In 4 bits the other end of the scale is 7 of 8 steps away.
        step = largest / 127 / 2 if quantize == "int8" else largest / 8
        assert (error[:, group].amax(1) <= step * (1 + 1e-5)).all()


@pytest.mark.parametrize(("quantize", "group_size"), FORMATS)
def test_what_is_on_the_grid_is_kept(quantize: str, group_size: int | None) -> None:
    top = 127 if quantize == "int8" else 8
    weight = torch.randint(-top + (quantize == "int4"), top, (20, 200)).float() / 16
    weight[:, :: group_size or 200] = -top / 16
    assert torch.equal(tk.pack_linear(weight, quantize=quantize, group_size=group_size).unpack(), weight)


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_a_checkpoints_own_numbers(group_size: int | None) -> None:
    groups = -(-200 // group_size) if group_size else 1
    size = group_size or 200
    scale = torch.rand(20, groups)
    q = torch.randint(-128, 128, (20, 200), dtype=torch.int8)
    packed = tk.PackedLinear.from_quantized(q, scale, group_size=group_size)
    spread = scale.repeat_interleave(size, 1)[:, :200]
    assert torch.equal(packed.unpack(), q * spread)
    assert (packed.quantize, packed.group_size) == ("int8", group_size)
    nibbles = torch.randint(0, 16, (20, 200), dtype=torch.uint8)
    pairs = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    packed = tk.PackedLinear.from_quantized(pairs, scale, group_size=group_size)
    assert torch.equal(packed.unpack(), (nibbles.float() - 8) * spread)
    zero = torch.randint(0, 17, (20, groups), dtype=torch.int32)
    packed = tk.PackedLinear.from_quantized(pairs, scale, zero, group_size)
    assert torch.equal(packed.unpack(), (nibbles - zero.repeat_interleave(size, 1)[:, :200]) * spread)
    assert packed.quantize == "int4"


def test_strided_inputs() -> None:
    x, weight, bias, residual = tensors(40, 21, 130, torch.bfloat16)
    packed = tk.pack_linear(weight[:, :15], quantize="int8")
    expected = tk.linear(x[::2, 5:20].contiguous(), packed, bias, residual[20:].contiguous())
    assert torch.equal(tk.linear(x[::2, 5:20], packed, bias, residual[20:]), expected)
    packed = tk.pack_linear(weight.T.contiguous().T, quantize="int4", group_size=32)
    assert torch.equal(tk.linear(x.T.contiguous().T, packed), tk.linear(x, packed))
    assert torch.equal(tk.linear(x[:1].expand(5, -1), packed), tk.linear(x[:1], packed).expand(5, -1))


def test_empty() -> None:
    x, weight, bias, residual = tensors(4, 6, 8, torch.bfloat16)
    for form in FORMATS:
        options = dict(zip(("quantize", "group_size"), form, strict=True))
        packed = tk.pack_linear(weight, **options)
        assert tk.linear(x[:0], packed, bias, residual[:0]).shape == (0, 6)
        assert tk.linear(x, tk.pack_linear(weight[:0], **options)).shape == (4, 0)
        out = tk.linear(x[:, :0], tk.pack_linear(weight[:, :0], **options), bias, residual)
        torch.testing.assert_close(out, (bias.float() + residual.float()).bfloat16())


@pytest.mark.parametrize("form", [("int8", None, False), ("int4", 32, False), ("int4", 32, True)])
def test_opcheck_compile_and_pytree(form: tuple[str, int | None, bool]) -> None:
    x, weight, bias, residual = tensors(5, 18, 66, torch.float32)
    packed = with_zeros(18, 66, *form[:2]) if form[2] else tk.pack_linear(weight, quantize=form[0], group_size=form[1])
    for b, r in ((None, None), (bias, residual)):
        args = (x, packed.weight, 66, 18, b, r, packed.scale, packed.zero)
        opcheck(torch.ops.tts_kernels.linear.default, args)

    def doubled(x: Tensor, packed: tk.PackedLinear, bias: Tensor) -> Tensor:
        return tk.linear(x, packed, bias) * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, packed, bias), doubled(x, packed, bias))
    packs = torch.compile(lambda w: tk.pack_linear(w, quantize="int8").weight, fullgraph=True, backend="aot_eager")
    assert torch.equal(packs(weight), tk.pack_linear(weight, quantize="int8").weight)
    leaves, spec = pytree.tree_flatten(packed)
    assert len(leaves) == 2 + form[2]
    again = pytree.tree_unflatten(leaves, spec)
    assert (again.weight, again.scale, again.zero) == (packed.weight, packed.scale, packed.zero)
    assert (again.quantize, again.group_size) == form[:2]


def test_compiles_once_for_all_numbers_of_rows() -> None:
    packed = tk.pack_linear(torch.randn(16, 64), quantize="int8")
    calls = [(torch.randn(n, 64),) for n in range(2, 14)]
    assert compilations(lambda x: tk.linear(x, packed), calls) <= 2


def test_reference_backend() -> None:
    x, weight, bias, residual = tensors(5, 18, 90, torch.float32)
    packed = tk.pack_linear(weight, quantize="int4", group_size=32)
    fast = tk.linear(x, packed, bias, residual)
    with tk.use_backend("reference"):
        assert torch.equal(tk.linear(x, packed, bias, residual), fast)


def test_float64_is_the_same_within_its_steps() -> None:
    """What the definition says in float64 differs by single rounding steps of single elements at most."""
    x, weight, _, _ = tensors(30, 40, 500, torch.float32)
    packed = tk.pack_linear(weight, quantize="int8")
    exact = defined(x.double(), packed)
    assert ((tk.linear(x, packed) - exact).abs().max() / exact.abs().max()).item() < 2e-3


def test_bad_input_names_the_argument() -> None:
    x, weight, bias, residual = tensors(4, 6, 130, torch.bfloat16)
    packed = tk.pack_linear(weight, quantize="int4", group_size=32)
    assert_names(ValueError, "quantize", tk.pack_linear, weight, quantize="int2")
    assert_names(ValueError, "group_size", tk.pack_linear, weight, quantize="int4", group_size=48)
    assert_names(TypeError, "group_size", tk.pack_linear, weight, quantize="int4", group_size=32.0)
    assert_names(ValueError, "group_size", tk.pack_linear, weight, group_size=32)
    assert_names(TypeError, "weight", tk.pack_linear, weight.double(), quantize="int8")
    assert_names(ValueError, "weight", tk.pack_linear, weight[0], quantize="int8")
    assert_names(ValueError, "weight", tk.pack_linear, torch.zeros(1, 65537), quantize="int8")
    assert_names(TypeError, "x", tk.linear, x.double(), packed)
    assert_names(ValueError, "x", tk.linear, x[:, :129], packed)
    assert_names(TypeError, "bias", tk.linear, x, packed, bias.float())
    assert_names(ValueError, "residual", tk.linear, x, packed, None, residual[:3])
    broken = {
        "packed.weight": (TypeError, {"weight": packed.weight.char()}),
        "packed.weight: ": (ValueError, {"weight": packed.weight[:, :3]}),
        "packed.weight: expected a cont": (ValueError, {"weight": packed.weight.transpose(2, 3).contiguous().mT}),
        "packed.scale": (TypeError, {"scale": packed.scale.half()}),
        "packed.scale: ": (ValueError, {"scale": packed.scale[:, :5]}),
        "packed.zero": (ValueError, {"zero": packed.scale[:, :3]}),
        "packed.zero: ": (TypeError, {"zero": packed.scale.int()}),
    }
    for name, (kind, parts) in broken.items():
        fields = {"weight": packed.weight, "scale": packed.scale, "zero": None} | parts
        assert_names(kind, name, tk.linear, x, tk.PackedLinear(in_features=130, out_features=6, **fields))
    plain = tk.pack_linear(weight)
    assert_names(ValueError, "packed.zero", tk.linear, x, tk.PackedLinear(plain.weight, 130, 6, None, packed.scale))
    q, scale = torch.zeros(6, 64, dtype=torch.int8), torch.ones(6, 2)
    pack = tk.PackedLinear.from_quantized
    assert_names(TypeError, "q", pack, q.float(), scale, None, 32)
    assert_names(ValueError, "q", pack, q[0], scale, None, 32)
    assert_names(ValueError, "scale", pack, q, scale)
    assert_names(TypeError, "scale", pack, q, scale.int(), None, 32)
    assert_names(ValueError, "zero", pack, q, scale, scale[:, :1], 32)
    assert_names(ValueError, "group_size", pack, q, scale, None, 16)
