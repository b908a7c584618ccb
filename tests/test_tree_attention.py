"""tree_attention against branch-by-branch attention in float64, on plans cut at random by brute force."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest
import torch
from rules import (
    DTYPES,
    assert_names,
    assert_refuses_fp8,
    assert_rule,
    assert_same_by_threads,
    compilations,
    reading_fp8,
)
from torch import Tensor
from torch.library import opcheck
from trees import Plan, Tree, brute_plan, caches, dense_attention, grow, poison, with_short_branches

import tts_kernels as tk
from tts_kernels import reference


def star(page_size: int, branches: int = 9, prefix: int = 150) -> Tree:
    return grow(page_size, [-1] + [0] * branches, [prefix] + [7 * i % 41 + 1 for i in range(branches)])


def chain(page_size: int) -> Tree:
    """A caterpillar: at each of 16 nodes one branch ends and one goes on."""
    parents = [-1]
    for _ in range(16):
        parents += [len(parents) - 1] * 2
    return grow(page_size, parents, [11 * i % 37 + 1 for i in range(len(parents))])


def dvts(page_size: int) -> Tree:
    """Two problems; one of them a root prompt, three trunks, four tails each."""
    parents = [-1, 0, 0, 0] + [1 + i // 4 for i in range(12)] + [-1]
    return grow(page_size, parents, [70, 100, 33, 64] + [5 * i % 29 + 1 for i in range(12)] + [90])


def random_forest(page_size: int, seed: int) -> Tree:
    rng = random.Random(seed)
    parents = [-1, -1]
    parents += [rng.randrange(n) for n in range(2, 22)]
    return grow(page_size, parents, [rng.randint(1, 80) for _ in parents], seed)


def lone(page_size: int) -> Tree:
    return grow(page_size, [-1], [301])


TREES = {
    "star": star,
    "chain": chain,
    "dvts": dvts,
    "lone": lone,
    "random": lambda page_size: random_forest(page_size, 5),
    "empty": lambda page_size: Tree(page_size, [[], []], [0, 0], 1),
}


def here(options: dict[str, Any]) -> dict[str, Any]:
    """Sinks that were made when tests were collected, on the device of the tests."""
    return {name: value.to(torch.get_default_device()) if name == "sinks" else value for name, value in options.items()}


def assert_attends(
    tree: Tree,
    q_lens: list[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    *,
    poisoned: bool = False,
    seed: int = 0,
    **options: Any,
) -> None:
    """The tolerance rule for out and lse."""
    options = here(options)
    plan = brute_plan(tree, q_lens, *heads, head_dim, seed)
    k, v = caches(tree, heads[1], head_dim, dtype)
    if poisoned:
        k, v = poison(tree, k), poison(tree, v)
    q = torch.randn(sum(q_lens), heads[0], head_dim).to(dtype)
    out, lse = tk.tree_attention(q, k, v, plan, return_lse=True, **options)
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), tree, q_lens, **options)
    plain, plain_lse = dense_attention(q, k, v, tree, q_lens, **options)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_rule(out, exact, plain)
    assert_rule(lse, exact_lse, plain_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("name", TREES)
def test_one_row_a_branch(name: str, page_size: int, dtype: torch.dtype) -> None:
    tree = TREES[name](page_size)
    assert_attends(tree, [1] * len(tree.pages), (8, 2), 64, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 32, 64, 80, 96, 112, 128, 256, 300])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    assert_attends(star(16, branches=5), [1] * 5, (8, 2), head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (9, 3), (5, 1), (12, 2), (7, 7), (16, 1)])
def test_heads(heads: tuple[int, int], dtype: torch.dtype) -> None:
    tree = dvts(16)
    assert_attends(tree, [1] * len(tree.pages), heads, 64, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_mixed_numbers_of_rows(seed: int, group: int, dtype: torch.dtype) -> None:
    """0, 1 and many rows per branch, causal among them; branches that end inside pages that others go on to fill."""
    tree = with_short_branches(random_forest([1, 16, 64, 4][seed], seed), [0, 1, 20, 33])
    rng = random.Random(seed)
    q_lens = [min(n, rng.choice([0, 1, 3, 50])) or int(n == 0) for n in tree.kv_lens]
    assert_attends(tree, q_lens, (2 * group, 2), 48, dtype, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_prefill(dtype: torch.dtype) -> None:
    tree = grow(16, [-1, -1, -1], [130, 1, 67])
    assert_attends(tree, list(tree.kv_lens), (8, 4), 64, dtype)


SINKS = torch.tensor([0.0, 5.0, -5.0, 100.0, -torch.inf, 1.5, -1.5, 0.3])  # one per query head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 20},
        {"window": 1000},
        {"softcap": 0.5},
        {"softcap": 30.0, "scale": 0.3},
        {"scale": 0.0},
        {"scale": -0.1},
        {"window": 33, "softcap": 5.0},
        {"sinks": SINKS},
        {"sinks": SINKS, "window": 20, "softcap": 30.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("q_len", [1, 30])
def test_options(options: dict[str, Any], q_len: int, dtype: torch.dtype) -> None:
    tree = with_short_branches(star(16), [12, 77])
    assert_attends(tree, [min(n, q_len) for n in tree.kv_lens], (8, 2), 64, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_hidden_slots_may_hold_anything(page_size: int, group: int, dtype: torch.dtype) -> None:
    """NaN and infinities in every slot that no branch owns, and in those that only the longest branch owns."""
    tree = with_short_branches(star(page_size), [3, 40, 77, 100, 131, 149, 150])
    q_lens = [min(n, 3) for n in tree.kv_lens]
    assert_attends(tree, q_lens, (2 * group, 2), 64, dtype, poisoned=True)
    assert_attends(tree, q_lens, (2 * group, 2), 64, dtype, poisoned=True, window=9)

    plan = brute_plan(tree, q_lens, 2 * group, 2, 64)
    k, v = caches(tree, 2, 64, dtype)
    q = torch.randn(sum(q_lens), 2 * group, 64).to(dtype)
    before = tk.tree_attention(q, k, v, plan)
    last = tree.pages[0][(tree.kv_lens[0] - 1) // page_size]  # branch 0's newest token: no other branch has it
    offset = (tree.kv_lens[0] - 1) % page_size
    shared = tree.pages[0][148 // page_size]  # position 148: hidden from the branches of 3 to 131 tokens
    for cache in (k, v):
        cache[last, offset, :, ::2] = torch.nan
        cache[shared, 148 % page_size, :, 1::2] = torch.inf
    after = tk.tree_attention(q, k, v, plan)
    short = [b for b, n in enumerate(tree.kv_lens) if n <= 148]
    rows = [sum(q_lens[:b]) + j for b in short for j in range(q_lens[b])]
    assert len(rows) > 3
    assert torch.equal(after[rows], before[rows])
    assert not after[:3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_cut_for_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tts_kernels.plan._is_gpu", lambda _: True)
    monkeypatch.setattr("tts_kernels.plan._staged", lambda host, _: host)  # no GPU, no pinned memory
    tree = star(16, branches=40, prefix=1100)
    table = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in tree.pages], True)
    plan = tk.plan_attention(table, tree.kv_lens, page_size=16, num_q_heads=4, num_kv_heads=2, head_dim=64)
    k, v = caches(tree, 2, 64, dtype)
    q = torch.randn(40, 4, 64).to(dtype)
    out, lse = tk.tree_attention(q, k, v, plan, return_lse=True)
    assert plan.sizes[1] >= 6  # the trunk alone is cut in four, and the tails are many
    for result, exact, plain in zip(
        (out, lse),
        dense_attention(q.double(), k.double(), v.double(), tree, [1] * 40),
        dense_attention(q, k, v, tree, [1] * 40),
        strict=True,
    ):
        assert_rule(result, exact, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_visible_nan_shows_where_it_is_read(dtype: torch.dtype) -> None:
    tree = star(16)
    q_lens = [1] * len(tree.pages)
    plan = brute_plan(tree, q_lens, 8, 2, 64)
    k, v = caches(tree, 2, 64, dtype)
    own = tree.pages[4][-1]
    k[own, 0, 1, 5] = torch.nan
    v[tree.pages[0][2], 3, 0, 7] = torch.nan  # shared by all, one head, one element
    out, lse = tk.tree_attention(torch.randn(9, 8, 64).to(dtype), k, v, plan, return_lse=True)
    expected = torch.zeros(9, 8, 64, dtype=torch.bool)
    expected[4, 4:] = True
    expected[:, :4, 7] = True
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(lse.isnan(), expected.all(-1))


def by_matrix_products(q: Tensor, k_cache: Tensor, v_cache: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
    """One row for each branch, as torch's own attention computes it: the heads of a group in one product."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for b, (pages, length) in enumerate(zip(tree.pages, tree.kv_lens, strict=True)):
        k, v = (c[pages].flatten(0, 1)[:length].transpose(0, 1) for c in (k_cache, v_cache))
        scores = q[b].unflatten(0, (len(k), -1)) @ k.mT * q.shape[-1] ** -0.5
        out[b] = (scores.softmax(-1) @ v).flatten(0, 1)
        lse[b] = scores.logsumexp(-1).flatten(0, 1)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    """A score near 1200 has a last bit of 2**-13: the order in which its product is summed shows in the weights.

    `dense_attention` multiplies a single row, which torch sums in many parts and so more exactly than a matrix. The
    largest error of one draw is a matter of luck, theirs and ours, so the rule is applied to many.
    """
    tree = star(16)
    q_lens = [1] * len(tree.pages)
    plan = brute_plan(tree, q_lens, 8, 2, 64)
    k, v = caches(tree, 2, 64, dtype)
    found: list[list[Tensor]] = []
    for _ in range(20):
        q = (torch.randn(9, 8, 64) * 300).to(dtype)
        ours = tk.tree_attention(q, k, v, plan, return_lse=True)
        exact = dense_attention(q.double(), k.double(), v.double(), tree, q_lens)
        found.append([*ours, *exact, *by_matrix_products(q, k, v, tree)])
    out, lse, exact_out, exact_lse, plain_out, plain_lse = (torch.cat(draws) for draws in zip(*found, strict=True))
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert_rule(out, exact_out, plain_out)
    assert_rule(lse, exact_lse, plain_lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_weigh_the_same_however_large(dtype: torch.dtype) -> None:
    """Many blocks of keys of one score, 1152: what is taken off it must be alike in every block."""
    tree = grow(16, [-1], [2048])
    plan = brute_plan(tree, [1], 1, 1, 64)
    k, v = caches(tree, 1, 64, dtype)
    k.fill_(12)
    order = torch.tensor(tree.pages[0])
    v[order[:64]], v[order[64:]] = 1.0, 0.0
    out, lse = tk.tree_attention(torch.full((1, 1, 64), 12, dtype=dtype), k, v, plan, return_lse=True)
    torch.testing.assert_close(out.float(), torch.full((1, 1, 64), 0.5), rtol=1e-5, atol=0)
    torch.testing.assert_close(lse, torch.tensor([[1152 + math.log(2048)]]), rtol=1e-6, atol=0)


def test_rows_without_keys_are_empty() -> None:
    tree = Tree(16, [[], [0]], [0, 3], 1)
    plan = brute_plan(tree, [1, 1], 4, 2, 8)
    k, v = caches(tree, 2, 8, torch.float32)
    out, lse = tk.tree_attention(torch.randn(2, 4, 8), k, v, plan, return_lse=True)
    assert torch.equal(out[0], torch.zeros(4, 8))
    assert torch.equal(lse[0], torch.full((4,), -torch.inf))
    assert lse[1].isfinite().all()
    sinks = torch.tensor([-1.0, 0.0, 2.0, -torch.inf])
    out, lse = tk.tree_attention(torch.randn(2, 4, 8), k, v, plan, sinks=sinks, return_lse=True)
    assert torch.equal(out[0], torch.zeros(4, 8))
    assert torch.equal(lse[0], sinks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype: torch.dtype) -> None:
    """Caches as views of [layers, 2, Hkv, P, page_size, D + 8], q as a slice of a fused projection."""
    tree = dvts(16)
    q_lens = [1] * len(tree.pages)
    plan = brute_plan(tree, q_lens, 8, 2, 64)
    pool = torch.randn(2, 2, 2, tree.num_pages, 16, 72).to(dtype)
    k, v = (pool[1, i, ..., 4:68].permute(1, 2, 0, 3) for i in range(2))
    fused = torch.randn(len(q_lens), 12, 64).to(dtype)
    expected = tk.tree_attention(fused[:, :8].contiguous(), k.contiguous(), v.contiguous(), plan)
    assert torch.equal(tk.tree_attention(fused[:, :8], k, v, plan), expected)
    backwards = torch.randn(64, 8, len(q_lens)).to(dtype).permute(2, 1, 0)
    assert torch.equal(tk.tree_attention(backwards, k, v, plan), tk.tree_attention(backwards.contiguous(), k, v, plan))


def test_threads_do_not_change_the_result() -> None:
    tree = dvts(16)
    q_lens = [1] * len(tree.pages)
    for dtype in DTYPES:
        plan = brute_plan(tree, q_lens, 8, 2, 64)
        k, v = caches(tree, 2, 64, dtype)
        q = torch.randn(len(q_lens), 8, 64).to(dtype)
        assert_same_by_threads(tk.tree_attention, q, k, v, plan, return_lse=True)


def test_how_the_work_is_cut_hardly_changes_the_result() -> None:
    tree = random_forest(16, 3)
    q_lens = [1] * len(tree.pages)
    k, v = caches(tree, 2, 64, torch.float32)
    q = torch.randn(len(q_lens), 8, 64)
    whole = tk.tree_attention(q, k, v, brute_plan(tree, q_lens, 8, 2, 64, cuts=False))
    for seed in range(5):
        cut = tk.tree_attention(q, k, v, brute_plan(tree, q_lens, 8, 2, 64, seed))
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_reference_is_the_definition(dtype: torch.dtype) -> None:
    tree = with_short_branches(dvts(4), [0, 5, 30])
    q_lens = [min(n, 2) or 1 for n in tree.kv_lens]
    k, v = caches(tree, 2, 16, dtype)
    q = torch.randn(sum(q_lens), 4, 16).to(dtype)
    for window, softcap, sinks in ((0, 0.0, None), (9, 2.0, None), (0, 0.0, SINKS[:4])):
        args = operator_args(q, k, v, brute_plan(tree, q_lens, 4, 2, 16), softcap, window, sinks)
        out, lse = reference.tree_attention(*args)
        exact, exact_lse = dense_attention(
            q.double(), k.double(), v.double(), tree, q_lens, softcap=softcap, window=window or None, sinks=sinks
        )
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
        lse_tolerance = 1e-12 if dtype == torch.float64 else 2e-6  # scores are taken in float32 at least
        torch.testing.assert_close(lse.double(), exact_lse, rtol=lse_tolerance, atol=lse_tolerance)


def operator_args(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, softcap: float = 0.0, window: int = 0, sinks: Tensor | None = None
) -> tuple[Tensor | int | float | None, ...]:
    tensors = [getattr(plan, f.name) for f in dataclasses.fields(plan) if f.type == "Tensor"]
    return (q, k, v, *tensors, plan.page_size, plan.num_kv_heads, plan.max_slots, 0.25, softcap, window, sinks)


def test_opcheck_and_compile() -> None:
    tree = star(16)
    plan = brute_plan(tree, [1] * 9, 8, 2, 16)
    k, v = caches(tree, 2, 16, torch.float32)
    q = torch.randn(9, 8, 16)
    opcheck(torch.ops.tts_kernels.tree_attention.default, operator_args(q, k, v, plan))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = tk.tree_attention(q * 2, k, v, plan, window=70, return_lse=True)
        return out * lse[..., None]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


def test_compiles_seldom_as_branches_grow() -> None:
    forest = tk.KVForest(512, page_size=4)
    root = forest.add_root()
    forest.append([root], [40])
    branches = forest.fork([root] * 4)
    k, v = torch.randn(2, 512, 4, 2, 16)

    def calls() -> Any:
        for _ in range(12):
            forest.append(branches, [9] * 4)
            yield torch.randn(4, 4, 16), k, v, forest.plan(branches, num_q_heads=4, num_kv_heads=2, head_dim=16)

    assert compilations(lambda q, k, v, plan: tk.tree_attention(q, k, v, plan), calls()) <= 3


def test_reference_backend_agrees() -> None:
    tree = dvts(16)
    q_lens = [1] * len(tree.pages)
    plan = brute_plan(tree, q_lens, 4, 2, 32)
    k, v = caches(tree, 2, 32, torch.float32)
    q = torch.randn(len(q_lens), 4, 32)
    with tk.use_backend("reference"):
        expected = tk.tree_attention(q, k, v, plan, return_lse=True)
    torch.testing.assert_close(tk.tree_attention(q, k, v, plan, return_lse=True), expected)


def test_bad_input_names_the_argument() -> None:
    tree = star(16)
    plan = brute_plan(tree, [1] * 9, 8, 2, 16)
    k, v = caches(tree, 2, 16, torch.float32)
    q = torch.randn(9, 8, 16)
    attend = tk.tree_attention
    assert_names(TypeError, "q", attend, q.double(), k, v, plan)
    assert_names(TypeError, "k_cache", attend, q, k.half(), v, plan)
    assert_names(TypeError, "v_cache", attend, q, k, v.half(), plan)
    assert_names(ValueError, "q", attend, q[0], k, v, plan, scale=1.0)
    assert_names(ValueError, "q", attend, q[:8], k, v, plan)
    assert_names(ValueError, "q", attend, q[:, :7], k, v, plan)
    assert_names(ValueError, "q", attend, q[:, :6], k, v, plan)  # a multiple of the KV heads, not of the plan
    assert_names(ValueError, "q", attend, q[..., :8], k[..., :8], v[..., :8], plan)
    none = dataclasses.replace(plan, head_dim=0)
    assert_names(ValueError, "q", attend, q[..., :0], k[..., :0], v[..., :0], none, scale=1.0)
    assert_names(ValueError, "k_cache", attend, q, k[0], v, plan)
    assert_names(ValueError, "k_cache", attend, q, k[..., :8], v, plan)
    assert_names(ValueError, "k_cache", attend, q, k.transpose(2, 3).contiguous().transpose(2, 3), v, plan)
    assert_names(ValueError, "v_cache", attend, q, k, v[:-1], plan)
    assert_names(ValueError, "scale", attend, q, k, v, plan, scale=float("nan"))
    assert_names(TypeError, "scale", attend, q, k, v, plan, scale="1")
    assert_names(ValueError, "scale", attend, q, k, v, plan, scale=1e39)
    assert_names(ValueError, "scale", attend, q, k, v, plan, scale=10**400)
    assert_names(ValueError, "softcap", attend, q, k, v, plan, softcap=-1.0)
    assert_names(ValueError, "softcap", attend, q, k, v, plan, softcap=float("inf"))
    assert_names(ValueError, "window", attend, q, k, v, plan, window=0)
    assert_names(ValueError, "window", attend, q, k, v, plan, window=2**63)
    assert_names(TypeError, "window", attend, q, k, v, plan, window=1.5)
    assert_names(TypeError, "sinks", attend, q, k, v, plan, sinks=torch.zeros(8, dtype=torch.double))
    assert_names(ValueError, "sinks", attend, q, k, v, plan, sinks=torch.zeros(7))
    assert_names(ValueError, "sinks", attend, q, k, v, plan, sinks=torch.zeros(16)[::2])
    narrow = dataclasses.replace(plan, window=30)
    assert_names(ValueError, "window", attend, q, k, v, narrow)
    assert_names(ValueError, "window", attend, q, k, v, narrow, window=31)
    attend(q, k, v, narrow, window=30)


def spoiled(plan: Plan, field: str, index: Any, value: int) -> Plan:
    tensor = getattr(plan, field).clone()
    tensor[index] = value
    return dataclasses.replace(plan, **{field: tensor})


@pytest.mark.parametrize(
    ("kind", "field", "index", "value"),
    [
        (IndexError, "pages", 0, 10**6),
        (IndexError, "pages", 1, -1),
        (ValueError, "rows", 0, 9),
        (ValueError, "rows", 0, -1),
        (ValueError, "segments", (0, 0), -1),
        (ValueError, "segments", (0, 0), 2**31 - 1),
        (ValueError, "segments", (0, 1), -16),
        (ValueError, "segments", (0, 2), 2**31 - 1),
        (ValueError, "segments", (0, 2), 0),
        (ValueError, "segments", (0, 3), -1),
        (ValueError, "segments", (0, 4), 10),
        (ValueError, "segments", (0, 5), -2),
        (ValueError, "segments", (0, 5), 2**31 - 1),
        (ValueError, "tasks", (0, 0), -1),
        (ValueError, "tasks", (0, 1), 10**6),
        (ValueError, "tasks", (0, 2), 9),
        (ValueError, "tasks", (0, 3), 10),
        (ValueError, "tasks", (0, 4), -1),
        (ValueError, "tasks", (0, 4), 2**31 - 1),
        (ValueError, "merge_indptr", 0, 1),
        (ValueError, "merge_indptr", -1, 10**6),
        (ValueError, "merge_indptr", 4, -1),
        (IndexError, "merge_slots", 0, -1),
        (IndexError, "merge_slots", 0, 10**6),
        (ValueError, "sizes", 0, 10**6),
        (ValueError, "sizes", 1, 10**6),
        (ValueError, "sizes", 2, 10**6),
        (ValueError, "sizes", 3, 10**6),
        (ValueError, "sizes", 0, -1),
    ],
)
def test_a_broken_plan_is_refused(kind: type[Exception], field: str, index: Any, value: int) -> None:
    tree = star(16)
    plan = brute_plan(tree, [1] * 9, 8, 2, 16)
    k, v = caches(tree, 2, 16, torch.float32)
    q = torch.randn(9, 8, 16)
    assert_names(kind, f"plan.{field}", tk.tree_attention, q, k, v, spoiled(plan, field, index, value))


def test_any_plan_is_safe() -> None:
    """Random tables either run or are refused: nothing is read or written out of bounds."""
    tree = star(16)
    plan = brute_plan(tree, [1] * 9, 8, 2, 16)
    k, v = caches(tree, 2, 16, torch.float32)
    q = torch.randn(9, 8, 16)
    rng = random.Random(0)
    outcomes = set()
    for _ in range(300):
        bad = plan
        for _ in range(rng.randint(1, 3)):
            field = rng.choice(
                ["rows", "positions", "pages", "segments", "tasks", "merge_indptr", "merge_slots", "sizes"]
            )
            tensor = getattr(bad, field)
            index = tuple(rng.randrange(n) for n in tensor.shape)
            bad = spoiled(bad, field, index, rng.choice([rng.randint(-3, 12), -(2**31), 2**31 - 1]))
        try:
            tk.tree_attention(q, k, v, bad)
            outcomes.add("ran")
        except (ValueError, IndexError):
            outcomes.add("refused")
    assert outcomes == {"ran", "refused"}


# ---- quantised caches ----------------------------------------------------------------------------------------


def quantised_caches(
    stored: str, k: Tensor, v: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Codes of caches, what lies beside them, and the elements that they stand for, in float64 and in a dtype."""
    beside, codes, exact = {}, [], []
    for name, cache in (("k", k), ("v", v)):
        whole, scale, zero = reference.quantize_kv(cache, 8 if stored == "int8" else 4)
        beside[f"{name}_scale"] = scale
        if stored == "int4":
            beside[f"{name}_zero"] = zero
        codes.append(whole)
        exact.append(reference.dequantize_kv(whole, scale, beside.get(f"{name}_zero"), dtype=torch.float64))
    return (codes[0], codes[1]), beside, (exact[0], exact[1]), (exact[0].to(dtype), exact[1].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["int8", "int4"])
@pytest.mark.parametrize(
    ("name", "page_size", "heads", "head_dim", "options"),
    [
        ("star", 16, (8, 2), 64, {}),
        ("star", 1, (16, 1), 20, {"window": 33, "softcap": 5.0}),
        ("chain", 16, (9, 3), 64, {"sinks": torch.linspace(-2, 2, 9)}),
        ("dvts", 64, (6, 6), 2, {}),
        ("random", 4, (12, 2), 34, {"scale": -0.1}),
        ("lone", 16, (8, 2), 128, {"window": 20}),
        ("empty", 16, (2, 1), 8, {}),
    ],
)
@pytest.mark.parametrize("poisoned", [False, True])
def test_quantised_caches(
    name: str,
    page_size: int,
    heads: tuple[int, int],
    head_dim: int,
    options: dict[str, Any],
    stored: str,
    dtype: torch.dtype,
    poisoned: bool,
) -> None:
    """The tolerance rule against the elements that the codes stand for; slots that no row sees are NaN."""
    tree = TREES[name](page_size)
    rng = random.Random(head_dim)
    q_lens = [min(n, rng.choice([1, 1, 3, 20])) or int(n == 0) for n in tree.kv_lens]
    plan = brute_plan(tree, q_lens, *heads, head_dim)
    k, v = caches(tree, heads[1], head_dim, torch.float32)
    if poisoned:
        k, v = poison(tree, k), poison(tree, v)
    codes, beside, exact, plain = quantised_caches(stored, k, v, dtype)
    q = torch.randn(sum(q_lens), heads[0], head_dim).to(dtype)
    options = here(options)
    out, lse = tk.tree_attention(q, *codes, plan, return_lse=True, **options, **beside)
    exact_out, exact_lse = dense_attention(q.double(), *exact, tree, q_lens, **options)
    plain_out, plain_lse = dense_attention(q, *plain, tree, q_lens, **options)
    assert out.dtype == dtype
    assert_rule(out, exact_out, plain_out)
    assert_rule(lse, exact_lse, plain_lse)


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_the_definition_for_quantised_caches(stored: str) -> None:
    tree = dvts(16)
    q_lens = [2] * len(tree.pages)
    plan = brute_plan(tree, q_lens, 6, 2, 48)
    codes, beside, exact, _ = quantised_caches(stored, *caches(tree, 2, 48, torch.float32), torch.float32)
    q = torch.randn(sum(q_lens), 6, 48)
    with tk.use_backend("reference"):
        out, lse = tk.tree_attention(q, *codes, plan, return_lse=True, **beside)
    expected, expected_lse = dense_attention(q.double(), *exact, tree, q_lens)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_quantised_caches_attend_as_a_plain_cache_of_their_elements(stored: str, dtype: torch.dtype) -> None:
    """To the bit: rows of q's type are what is multiplied, however they are stored, strided too."""
    tree = dvts(16)
    q_lens = [1] * len(tree.pages)
    plan = brute_plan(tree, q_lens, 6, 2, 48)
    codes, beside, _, plain = quantised_caches(stored, *caches(tree, 2, 48, torch.float32), dtype)
    q = torch.randn(len(q_lens), 6, 48).to(dtype)
    expected = tk.tree_attention(q, *plain, plan)
    assert torch.equal(tk.tree_attention(q, *codes, plan, **beside), expected)
    strided = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in codes]
    assert torch.equal(tk.tree_attention(q, strided[0], strided[1], plan, **beside), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "stored"), [(7, "int8"), *itertools.product([8, 40, 72, 96, 112, 128, 256, 300], ["int8", "int4"])]
)
def test_quantised_caches_of_any_head_size(head_dim: int, stored: str, dtype: torch.dtype) -> None:
    """To the bit as a plain cache: few rows and many, and scales of an odd number of heads, at odd places too."""
    for branches in (3, 30):
        tree = star(16, branches, prefix=100)
        q_lens = [1] * branches
        plan = brute_plan(tree, q_lens, 9, 3, head_dim)
        k, v = (poison(tree, c) for c in caches(tree, 3, head_dim, torch.float32))
        codes, beside, _, plain = quantised_caches(stored, k, v, dtype)
        q = torch.randn(branches, 9, head_dim).to(dtype)
        expected = tk.tree_attention(q, *plain, plan)
        assert expected.isfinite().all()
        assert torch.equal(tk.tree_attention(q, *codes, plan, **beside), expected)
        moved = {name: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t) for name, t in beside.items()}
        assert torch.equal(tk.tree_attention(q, *codes, plan, **moved), expected)


def test_non_finite_heads_of_quantised_caches() -> None:
    """A head that was NaN when it was written makes NaN of the rows that see it, and of no others."""
    tree = star(16, branches=12, prefix=64)
    plan = brute_plan(tree, [1] * 12, 4, 2, 16)
    k, v = caches(tree, 2, 16, torch.float32)
    page = tree.pages[3][-1]
    v[page, 0, 1, 5] = torch.inf
    codes, beside, _, _ = quantised_caches("int8", k, v, torch.float32)
    out = tk.tree_attention(torch.randn(12, 4, 16), *codes, plan, **beside)
    assert out[3, 2:].isnan().all()
    out[3, 2:] = 0.0
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0x7E00, 0x7FFF, -1])
@pytest.mark.parametrize(("stored", "number"), [("int8", "v_scale"), ("int4", "v_scale"), ("int4", "v_zero")])
def test_any_nan_beside_quantised_caches(stored: str, number: str, bits: int, dtype: torch.dtype) -> None:
    """Rounding must not carry a NaN's bits into its exponent."""
    tree = star(16, branches=2, prefix=20)
    plan = brute_plan(tree, [1] * 2, 4, 2, 64)
    codes, beside, _, _ = quantised_caches(stored, *caches(tree, 2, 64, torch.float32), dtype)
    beside[number][tree.pages[0][-1], 0, 1] = torch.tensor(bits, dtype=torch.int16).view(torch.float16)
    out = tk.tree_attention(torch.randn(2, 4, 64).to(dtype), *codes, plan, **beside)
    assert out[0, 2:].isnan().all()
    assert out[0, :2].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_opcheck_and_bad_input_of_quantised_caches(stored: str) -> None:
    tree = star(16, branches=3)
    plan = brute_plan(tree, [1] * 3, 4, 2, 16)
    codes, beside, _, _ = quantised_caches(stored, *caches(tree, 2, 16, torch.float32), torch.float32)
    q = torch.randn(3, 4, 16)
    tables = [getattr(plan, n) for n in ("rows", "positions", "pages", "segments", "tasks", "merge_indptr")]
    args = (q, *codes, *tables, plan.merge_slots, plan.sizes, 16, 2, plan.max_slots, 0.25, 0.0, 0, None)
    opcheck(torch.ops.tts_kernels.tree_attention.default, args, beside)
    attend = tk.tree_attention
    assert_names(TypeError, "k_scale", attend, q, *codes, plan)
    assert_names(TypeError, "v_scale", attend, q, *codes, plan, **{**beside, "v_scale": None})
    assert_names(ValueError, "v_scale", attend, q, *codes, plan, **{**beside, "v_scale": beside["v_scale"][:, 1:]})
    assert_names(ValueError, "k_cache", attend, q, codes[0][..., 1:].contiguous(), codes[1], plan, **beside)
    assert_names(TypeError, "v_cache", attend, q, codes[0], codes[1].float(), plan, **beside)
    plain = caches(tree, 2, 16, torch.float32)
    assert_names(TypeError, "k_scale", attend, q, *plain, plan, **beside)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_fp8_cache_attends_as_a_plain_cache_of_its_elements(dtype: torch.dtype) -> None:
    """To the bit, strided too; bytes that no row sees are NaN."""
    tree = dvts(16)
    q_lens = [1] * len(tree.pages)
    plan = brute_plan(tree, q_lens, 6, 2, 20)
    stored = [poison(tree, cache).to(torch.float8_e4m3fn) for cache in caches(tree, 2, 20, torch.float32)]
    plain = [cache.to(dtype) for cache in stored]
    q = torch.randn(len(q_lens), 6, 20).to(dtype)
    with reading_fp8("tree_attention"):
        expected = tk.tree_attention(q, plain[0], plain[1], plan)
        assert torch.equal(tk.tree_attention(q, stored[0], stored[1], plan), expected)
        heads_first = [c.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(c.dtype) for c in stored]
        assert torch.equal(tk.tree_attention(q, heads_first[0], heads_first[1], plan), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [7, 8, 40, 64, 72, 96, 112, 128, 256, 300])
def test_an_fp8_cache_of_any_head_size(head_dim: int, dtype: torch.dtype) -> None:
    """To the bit as a plain cache: every byte there is, few rows and many, and heads that lie at odd places."""
    for branches in (3, 30):
        tree = star(16, branches, prefix=100)
        q_lens = [1] * branches
        plan = brute_plan(tree, q_lens, 9, 3, head_dim)
        shape = (tree.num_pages, 16, 3, head_dim)
        codes = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
        codes[codes % 128 == 127] = 0  # NaN
        stored = [poison(tree, cache.float()).to(torch.float8_e4m3fn) for cache in codes.view(torch.float8_e4m3fn)]
        plain = [cache.to(dtype) for cache in stored]
        q = torch.randn(branches, 9, head_dim).to(dtype) / 100
        with reading_fp8("tree_attention"):
            expected = tk.tree_attention(q, plain[0], plain[1], plan)
            assert expected.isfinite().all()
            assert torch.equal(tk.tree_attention(q, stored[0], stored[1], plan), expected)
            moved = [torch.cat([c.view(torch.uint8).flatten()[:1], c.view(torch.uint8).flatten()])[1:] for c in stored]
            odd = [c.view(torch.float8_e4m3fn).view(shape) for c in moved]
            assert torch.equal(tk.tree_attention(q, odd[0], odd[1], plan), expected)


@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_of_an_fp8_cache(dtype: torch.dtype, head_dim: int) -> None:
    """It makes NaN of the rows that see it, and of no others."""
    tree = star(16, branches=12, prefix=64)
    plan = brute_plan(tree, [1] * 12, 4, 2, head_dim)
    k, v = (cache.to(torch.float8_e4m3fn) for cache in caches(tree, 2, head_dim, torch.float32))
    v.view(torch.uint8)[tree.pages[3][-1], 0, 1, 5] = 0xFF
    with reading_fp8("tree_attention"):
        out = tk.tree_attention(torch.randn(12, 4, head_dim).to(dtype), k, v, plan)
    assert out[3, 2:, 5].isnan().all()
    out[3, 2:, 5] = 0.0
    assert out.isfinite().all()


def test_an_fp8_cache_is_refused_on_a_cpu() -> None:
    with torch.device("cpu"):
        tree = star(16, branches=3)
        plan = brute_plan(tree, [1] * 3, 4, 2, 16)
        k, v = (cache.to(torch.float8_e4m3fn) for cache in caches(tree, 2, 16, torch.float32))
        assert_refuses_fp8(tk.tree_attention, torch.randn(3, 4, 16), k, v, plan)
