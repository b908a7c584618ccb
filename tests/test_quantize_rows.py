"""quantize_rows, dequantize_rows: the same bytes as the definition, on every backend and instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import DTYPES, assert_names, assert_same_by_threads
from torch import Tensor
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference

BITS = [2, 3, 4, 8]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_bytes_of_the_definition(data: st.DataObject) -> None:
    bits, dtype = data.draw(st.sampled_from(BITS)), data.draw(st.sampled_from(DTYPES))
    group = data.draw(st.integers(1, 128))
    factor = next(k for k in range(1, 17) if k * group % 16 == 0)
    width = group * factor * data.draw(st.integers(1, 3))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = (torch.randn(data.draw(st.integers(1, 5)), width) * 10 ** data.draw(st.integers(-3, 3))).to(dtype)
    rows = tk.quantize_rows(x, bits, group)
    assert torch.equal(rows, reference.quantize_rows(x, bits, group))
    assert rows.shape[1] == tk.row_bytes(width, bits, group)
    for out in DTYPES:
        back = tk.dequantize_rows(rows, width, bits, group, out)
        assert torch.equal(back, reference.dequantize_rows(rows, width, bits, group, out))
        assert torch.equal(back[:1], tk.dequantize_rows(rows[:1], width, bits, group, out))


@pytest.mark.parametrize("bits", BITS)
def test_no_number_is_off_by_more_than_half_a_step(bits: int) -> None:
    torch.manual_seed(bits)
    x = torch.randn(50, 96)
    back = tk.dequantize_rows(tk.quantize_rows(x, bits, 48), 96, bits, 48, torch.float32)
    groups = x.unflatten(1, (2, 48))
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    slack = 2**-10 * groups.abs().amax(-1) + 2**-10 * (2**bits - 1) * step  # of zero and scale in float16
    assert bool(((back - x).unflatten(1, (2, 48)).abs() <= (step / 2 + slack)[..., None]).all())


def test_whole_numbers_come_back() -> None:
    for bits in BITS:
        x = torch.arange(2**bits).repeat(16).float()[None] - 5
        x = x[:, :512].contiguous()
        for group in (128, 64):
            if group <= x.shape[1] and 2**bits <= group:
                assert torch.equal(
                    tk.dequantize_rows(tk.quantize_rows(x, bits, group), x.shape[1], bits, group, torch.float32), x
                )


def test_alike_and_odd_groups() -> None:
    x = torch.cat([torch.full((16,), -0.0), torch.full((16,), 7.0), torch.randn(48)])[None]
    x[0, 33], x[0, 50], x[0, 70] = torch.nan, torch.inf, 1e8  # its scale is beyond float16
    for bits in BITS:
        rows = tk.quantize_rows(x, bits, 16)
        assert torch.equal(rows, reference.quantize_rows(x, bits, 16))
        back = tk.dequantize_rows(rows, 80, bits, 16, torch.float32)[0]
        assert torch.equal(back[:32], x[0, :32])
        assert back[32:].isnan().all()


def test_strided_rows_and_empty() -> None:
    x = torch.randn(8, 96)
    assert torch.equal(tk.quantize_rows(x[::2, 16:80], 3, 32), tk.quantize_rows(x[::2, 16:80].contiguous(), 3, 32))
    rows = tk.quantize_rows(x, 4, 96)
    wide = torch.cat([rows, rows], 1)[:, 1 : 1 + rows.shape[1]]  # at an odd address
    assert torch.equal(
        tk.dequantize_rows(wide, 96, 4, 96, torch.float32), tk.dequantize_rows(wide.clone(), 96, 4, 96, torch.float32)
    )
    for quantize in (tk.quantize_rows, reference.quantize_rows):
        assert quantize(x[:0], 2, 32).shape == (0, 24 + 12)
    for dequantize in (tk.dequantize_rows, reference.dequantize_rows):
        assert dequantize(rows[:0], 96, 4, 96, torch.bfloat16).shape == (0, 96)


def test_threads_do_not_change_the_result() -> None:
    x = torch.randn(700, 256)

    def results() -> list[Tensor]:
        rows = tk.quantize_rows(x, 3, 128)
        return [rows, tk.dequantize_rows(rows, 256, 3, 128, torch.float32)]

    assert_same_by_threads(results)


def test_opcheck_and_compile() -> None:
    x = torch.randn(3, 32)
    rows = tk.quantize_rows(x, 4, 16)
    opcheck(torch.ops.tts_kernels.quantize_rows.default, (x, 4, 16))
    opcheck(torch.ops.tts_kernels.dequantize_rows.default, (rows, 32, 4, 16, torch.float16))
    both = lambda t: tk.dequantize_rows(tk.quantize_rows(t, 2, 32), 32, 2, 32, torch.float32) + 1  # noqa: E731
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


def test_bad_input_names_the_argument() -> None:
    x = torch.ones(2, 32)
    assert_names(TypeError, "x", tk.quantize_rows, x.double(), 4, 16)
    assert_names(ValueError, "x", tk.quantize_rows, torch.ones(32), 4, 16)
    assert_names(ValueError, "x", tk.quantize_rows, torch.ones(2, 24), 4, 8)
    for bits in (5, 4.0, True):
        assert_names(ValueError, "bits", tk.quantize_rows, x, bits, 16)
    assert_names(ValueError, "group_size", tk.quantize_rows, x, 4, 24)
    assert_names(ValueError, "group_size", tk.quantize_rows, torch.ones(1, 256), 4, 256)
    rows = tk.quantize_rows(x, 4, 16)
    assert_names(TypeError, "rows", tk.dequantize_rows, rows.char(), 32, 4, 16, torch.float32)
    assert_names(ValueError, "rows", tk.dequantize_rows, rows, 32, 3, 16, torch.float32)
    assert_names(ValueError, "width", tk.dequantize_rows, rows, 31, 4, 16, torch.float32)
    assert_names(TypeError, "dtype", tk.dequantize_rows, rows, 32, 4, 16, torch.float64)
