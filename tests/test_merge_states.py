from __future__ import annotations

import pytest
import torch
from rules import DTYPES, assert_names, assert_rule
from torch import Tensor
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference


def states(rows: int, heads: int, dim: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, ...]:
    return (
        torch.randn(rows, heads, dim).to(dtype),
        torch.randn(rows, heads) * spread,
        torch.randn(rows, heads, dim).to(dtype),
        torch.randn(rows, heads) * spread,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "dim"), [(0, 3, 8), (1, 1, 1), (3, 5, 17), (70, 4, 64), (9, 2, 128), (4, 2, 0)]
)
@pytest.mark.parametrize("spread", [0.1, 3.0, 1000.0])
def test_equals_the_definition(rows: int, heads: int, dim: int, spread: float, dtype: torch.dtype) -> None:
    args = states(rows, heads, dim, dtype, spread)
    out, lse = tk.merge_states(*args)
    exact, exact_lse = reference.merge_states(*(t.double() for t in args))
    plain, plain_lse = reference.merge_states(*args)
    assert out.dtype == dtype
    assert_rule(out, exact, plain)
    assert_rule(lse, exact_lse, plain_lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_attention_over_both_sets_of_keys(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(n, 4, 32, dtype=torch.float64) for n in (5, 40, 40))

    def attend(keys: slice) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("rhd,nhd->rhn", q, k[keys])
        return torch.einsum("rhn,nhd->rhd", scores.softmax(-1), v[keys]), scores.logsumexp(-1)

    parts = [(out.to(dtype), lse.float()) for out, lse in (attend(slice(0, 13)), attend(slice(13, 40)))]
    out, lse = tk.merge_states(*parts[0], *parts[1])
    exact, exact_lse = attend(slice(0, 40))
    tolerance = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_empty_state_returns_the_other_one_bit_for_bit(dtype: torch.dtype) -> None:
    a, lse_a, b, lse_b = states(40, 3, 33, dtype)
    zero, none = torch.zeros_like(a), torch.full_like(lse_a, -torch.inf)
    for out, lse in (tk.merge_states(a, lse_a, zero, none), tk.merge_states(zero, none, a, lse_a)):
        assert torch.equal(out, a)
        assert torch.equal(lse, lse_a)
    out, lse = tk.merge_states(zero, none, zero, none)
    assert torch.equal(out, zero)
    assert torch.equal(lse, none)
    nan = torch.full_like(a, torch.nan)  # an empty state's row is not read
    assert torch.equal(tk.merge_states(b, lse_b, nan, none)[0], b)


def test_commutes_to_the_bit_and_associates() -> None:
    a, lse_a, b, lse_b = states(50, 2, 40, torch.float32)
    c, lse_c = torch.randn(50, 2, 40), torch.randn(50, 2)
    ab, ba = tk.merge_states(a, lse_a, b, lse_b), tk.merge_states(b, lse_b, a, lse_a)
    assert torch.equal(ab[1], ba[1])
    torch.testing.assert_close(ab[0], ba[0], rtol=1e-6, atol=1e-7)
    left = tk.merge_states(*ab, c, lse_c)
    right = tk.merge_states(a, lse_a, *tk.merge_states(b, lse_b, c, lse_c))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_nan_shows() -> None:
    a, lse_a, b, lse_b = states(4, 1, 8, torch.float32)
    lse_a[0] = torch.nan
    lse_b[1] = torch.nan
    b[2, 0, 3] = torch.nan
    out, lse = tk.merge_states(a, lse_a, b, lse_b)
    assert out[:2].isnan().all()
    assert lse[:2].isnan().all()
    assert out[2].isnan().sum() == 1
    assert lse[2:].isfinite().all()
    assert out[3].isfinite().all()


def test_strided_inputs_and_threads() -> None:
    a, lse_a, b, lse_b = states(300, 6, 64, torch.bfloat16)
    expected = tk.merge_states(a, lse_a, b, lse_b)
    strided = (a.transpose(0, 1).contiguous().transpose(0, 1), lse_a.T.contiguous().T, b, lse_b)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(x, y) for x, y in zip(tk.merge_states(*strided), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_opcheck_and_compile() -> None:
    args = states(5, 2, 8, torch.float32)
    opcheck(torch.ops.tts_kernels.merge_states.default, args)
    compiled = torch.compile(lambda *xs: tk.merge_states(*xs)[0] + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), tk.merge_states(*args)[0] + 1)


def test_bad_input_names_the_argument() -> None:
    a, lse_a, b, lse_b = states(3, 2, 4, torch.float32)
    assert_names(TypeError, "out_a", tk.merge_states, a.double(), lse_a, b, lse_b)
    assert_names(ValueError, "out_a", tk.merge_states, a[0], lse_a, b, lse_b)
    assert_names(TypeError, "lse_a", tk.merge_states, a, lse_a.half(), b, lse_b)
    assert_names(ValueError, "lse_a", tk.merge_states, a, lse_a[:2], b, lse_b)
    assert_names(TypeError, "out_b", tk.merge_states, a, lse_a, b.half(), lse_b)
    assert_names(ValueError, "out_b", tk.merge_states, a, lse_a, b[..., :3], lse_b)
    assert_names(TypeError, "lse_b", tk.merge_states, a, lse_a, b, [1.0])
    assert_names(ValueError, "lse_b", tk.merge_states, a, lse_a, b, lse_b[:, :1])
