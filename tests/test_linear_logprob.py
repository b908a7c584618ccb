from __future__ import annotations

import itertools

import pytest
import torch
from rules import DTYPES, assert_names, assert_rule
from torch import Tensor
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference

# rows, width, vocabulary: one of each; tails of every tile; a chunk of 1008 and one row more; more rows than a block
SIZES = [(0, 8, 5), (1, 1, 1), (3, 33, 50), (4, 64, 96), (5, 31, 1009), (7, 130, 2021), (70, 96, 1100), (2, 1536, 97)]


def problem(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, other: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(vocabulary, width) / width**0.5 * 3).to(other)
    return hidden, weight, torch.randint(0, vocabulary, (rows,))


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """What a user writes in torch, in the dtype of the inputs."""
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    logits = torch.nn.functional.linear(hidden.to(wide), weight.to(wide)) / temperature
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].float()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(*size, dtype, dtype)
    for temperature in (1.0, 0.7):
        out = tk.linear_logprob(hidden, weight, targets, temperature=temperature)
        exact = reference.linear_logprob(hidden.double(), weight.double(), targets, temperature)
        assert out.dtype == torch.float32
        assert_rule(out, exact, reference.linear_logprob(hidden, weight, targets, temperature))
        assert_rule(out, exact, plain(hidden, weight, targets, temperature))


@pytest.mark.parametrize(("dtype", "other"), [p for p in itertools.product(DTYPES, DTYPES) if p[0] != p[1]])
def test_mixed_dtypes_and_strides(dtype: torch.dtype, other: torch.dtype) -> None:
    hidden, weight, targets = problem(9, 80, 1300, dtype, other)
    hidden, weight, targets = hidden[::2, 3:72], weight[::3, 3:72], targets[::2].int() // 3
    out = tk.linear_logprob(hidden, weight, targets)
    exact = reference.linear_logprob(hidden.double(), weight.double(), targets, 1.0)
    assert_rule(out, exact, reference.linear_logprob(hidden, weight, targets, 1.0))


def test_columns_may_be_strided_too() -> None:
    hidden, weight, targets = problem(6, 40, 64, torch.float32, torch.float32)
    out = tk.linear_logprob(hidden.T.contiguous().T, weight.T.contiguous().T, targets)
    torch.testing.assert_close(out, tk.linear_logprob(hidden, weight, targets), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(70, 100, 1030, dtype, dtype)
    together = tk.linear_logprob(hidden, weight, targets)
    for rows in ([0], [5, 6], [69], list(range(3, 20))):
        assert torch.equal(tk.linear_logprob(hidden[rows], weight, targets[rows]), together[rows])


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[3e4], [2.9e4], [-3e4]])
    out = tk.linear_logprob(hidden.expand(3, 1), weight, torch.arange(3))
    assert out.tolist() == [0.0, -1e3, -6e4]


def test_infinite_and_nan_logits_as_in_torch() -> None:
    """-inf drops a token; a row with +inf or NaN or nothing but -inf is NaN. Chunks of -inf alone count nothing."""
    weight = torch.ones(2100, 1)
    weight[:1500] = -torch.inf
    hidden, targets = torch.ones(4, 1), torch.tensor([0, 1600, 3, 2099])
    for rows in (hidden, -hidden, hidden * torch.nan):
        exact = rows.mm(weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        torch.testing.assert_close(tk.linear_logprob(rows, weight, targets), exact, equal_nan=True)
    weight[:] = -torch.inf
    assert tk.linear_logprob(hidden, weight, targets).isnan().all()


def test_threads_do_not_change_the_result() -> None:
    args = problem(10, 64, 5000, torch.bfloat16, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tk.linear_logprob(*args))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck_and_compile() -> None:
    args = problem(3, 16, 30, torch.float32, torch.float32)
    opcheck(torch.ops.tts_kernels.linear_logprob.default, (*args, 0.5))
    compiled = torch.compile(lambda *a: tk.linear_logprob(*a, temperature=2.0) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), tk.linear_logprob(*args, temperature=2.0) * 2)


def test_bad_input_names_the_argument() -> None:
    hidden, weight, targets = problem(3, 4, 5, torch.float32, torch.float32)
    assert_names(TypeError, "hidden", tk.linear_logprob, hidden.double(), weight, targets)
    assert_names(ValueError, "hidden", tk.linear_logprob, hidden[0], weight, targets)
    assert_names(TypeError, "weight", tk.linear_logprob, hidden, weight.int(), targets)
    assert_names(ValueError, "weight", tk.linear_logprob, hidden, weight[:, 1:], targets)
    assert_names(TypeError, "targets", tk.linear_logprob, hidden, weight, targets.float())
    assert_names(ValueError, "targets", tk.linear_logprob, hidden, weight, targets[:2])
    assert_names(IndexError, "targets", tk.linear_logprob, hidden, weight, targets * 0 + 5)
    assert_names(IndexError, "targets", tk.linear_logprob, hidden, weight, targets * 0 - 1)
    assert_names(IndexError, "targets", tk.linear_logprob, hidden, weight[:0], targets)
    assert_names(TypeError, "temperature", tk.linear_logprob, hidden, weight, targets, temperature="1")
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        assert_names(ValueError, "temperature", tk.linear_logprob, hidden, weight, targets, temperature=wrong)


FORMATS = [("int8", None), ("int8", 64), ("int4", 32), ("int4", None)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_weights(size: tuple[int, int, int], dtype: torch.dtype, form: tuple[str, int | None]) -> None:
    """Of the logits of `linear`, whose whole numbers are the definition's."""
    hidden, weight, targets = problem(*size, dtype, torch.float32)
    packed = tk.pack_linear(weight, quantize=form[0], group_size=form[1])
    logits = tk.linear(hidden.float(), packed)
    for temperature in (1.0, 0.7):
        out = tk.linear_logprob(hidden, packed, targets, temperature=temperature)
        exact = (logits.double() / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        assert_rule(out, exact, (logits / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0])
        parts = (packed.weight, targets, temperature, size[1], size[2], packed.scale, packed.zero)
        torch.testing.assert_close(
            reference.linear_logprob_quantized(hidden, *parts).double(), exact, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("form", FORMATS)
def test_quantised_weights_whoever_the_other_rows_are(form: tuple[str, int | None]) -> None:
    hidden, weight, targets = problem(70, 100, 1030, torch.bfloat16, torch.float32)
    packed = tk.pack_linear(weight, quantize=form[0], group_size=form[1])
    together = tk.linear_logprob(hidden, packed, targets)
    for rows in ([0], [5, 6], [69], list(range(3, 20)), list(range(40))):
        assert torch.equal(tk.linear_logprob(hidden[rows], packed, targets[rows]), together[rows])
    hidden[3, 5] = torch.nan
    out = tk.linear_logprob(hidden, packed, targets)
    assert out[3].isnan()
    assert torch.equal(out[4:], together[4:])


def test_quantised_weights_opcheck_compile_and_bad_input() -> None:
    hidden, weight, targets = problem(4, 64, 50, torch.float32, torch.float32)
    q, scale, zero = (weight * 9).to(torch.int8), torch.full((50, 2), 0.1), torch.randint(-3, 3, (50, 2))
    packed = tk.PackedLinear.from_quantized(q, scale, zero, 32)
    parts = (packed.weight, targets, 1.0, 64, 50, packed.scale, packed.zero)
    opcheck(torch.ops.tts_kernels.linear_logprob_quantized.default, (hidden, *parts))
    compiled = torch.compile(lambda h: tk.linear_logprob(h, packed, targets), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), tk.linear_logprob(hidden, packed, targets))
    with tk.use_backend("reference"):
        torch.testing.assert_close(tk.linear_logprob(hidden, packed, targets), compiled(hidden))
    assert_names(TypeError, "weight", tk.linear_logprob, hidden, tk.pack_linear(weight), targets)
    assert_names(ValueError, "hidden", tk.linear_logprob, hidden.repeat(1, 2), packed, targets)
    assert_names(TypeError, "hidden", tk.linear_logprob, hidden.double(), packed, targets)
    assert_names(IndexError, "targets", tk.linear_logprob, hidden, packed, targets + 50)
    assert_names(ValueError, "targets", tk.linear_logprob, hidden, packed, targets[:3])
    assert_names(ValueError, "temperature", tk.linear_logprob, hidden, packed, targets, temperature=0.0)
