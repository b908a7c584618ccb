from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import DTYPES, assert_names
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference

SPECIAL = torch.tensor(
    [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 1e-45, -1e-45, 3.4e38]
).tolist()  # as float32 has them


def indptr_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


def model(scores: list[float], k: int, keep_order: bool) -> list[int]:
    """Sorted by Python: NaN last, then by score, then by index (-0.0 == 0.0 in Python too)."""
    order = sorted(
        range(len(scores)), key=lambda i: (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i], i)
    )
    return sorted(order[:k]) if keep_order else order[:k]


def assert_pruned(out: tk.Pruned, groups: list[list[float]], ks: list[int], width: int, keep_order: bool) -> None:
    start, rows = 0, []
    for group, k in zip(groups, ks, strict=True):
        kept = [start + i for i in model(group, k, keep_order)]
        rows.append(kept + [-1] * (width - len(kept)))
        start += len(group)
    assert out.indices.dtype == torch.int64
    assert out.counts.dtype == torch.int32
    assert out.indices.shape == (len(groups), width)
    assert out.indices.tolist() == rows
    assert out.counts.tolist() == [min(len(g), k) for g, k in zip(groups, ks, strict=True)]


scores_strategy = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.integers(0, 3).map(float))
groups_strategy = st.lists(st.lists(scores_strategy, max_size=150), max_size=6)


@settings(max_examples=200, deadline=None)
@given(groups=groups_strategy, k=st.integers(1, 40), keep_order=st.booleans())
def test_against_a_sort(groups: list[list[float]], k: int, keep_order: bool) -> None:
    scores = torch.tensor([s for g in groups for s in g])
    out = tk.prune(scores, indptr_of([len(g) for g in groups]), k, keep_order=keep_order)
    assert_pruned(out, groups, [k] * len(groups), k, keep_order)


@settings(max_examples=100, deadline=None)
@given(groups=groups_strategy, data=st.data(), keep_order=st.booleans(), extra=st.integers(0, 3))
def test_a_k_for_each_group(groups: list[list[float]], data: st.DataObject, keep_order: bool, extra: int) -> None:
    ks = data.draw(st.lists(st.integers(0, 30), min_size=len(groups), max_size=len(groups)))
    scores, indptr = torch.tensor([s for g in groups for s in g]), indptr_of([len(g) for g in groups])
    width = max(ks, default=0)
    out = tk.prune(scores, indptr, torch.tensor(ks, dtype=torch.int32), keep_order=keep_order)
    assert_pruned(out, groups, ks, width, keep_order)
    out = tk.prune(scores, indptr, torch.tensor(ks, dtype=torch.int64), max_k=width + extra, keep_order=keep_order)
    assert_pruned(out, groups, ks, width + extra, keep_order)


# Every way through the kernel: a group within four vectors, beyond them, k up to 16 and above, all of a group.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[64] * 5, [1, 2, 3, 0, 63, 65, 200], [4096, 17, 5000]])
@pytest.mark.parametrize("k", [1, 4, 16, 17, 100, 6000])
@pytest.mark.parametrize("ties", [False, True])
def test_sizes(lengths: list[int], k: int, dtype: torch.dtype, ties: bool) -> None:
    scores = torch.randn(sum(lengths)).to(dtype)
    scores = scores.round() if ties else scores
    for keep_order in (False, True):
        out = tk.prune(scores, indptr_of(lengths), k, keep_order=keep_order)
        indices, counts = reference.prune(scores.double(), indptr_of(lengths), k, None, keep_order)
        assert torch.equal(out.indices, indices)
        assert torch.equal(out.counts, counts)


def test_saturated_scores_keep_the_first() -> None:
    out = tk.prune(torch.ones(10_000), torch.tensor([0, 5000, 10_000]), 3)
    assert out.indices.tolist() == [[0, 1, 2], [5000, 5001, 5002]]


def test_nothing_kept_of_a_group_of_the_best() -> None:
    scores = torch.full((400,), torch.inf)
    out = tk.prune(scores, torch.tensor([0, 200, 400]), torch.tensor([0, 2]))
    assert out.indices.tolist() == [[-1, -1], [200, 201]]
    assert out.counts.tolist() == [0, 2]


@pytest.mark.parametrize("finite", [0, 1, 5])
def test_groups_of_nan_and_minus_infinity(finite: int) -> None:
    """Fewer scores than k are finite, in a group that is longer than the kernel's blocks."""
    scores = torch.full((300,), torch.nan)
    scores[250:260] = -torch.inf
    scores[100 : 100 + finite] = torch.arange(finite) - 9.0
    expected = model(scores.tolist(), 13, keep_order=False)
    assert tk.prune(scores, torch.tensor([0, 300]), 13).indices[0].tolist() == expected


def test_result_unpacks() -> None:
    indices, counts = tk.prune(torch.tensor([0.5, 0.75]), torch.tensor([0, 2]), 1)
    assert indices.tolist() == [[1]]
    assert counts.tolist() == [1]


def test_strided_scores() -> None:
    scores = torch.randn(40)[::2]
    assert torch.equal(tk.prune(scores, torch.tensor([0, 20]), 5).indices[0], scores.topk(5).indices)


def test_threads_do_not_change_the_result() -> None:
    scores, indptr = torch.randn(200_000).half(), torch.arange(0, 200_001, 500)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tk.prune(scores, indptr, 20).indices)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck_and_compile() -> None:
    scores, indptr, k = torch.randn(9), torch.tensor([0, 4, 9]), torch.tensor([1, 3])
    op = torch.ops.tts_kernels.prune.default
    opcheck(op, (scores, indptr, 2, None, False))
    opcheck(op, (scores, indptr, 3, k, True))
    compiled = torch.compile(lambda *a: tk.prune(*a, max_k=3), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, indptr, k).indices, tk.prune(scores, indptr, k).indices)
    assert torch.equal(compiled(scores, indptr, 3).indices, tk.prune(scores, indptr, 3).indices)


def test_bad_input_names_the_argument() -> None:
    scores, indptr = torch.randn(6), torch.tensor([0, 2, 6])
    assert_names(TypeError, "scores", tk.prune, scores.double(), indptr, 1)
    assert_names(ValueError, "scores", tk.prune, scores[None], indptr, 1)
    assert_names(TypeError, "indptr", tk.prune, scores, [0, 6], 1)
    assert_names(ValueError, "indptr", tk.prune, scores, indptr[None], 1)
    assert_names(ValueError, "indptr", tk.prune, scores, torch.tensor([0, 7]), 1)
    assert_names(ValueError, "indptr", tk.prune, scores, torch.tensor([0, 4, 2, 6]), 1)
    for wrong in (0, -1):
        assert_names(ValueError, "k", tk.prune, scores, indptr, wrong)
    for odd in (1.0, True, "1"):
        assert_names(TypeError, "k", tk.prune, scores, indptr, odd)
    assert_names(TypeError, "k", tk.prune, scores, indptr, torch.tensor([1.0, 2.0]))
    assert_names(ValueError, "k", tk.prune, scores, indptr, torch.tensor([1, 2, 3]))
    assert_names(ValueError, "k", tk.prune, scores, indptr, torch.tensor(1))
    assert_names(ValueError, "k", tk.prune, scores, indptr, torch.tensor([1, -1]))
    assert_names(ValueError, "k", tk.prune, scores, indptr, torch.tensor([1, 4]), max_k=3)
    assert_names(ValueError, "max_k", tk.prune, scores, indptr, torch.tensor([1, 1]), max_k=-1)
    assert_names(TypeError, "max_k", tk.prune, scores, indptr, torch.tensor([1, 1]), max_k=1.5)
    assert_names(ValueError, "max_k", tk.prune, scores, indptr, 4, max_k=3)


def test_a_tensor_k_needs_max_k_under_compile() -> None:
    compiled = torch.compile(lambda *a: tk.prune(*a), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="max_k: expected an int with a tensor k"):
        compiled(torch.randn(6), torch.tensor([0, 2, 6]), torch.tensor([1, 1]))
