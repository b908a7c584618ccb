from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import DTYPES, assert_names
from torch import Tensor
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels.ops.aggregate_steps import HOW


def one_row(width: int) -> tk.ScoreHead:
    return tk.ScoreHead.label_pair(torch.randn(width) / width**0.5, torch.randn(width) / width**0.5)


def hidden_layer(width: int) -> tk.ScoreHead:
    w1, w2 = torch.randn(50, width) / width**0.5, torch.randn(2, 50) / 7
    return tk.ScoreHead.mlp(w1, torch.randn(50), w2, torch.randn(2))


def identity() -> tk.ScoreHead:
    """Hidden states [T, 1] are the scores."""
    return tk.ScoreHead.scalar(torch.ones(1), activation="identity")


def problem(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Seven candidates with 0 to 3 new steps, in three groups, one of them empty."""
    return {
        "hidden": torch.randn(30, 64).to(dtype),
        "positions": torch.randint(0, 30, (10,)),
        "step_indptr": torch.tensor([0, 1, 1, 4, 5, 7, 9, 10]),
        "group_indptr": torch.tensor([0, 4, 4, 7], dtype=torch.int32),
        "prior": torch.rand(7),
        "prior_counts": torch.tensor([0, 0, 2, 5, 1, 0, 3]),
    }


def call(p: dict[str, Any], head: tk.ScoreHead, k: int | Tensor = 2, **options: Any) -> tk.ScoredPruned:
    rest = {name: p.get(name) for name in ("prior", "prior_counts")}
    return tk.score_and_prune(
        p["hidden"], p["positions"], p["step_indptr"], head, p["group_indptr"], k, **{**rest, **options}
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("make", [one_row, hidden_layer])
def test_equals_its_parts(make: Any, how: str, dtype: torch.dtype) -> None:
    """Without a prior it is step_scores, aggregate_steps and prune, to the bit."""
    p, head = problem(dtype), make(64)
    for keep_order in (False, True):
        out = call(p, head, how=how, keep_order=keep_order, prior=None, prior_counts=None)
        scores = tk.step_scores(p["hidden"], p["positions"], head)
        candidates = tk.aggregate_steps(scores, p["step_indptr"], how)
        pruned = tk.prune(candidates, p["group_indptr"], 2, keep_order=keep_order)
        assert torch.equal(out.step_scores, scores)
        assert torch.equal(out.candidate_scores, candidates)
        assert torch.equal(out.indices, pruned.indices)
        assert torch.equal(out.counts, pruned.counts)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("make", [one_row, hidden_layer])
def test_equals_the_definition_with_a_prior(make: Any, how: str) -> None:
    p, head = problem(), make(64)
    out = call(p, head, torch.tensor([1, 2, 3]), how=how)
    with tk.use_backend("reference"):
        exact = call(p, head, torch.tensor([1, 2, 3]), how=how)
    torch.testing.assert_close(out.candidate_scores, exact.candidate_scores)
    torch.testing.assert_close(out.step_scores, exact.step_scores)
    assert torch.equal(out.indices, exact.indices)
    assert torch.equal(out.counts, exact.counts)
    assert out.candidate_scores[1] == -torch.inf  # neither an earlier step nor a new one


@settings(max_examples=150, deadline=None)
@given(
    chain=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12),
    how=st.sampled_from(HOW),
    data=st.data(),
)
def test_a_chain_may_be_cut_anywhere(chain: list[float], how: str, data: st.DataObject) -> None:
    """Continuing an aggregate gives what the whole chain gives, up to the rounding of `prior` to float32."""
    cut = data.draw(st.integers(0, len(chain)))
    scores = torch.tensor(chain)
    prior = tk.aggregate_steps(scores[:cut], torch.tensor([0, cut]), how)
    out = tk.score_and_prune(
        scores[cut:, None],
        torch.arange(len(chain) - cut),
        torch.tensor([0, len(chain) - cut]),
        identity(),
        torch.tensor([0, 1]),
        1,
        how=how,
        prior=prior,
        prior_counts=torch.tensor([cut]),
    )
    whole = tk.aggregate_steps(scores, torch.tensor([0, len(chain)]), how)
    exact = how in ("last", "min", "max")
    magnitude = scores.abs().sum().item() if how in ("sum", "mean") else whole.abs().item()
    # The prior is rounded to float32, by up to half of the least number where it is that small, then multiplied.
    least = 1.5e-45 * (1 + scores[cut:].abs().double().prod().item())
    assert abs(out.candidate_scores.item() - whole.item()) <= (0 if exact else 3e-7 * magnitude + least)


@pytest.mark.parametrize("how", HOW)
def test_nan_in_a_prior(how: str) -> None:
    """It propagates, unless only the last score counts or there is no earlier step to have it from."""
    arguments = (torch.ones(3, 1), torch.arange(3), torch.arange(4), identity(), torch.tensor([0, 3]), 3)
    nan = {"prior": torch.full((3,), torch.nan), "prior_counts": torch.tensor([1, 0, 4])}
    out = tk.score_and_prune(*arguments, how=how, **nan)
    assert out.candidate_scores.isnan().tolist() == ([False] * 3 if how == "last" else [True, False, True])
    assert out.indices.tolist() == ([[0, 1, 2]] if how == "last" else [[1, 0, 2]])


def test_a_candidate_without_new_steps_keeps_its_prior() -> None:
    for how in HOW:
        out = tk.score_and_prune(
            torch.ones(1, 1),
            torch.tensor([], dtype=torch.int64),
            torch.tensor([0, 0, 0]),
            identity(),
            torch.tensor([0, 2]),
            1,
            how=how,
            prior=torch.tensor([0.3, 0.7]),
            prior_counts=torch.tensor([7, 0]),
        )
        assert torch.equal(out.candidate_scores, torch.tensor([0.3, -torch.inf])), how
        assert out.indices.tolist() == [[0]]


def test_nothing_at_all() -> None:
    none = torch.tensor([], dtype=torch.int64)
    out = tk.score_and_prune(torch.ones(0, 3), none, torch.tensor([0]), one_row(3), torch.tensor([0]), 2)
    assert [tuple(t.shape) for t in out] == [(0, 2), (0,), (0,), (0,)]


def test_threads_do_not_change_the_result() -> None:
    hidden, positions = torch.randn(500, 64).bfloat16(), torch.randint(0, 500, (400,))
    before = torch.get_num_threads()
    for head in (one_row(64), hidden_layer(64)):
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                arguments = (positions, torch.arange(0, 401, 4), head, torch.arange(0, 101, 10), 3)
                results.append(tk.score_and_prune(hidden, *arguments, how="mean"))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck_and_compile() -> None:
    p = problem()
    for head, k in ((one_row(64), None), (hidden_layer(64), torch.tensor([1, 2, 0]))):
        tensors = (p["hidden"], p["positions"], p["step_indptr"], *head.unpack(), p["group_indptr"], 2, k)
        opcheck(torch.ops.tts_kernels.score_and_prune.default, (*tensors, "mean", p["prior"], p["prior_counts"], False))

        def run(hidden: Tensor, positions: Tensor, head: tk.ScoreHead = head) -> tk.ScoredPruned:
            return call({**p, "hidden": hidden, "positions": positions}, head)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for got, expected in zip(compiled(p["hidden"], p["positions"]), run(p["hidden"], p["positions"]), strict=True):
            assert torch.equal(got, expected)


def test_bad_input_names_the_argument() -> None:
    p, head = problem(), one_row(64)

    def wrong(kind: type[Exception], name: str, value: Any, **options: Any) -> None:
        assert_names(kind, name, call, {**p, name: value}, head, **options)

    wrong(TypeError, "hidden", p["hidden"].double())
    wrong(ValueError, "hidden", p["hidden"][0])
    wrong(TypeError, "positions", p["positions"].float())
    wrong(IndexError, "positions", p["positions"] + 30)
    wrong(ValueError, "step_indptr", p["step_indptr"] + 1)
    wrong(ValueError, "step_indptr", torch.tensor([0, 3, 2, 10]))
    wrong(TypeError, "step_indptr", p["step_indptr"].float())
    wrong(ValueError, "group_indptr", torch.tensor([0, 8]))
    wrong(TypeError, "group_indptr", [0, 7])
    wrong(ValueError, "prior", torch.rand(6))
    wrong(TypeError, "prior", torch.rand(7).double())
    wrong(ValueError, "prior_counts", torch.tensor([0, 0, 2, 5, 1, 0, -3]))
    wrong(ValueError, "prior_counts", torch.tensor([1]))
    wrong(TypeError, "prior_counts", torch.rand(7))
    assert_names(ValueError, "prior_counts", call, {**p, "prior_counts": None}, head)
    assert_names(ValueError, "prior", call, {**p, "prior": None}, head)
    assert_names(ValueError, "how", call, p, head, how="median")
    assert_names(ValueError, "k", call, p, head, 0)
    assert_names(ValueError, "k", call, p, head, torch.tensor([1, 2]))
    assert_names(ValueError, "k", call, p, head, torch.tensor([1, 2, 9]), max_k=4)
    assert_names(ValueError, "max_k", call, p, head, torch.tensor([1, 2, 9]), max_k=-4)
    assert_names(ValueError, "head.weight", call, p, one_row(63))
    assert_names(TypeError, "head", call, p, "head")
