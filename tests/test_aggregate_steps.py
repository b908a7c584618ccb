from __future__ import annotations

import pytest
import torch
from rules import DTYPES, assert_names, assert_rule, assert_same_by_threads
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference
from tts_kernels.ops.aggregate_steps import HOW


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("lengths", [[], [0], [1], [3, 0, 1, 17], [40] * 9, [0, 5000, 0]])
def test_equals_the_definition(how: str, dtype: torch.dtype, lengths: list[int]) -> None:
    scores = torch.rand(sum(lengths)).to(dtype)
    indptr = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    out = tk.aggregate_steps(scores, indptr, how)
    exact = reference.aggregate_steps(scores.double(), indptr, how)
    assert out.dtype == torch.float32
    assert_rule(out, exact, reference.aggregate_steps(scores, indptr, how), slack=2e-7)


@pytest.mark.parametrize("how", HOW)
def test_an_empty_chain_scores_minus_infinity(how: str) -> None:
    assert tk.aggregate_steps(torch.tensor([0.5]), torch.tensor([0, 0, 1, 1]), how).tolist() == [
        -torch.inf,
        0.5,
        -torch.inf,
    ]


def test_nan_propagates_wherever_it_is() -> None:
    chains = torch.tensor([[torch.nan, 0.1, 0.9], [0.1, torch.nan, 0.9], [0.1, 0.9, torch.nan]])
    indptr = torch.tensor([0, 3, 6, 9])
    for how in HOW:
        nan = tk.aggregate_steps(chains.flatten(), indptr, how).isnan().tolist()
        assert nan == ([False, False, True] if how == "last" else [True] * 3), how


def test_products_keep_their_digits() -> None:
    """A product of 300 factors passes through values below the smallest float32 on its way."""
    scores = torch.cat([torch.full((150,), 0.5), torch.full((150,), 2.0)])
    assert tk.aggregate_steps(scores, torch.tensor([0, 300]), "prod").item() == 1.0


def test_strided_scores() -> None:
    scores = torch.rand(20)[::2]
    exact = reference.aggregate_steps(scores.double(), torch.tensor([0, 4, 10]), "mean")
    torch.testing.assert_close(tk.aggregate_steps(scores, torch.tensor([0, 4, 10]), "mean").double(), exact)


def test_threads_do_not_change_the_result() -> None:
    scores, indptr = torch.rand(60_000), torch.arange(0, 60_001, 5)
    assert_same_by_threads(tk.aggregate_steps, scores, indptr, "prod")


def test_opcheck_and_compile() -> None:
    args = (torch.rand(7), torch.tensor([0, 3, 7]), "mean")
    opcheck(torch.ops.tts_kernels.aggregate_steps.default, args)
    compiled = torch.compile(lambda s, i: tk.aggregate_steps(s, i, "min") + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args[:2]), tk.aggregate_steps(*args[:2], "min") + 1)


def test_bad_input_names_the_argument() -> None:
    scores, indptr = torch.rand(4), torch.tensor([0, 4])
    assert_names(TypeError, "scores", tk.aggregate_steps, scores.long(), indptr, "min")
    assert_names(ValueError, "scores", tk.aggregate_steps, scores[None], indptr, "min")
    assert_names(TypeError, "indptr", tk.aggregate_steps, scores, indptr.float(), "min")
    assert_names(ValueError, "indptr", tk.aggregate_steps, scores, torch.tensor([0, 3]), "min")
    assert_names(ValueError, "indptr", tk.aggregate_steps, scores, torch.tensor([1, 4]), "min")
    assert_names(ValueError, "indptr", tk.aggregate_steps, scores, torch.tensor([0, 3, 2, 4]), "min")
    assert_names(ValueError, "indptr", tk.aggregate_steps, scores, torch.tensor([], dtype=torch.int64), "min")
    assert_names(ValueError, "how", tk.aggregate_steps, scores, indptr, "median")
