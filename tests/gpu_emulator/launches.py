"""Properties of launches: how many an operator needs, and that they end. Run by test_operators.py in the emulator."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import pytest
import torch

import tts_kernels as tk
from tts_kernels.ops.linear import linear_op

from .library import ROOT, Library

sys.path.append(str(ROOT / "benchmarks"))
gpu_model, gpu_static = map(importlib.import_module, ("gpu_model", "gpu_static"))

ONE_ROW = tk.ScoreHead.scalar(torch.ones(8))
HIDDEN_LAYER = tk.ScoreHead.mlp(torch.ones(3, 8), None, torch.rand(2, 3), None)


@pytest.mark.parametrize(("head", "launches"), [(ONE_ROW, 1), (HIDDEN_LAYER, 2)])
def test_a_round_of_search(emulated: Library, head: tk.ScoreHead, launches: int) -> None:
    offsets, groups = torch.arange(6), torch.tensor([0, 2, 2, 5])
    tk.score_and_prune(torch.rand(9, 8), torch.arange(5), offsets, head, groups, 2)
    assert len(emulated.launches) == launches


@pytest.mark.parametrize(("head", "launches"), [(ONE_ROW, 1), (HIDDEN_LAYER, 2)])
def test_step_scores(emulated: Library, head: tk.ScoreHead, launches: int) -> None:
    tk.step_scores(torch.rand(9, 8), torch.arange(5), head)
    assert len(emulated.launches) == launches


def test_linear_logprob_reads_the_weight_by_chunks_and_merges_them(emulated: Library) -> None:
    tk.linear_logprob(torch.rand(20, 8), torch.rand(600, 8), torch.arange(20))
    assert [launch.grid[0] for launch in emulated.launches] == [3, 5]


def test_nothing_to_do_is_no_launch(emulated: Library) -> None:
    tk.step_scores(torch.rand(9, 8), torch.arange(0), ONE_ROW)
    tk.linear_logprob(torch.rand(0, 8), torch.rand(600, 8), torch.arange(0))
    assert emulated.launches == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", torch.nan), ("temperature", -1.0), ("top_p", torch.nan), ("top_p", -1.0), ("top_p", 2.0),
     ("min_p", torch.nan), ("min_p", 2.0), ("top_k", -1)],
)  # fmt: skip
def test_options_that_nobody_has_checked_end_in_some_token(option: str, value: float) -> None:
    logits, rows = torch.randn(2, 1025), torch.arange(2)
    logits[1, 7] = torch.inf
    with tk.debug_checks(False):
        tokens, _ = tk.sample(logits, seeds=rows, offsets=rows, **{option: torch.tensor([value, value])})
    assert ((tokens >= -1) & (tokens < 1025)).all()


# ---- benchmarks/gpu_model.py: the launches that it counts are those that are made ----


def half(*shape: int) -> torch.Tensor:
    return torch.rand(shape).bfloat16()


def attend(branches: int, stored: str | None = None) -> Any:
    forest = tk.KVForest(64)
    root = forest.add_root()
    forest.append([root], [40])
    leaves = forest.fork([root] * branches)
    forest.append(leaves, [5] * branches)
    plan = forest.plan(leaves, num_q_heads=4, num_kv_heads=2, head_dim=64)
    cache = tk.KVCache(1, 64, 2, 64, dtype=stored or torch.bfloat16)
    tk.tree_attention(half(branches, 4, 64), cache.k[0], cache.v[0], plan, **cache.beside(0))
    tasks = [
        gpu_model.Task(end - begin, [1]) for _, _, begin, end, _ in plan.tasks.tolist()
    ]  # all that there is room for
    head_bytes = 66 if stored == "int8" else 0
    return gpu_model.tree_attention(tasks, plan.max_slots, branches, 4, 2, 64, 40 + 5 * branches, head_bytes)


def hidden_layer() -> Any:
    tk.step_scores(half(9, 64), torch.arange(5), tk.ScoreHead.mlp(half(300, 64), None, torch.rand(2, 300), None))
    return gpu_model.hidden_layer(5, 64, 300)


def copy_pages() -> Any:
    caches = [half(6, 16, 2, 64) for _ in range(3)]
    tk.copy_pages_(caches, torch.tensor([0, 1]), torch.tensor([4, 5]))
    return gpu_model.copy_pages(2, 3, 16 * 2 * 64 * 2)


def append_kv() -> Any:
    tk.append_kv_(half(6, 16, 2, 64), half(6, 16, 2, 64), half(7, 2, 64), half(7, 2, 64), torch.arange(7))
    return gpu_model.append_kv(7, 2, 64)


def rope_append() -> Any:
    cache = tk.KVCache(1, 6, 2, 64, dtype=torch.bfloat16)
    args = (half(7, 8 * 64), cache.k[0], cache.v[0], torch.arange(7), torch.rand(9, 64), torch.arange(7))
    tk.rope_append_(*args, num_q_heads=4, num_kv_heads=2)
    return gpu_model.rope_append(7, 4, 2, 64)


def merge_states() -> Any:
    tk.merge_states(half(3, 5, 64), torch.rand(3, 5), half(3, 5, 64), torch.rand(3, 5))
    return gpu_model.merge_states(3, 5, 64)


def linear_logprob(rows: int) -> Any:
    tk.linear_logprob(half(rows, 64), half(600, 64), torch.zeros(rows, dtype=torch.int64))
    return gpu_model.linear_logprob(rows, 64, 600)


def linear(rows: int, bits: int = 16) -> Any:
    with tk.debug_checks(False):
        if bits == 16:
            linear_op(half(rows, 1032), half(130, 1032), 1032, 130, None, None)
        else:
            tk.linear(half(rows, 1032), tk.pack_linear(half(130, 1032), quantize="int8" if bits == 8 else "int4"))
    return gpu_model.linear(rows, 1032, 130, bits)


def score_and_prune() -> Any:
    steps, groups = torch.arange(7), torch.tensor([0, 2, 6])
    tk.score_and_prune(half(9, 64), torch.arange(6), steps, tk.ScoreHead.scalar(torch.ones(64)), groups, 2)
    return gpu_model.score_and_prune(6, 64, 2, 2)


def step_scores() -> Any:
    tk.step_scores(half(9, 64), torch.arange(5), tk.ScoreHead.scalar(torch.ones(64)))
    return gpu_model.step_scores(5, 64)


def aggregate_steps() -> Any:
    tk.aggregate_steps(torch.rand(600), torch.arange(0, 601, 3), "min")
    return gpu_model.aggregate_steps(600, 200)


def prune() -> Any:
    tk.prune(torch.rand(12), torch.arange(0, 13, 4), 2)
    return gpu_model.prune(3, 4, 2)


def sample(vocabulary: int) -> Any:
    tk.sample(torch.rand(3, vocabulary), seeds=torch.arange(3), offsets=torch.arange(3), top_p=0.9)
    return gpu_model.sample(3, vocabulary, True)


CALLS = [
    hidden_layer,
    copy_pages,
    append_kv,
    rope_append,
    merge_states,
    score_and_prune,
    step_scores,
    aggregate_steps,
    prune,
]
CALLS += [
    lambda: attend(3),
    lambda: attend(40),
    lambda: attend(40, "int8"),
    lambda: sample(100),
    lambda: sample(20_000),
]
CALLS += [lambda: linear_logprob(5), lambda: linear_logprob(70)]
CALLS += [lambda: linear(5), lambda: linear(20), lambda: linear(5, 4), lambda: linear(70, 8)]


@pytest.mark.parametrize("call", CALLS)
def test_the_cost_model_counts_the_launches_that_are_made(emulated: Library, call: Any) -> None:
    counted = call()
    assert [launch.grid[0] for launch in emulated.launches] == [launch.grid(108) for launch in counted]
    for made, launch in zip(emulated.launches, counted, strict=True):
        name = gpu_static.demangle(made.kernel)
        assert re.search(launch.kernel, name)
        assert made.shared == next((n for form, n in gpu_static.DYNAMIC_SHARED.items() if re.search(form, name)), 0)
