from __future__ import annotations

import pytest
import torch
from rules import DTYPES, assert_names, assert_rule, assert_same_by_threads
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference


def plain(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As transformers' Llama does it."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows * 31 + width)
    return tuple(t.to(dtype) for t in (torch.randn(rows, width), torch.rand(width) + 0.5, torch.randn(rows, width)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (2, 64), (16, 576), (100, 1537)])
def test_equals_the_definition(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight, residual = inputs(rows, width, dtype)
    normed, same = tk.rms_norm(x, weight, 1e-5)
    assert same is x
    exact, _ = reference.rms_norm(x.double(), weight.double(), 1e-5, None)
    assert_rule(normed, exact, plain(x, weight, 1e-5))

    normed, summed = tk.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, tk.rms_norm(summed, weight, 1e-5)[0])
    exact, _ = reference.rms_norm(summed.double(), weight.double(), 1e-5, None)
    assert_rule(normed, exact, plain(summed, weight, 1e-5))


def test_strided_rows_and_empty() -> None:
    x, weight, residual = inputs(12, 40, torch.bfloat16)
    normed, summed = tk.rms_norm(x[::3, 3:20], weight[::2][:17], 1e-6, residual[::3, 1:18])
    expected = tk.rms_norm(
        x[::3, 3:20].contiguous(), weight[::2][:17].contiguous(), 1e-6, residual[::3, 1:18].contiguous()
    )
    assert torch.equal(normed, expected[0])
    assert torch.equal(summed, expected[1])
    assert tk.rms_norm(x[:0], weight, 1e-6, residual[:0])[1].shape == (0, 40)
    assert tk.rms_norm(x[:, :0], weight[:0], 1e-6)[0].shape == (12, 0)


def test_zero_rows_and_non_finite_values() -> None:
    x, weight, _ = inputs(4, 33, torch.float32)
    clean = tk.rms_norm(x, weight, 1e-6)[0]
    x[0], x[1, 5], x[2, 7] = 0, torch.nan, torch.inf
    normed, _ = tk.rms_norm(x, weight, 1e-6)
    assert (normed[0] == 0).all()
    assert normed[1].isnan().all()
    assert normed[2, 7].isnan()
    assert torch.equal(normed[3], clean[3])


def test_threads_do_not_change_the_result() -> None:
    x, weight, residual = inputs(700, 300, torch.bfloat16)
    assert_same_by_threads(tk.rms_norm, x, weight, 1e-6, residual)


def test_opcheck_and_compile() -> None:
    x, weight, residual = inputs(3, 10, torch.float32)
    for r in (None, residual):
        opcheck(torch.ops.tts_kernels.rms_norm.default, (x, weight, 1e-5, r))

    def twice(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        normed, h = tk.rms_norm(x, weight, 1e-5, residual)
        return tk.rms_norm(normed, weight, 1e-5)[0] + h

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual), twice(x, residual))


def test_bad_input_names_the_argument() -> None:
    x, weight, residual = inputs(3, 10, torch.float32)
    assert_names(TypeError, "x", tk.rms_norm, x.double(), weight, 1e-5)
    assert_names(ValueError, "x", tk.rms_norm, x[0], weight, 1e-5)
    assert_names(TypeError, "weight", tk.rms_norm, x, weight.half(), 1e-5)
    assert_names(ValueError, "weight", tk.rms_norm, x, weight[:9], 1e-5)
    assert_names(ValueError, "eps", tk.rms_norm, x, weight, -1.0)
    assert_names(ValueError, "eps", tk.rms_norm, x, weight, float("nan"))
    assert_names(TypeError, "eps", tk.rms_norm, x, weight, "1e-5")
    assert_names(TypeError, "residual", tk.rms_norm, x, weight, 1e-5, residual.half())
    assert_names(ValueError, "residual", tk.rms_norm, x, weight, 1e-5, residual[:2])
