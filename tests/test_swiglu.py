from __future__ import annotations

import pytest
import torch
from rules import DTYPES, assert_names, assert_rule
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference


def plain(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (16, 1536), (130, 515)])
def test_equals_the_definition(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    gate_up = (torch.randn(rows, 2 * width) * 4).to(dtype)
    out = tk.swiglu(gate_up)
    assert out.dtype == dtype
    assert_rule(out, reference.swiglu(gate_up.double()), plain(gate_up))


def test_strided_rows_and_empty() -> None:
    gate_up = torch.randn(12, 40)
    assert torch.equal(tk.swiglu(gate_up[::3, 3:21]), tk.swiglu(gate_up[::3, 3:21].contiguous()))
    assert torch.equal(tk.swiglu(gate_up.T), tk.swiglu(gate_up.T.contiguous()))
    assert tk.swiglu(gate_up[:0]).shape == (0, 20)
    assert tk.swiglu(gate_up[:, :0]).shape == (12, 0)


def test_extreme_gates() -> None:
    gate = torch.tensor([100.0, -100.0, 0.0, torch.inf, torch.nan, -1e30])
    out = tk.swiglu(torch.cat([gate, torch.full((6,), 2.0)])[None])[0]
    assert out[0] == 200
    assert out[1].abs() < 1e-30
    assert out[2] == 0
    assert out[3] == torch.inf
    assert out[4].isnan()
    assert out[5] == 0


def test_threads_do_not_change_the_result() -> None:
    gate_up, before, results = torch.randn(700, 300), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tk.swiglu(gate_up))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


def test_opcheck_and_compile() -> None:
    gate_up = torch.randn(3, 10)
    opcheck(torch.ops.tts_kernels.swiglu.default, (gate_up,))
    compiled = torch.compile(lambda t: tk.swiglu(t) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate_up), tk.swiglu(gate_up) + 1)


def test_bad_input_names_the_argument() -> None:
    assert_names(TypeError, "gate_up", tk.swiglu, torch.ones(2, 4).double())
    assert_names(TypeError, "gate_up", tk.swiglu, [1.0])
    assert_names(ValueError, "gate_up", tk.swiglu, torch.ones(4))
    assert_names(ValueError, "gate_up", tk.swiglu, torch.ones(2, 5))
