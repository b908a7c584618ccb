"""Triton kernels without a GPU: each op's own tests in the interpreter, and every kernel compiled ahead of time."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tts_kernels as tk
from tts_kernels import triton as backend

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: these tests start their own process", allow_module_level=True)

from trees import brute_plan, grow
from triton_backend import ahead_of_time as aot

OPS = ["step_scores", "aggregate_steps", "prune", "score_and_prune", "append_kv", "copy_pages", "tree_attention",
       "merge_states", "linear", "linear_logprob", "sample", "rms_norm", "rope_append", "swiglu",
       "quantize_rows"]  # fmt: skip
HERE = Path(__file__).parent
OTHER_TESTS = {
    # Of linear a GPU has whole numbers alone, and dequantises them; floats are torch's.
    "linear": ["gpu_emulator/linear.py", "-k", "whole_numbers or zero_points or spoils"],
    "block_cache": ["models/test_block_cache_on_triton.py"],
    # Two operators of Triton's, one after the other; a wide head takes minutes.
    "restore_kv": ["test_restore_kv.py", "-k", "company or finite or strided or bad_input"],
    # Hundreds of cases, seconds each.
    "tree_attention": ["test_tree_attention.py", "-k", "not quantised and not fp8"],
    "tree_attention over codes": ["test_tree_attention.py", "-k", "quantised or fp8"],
}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("op", [*OPS, *(name for name in OTHER_TESTS if name not in OPS)])
def test_the_tests_of_the_op_pass_in_the_interpreter(op: str) -> None:
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    test, *options = OTHER_TESTS.get(op, [f"test_{op}.py"])
    command = [sys.executable, "-m", "pytest", "-p", "triton_backend.plugin", "-p", "no:cacheprovider", "--timeout=600"]
    done = subprocess.run(
        [*command, str(HERE / test), *options], env=env, capture_output=True, text=True, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is None or int(passed[1]) >= 5


def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets CPU tensors reach the Triton functions."""
    monkeypatch.setattr(backend, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(backend, "missing", lambda: "")


def call_all(dtype: torch.dtype) -> None:
    """Every op once or more, by each way through its kernels."""
    hidden, positions = torch.randn(40, 64).to(dtype), torch.arange(20)
    pair = tk.ScoreHead.label_pair(torch.randn(64), torch.randn(64))
    mlp = tk.ScoreHead.mlp(torch.randn(70, 64).to(dtype), torch.randn(70).to(dtype), torch.randn(2, 70), None)
    indptr, groups, prior = torch.arange(0, 21, 2), torch.tensor([0, 4, 10]), torch.rand(10)
    for head in (pair, mlp, pair.with_norm(torch.rand(64), 1e-5), mlp.with_norm(torch.rand(64), 1e-5)):
        tk.step_scores(hidden, positions, head)
        for how in ("last", "min", "mean", "prod"):
            counts = torch.arange(10)
            tk.score_and_prune(hidden, positions, indptr, head, groups, 2, how=how, prior=prior, prior_counts=counts)
    for how in ("last", "min", "prod", "mean", "max", "sum"):
        tk.aggregate_steps(torch.rand(20).to(dtype), indptr, how)
    for keep_order in (False, True):
        tk.prune(torch.rand(20).to(dtype), groups * 2, 3, keep_order=keep_order)
        tk.prune(torch.rand(20).to(dtype), groups * 2, torch.tensor([1, 2]), keep_order=keep_order)
    for rows in (5, 70):
        args = (torch.randn(rows, 96).to(dtype), torch.randn(1000, 96).to(dtype), torch.zeros(rows, dtype=torch.int64))
        tk.linear_logprob(*args, temperature=0.7)
        for quantize in ("int8", "int4"):
            tk.linear(args[0], tk.pack_linear(args[1], quantize=quantize, group_size=32), args[1][:, 0].contiguous())
    seeds, some = torch.arange(3), {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7}
    for options in (some, {name: torch.tensor([value] * 3) for name, value in some.items()}):
        tk.sample(torch.randn(3, 50000).to(dtype), seeds=seeds, offsets=seeds, **options)
    for head_dim in (64, 80, 128, 256):
        attend(dtype, head_dim, 1)
    attend(dtype, 128, 20, softcap=3.0, window=9)
    for stored in ("int8", "int4", "fp8"):
        attend(dtype, 80, 1, stored)
        attend(dtype, 256, 1, stored)
    state = (torch.randn(4, 8, 128).to(dtype), torch.randn(4, 8))
    tk.merge_states(*state, *state)
    decode(dtype)


def attend(dtype: torch.dtype, head_dim: int, rows: int, stored: str | None = None, **options: Any) -> None:
    tree = grow(16, [-1, 0, 0], [64, 30, 40])
    plan = brute_plan(tree, [rows] * 2, 8, 2, head_dim)
    kv = tk.KVCache(1, tree.num_pages, 2, head_dim, dtype=stored or dtype)
    q = torch.randn(2 * rows, 8, head_dim).to(dtype)
    tk.tree_attention(q, kv.k[0], kv.v[0], plan, **options, **kv.beside(0))


def decode(dtype: torch.dtype) -> None:
    k, v = (torch.zeros(4, 16, 2, 64).to(dtype) for _ in range(2))
    tokens, slots, angles = torch.arange(3), torch.arange(3), torch.rand(9, 64)
    x, norm = torch.randn(3, 512).to(dtype), torch.rand(64).to(dtype)
    for norms in ({}, {"q_norm": norm, "k_norm": norm}):
        tk.rope_append_(x, k, v, tokens, angles, slots, num_q_heads=4, num_kv_heads=2, **norms)
    new = torch.ones(3, 2, 64).to(dtype)
    tk.append_kv_(k, v, new, new, slots)
    for stored in ("int8", "int4", "fp8"):
        kv = tk.KVCache(1, 4, 2, 64, dtype=stored)
        tk.rope_append_(x, kv.k[0], kv.v[0], tokens, angles, slots, num_q_heads=4, num_kv_heads=2, **kv.beside(0))
        kv.append(0, new, new, slots)
    tk.copy_pages_([k, v, torch.zeros(4, 8, 2, 64)], slots[:1], slots[1:2])
    for residual in (None, x):
        tk.rms_norm(x, torch.rand(512).to(dtype), 1e-5, residual)
    tk.swiglu(x)
    for bits in (2, 3, 4, 8):
        tk.dequantize_rows(tk.quantize_rows(x, bits, 128), 512, bits, 128, dtype)


def serve(rows: int) -> None:
    """What a round of search calls, for that many rows."""
    x, index, indptr = torch.randn(rows, 512).bfloat16(), torch.arange(rows), torch.arange(rows + 1)
    pair = tk.ScoreHead.label_pair(torch.randn(512), torch.randn(512))
    mlp = tk.ScoreHead.mlp(torch.randn(70, 512).bfloat16(), None, torch.randn(2, 70), None)
    for head in (pair, mlp):
        tk.step_scores(x, index, head)
        tk.score_and_prune(x, index, indptr, head, indptr, rows)
    tk.prune(torch.rand(rows), indptr, rows)
    tk.aggregate_steps(torch.rand(rows), indptr, "min")
    tk.linear_logprob(x, torch.randn(1000, 512).bfloat16(), index)
    tk.sample(x, seeds=index, offsets=index, top_k=rows)
    tk.linear(x, tk.pack_linear(torch.randn(100, 512).bfloat16(), quantize="int8"), None, x[:, :100])
    tk.rms_norm(x, torch.rand(512).bfloat16(), 1e-5, x)
    tk.swiglu(x)
    tk.dequantize_rows(tk.quantize_rows(x, 3, 128), 512, 3, 128, torch.bfloat16)
    k, v = (torch.zeros(rows + 1, 16, 2, 64).bfloat16() for _ in range(2))
    tk.copy_pages_([k, v], index[:1], index[:1] + 1)
    q = tk.rope_append_(x, k, v, index, torch.rand(rows, 64), 16 * index, num_q_heads=4, num_kv_heads=2)
    tk.append_kv_(k, v, k[1:, 0], v[1:, 0], 16 * index)
    table = torch.stack([torch.full((rows,), rows), index], 1)
    plan = tk.plan_attention(table, 17 + index % 16, page_size=16, num_q_heads=4, num_kv_heads=2, head_dim=64)
    out, lse = tk.tree_attention(q, k, v, plan, return_lse=True)
    tk.merge_states(out, lse, out, lse)


def test_batches_of_any_size_share_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled for each choice of tiles: not for a number of rows, nor for where a plan's tables lie."""
    on_triton(monkeypatch)
    with tk.use_backend("triton"), aot.recorded(monkeypatch, "ampere") as launches:
        for rows in (1, 2, 3, 16, 19, 33, 48, 64):
            serve(rows)
    compiled: dict[str, set[str]] = {}
    for launch in launches:
        tiles = {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
        kernel = f"{launch.kernel.fn.__module__}.{launch.name} {tiles} {launch.options}"
        given = {name: value is None for name, value in launch.arguments.items()}
        compiled.setdefault(f"{kernel} {given}", set()).add(str(aot.specialised(launch)))
    assert len(compiled) >= len(OPS)
    assert {kernel: len(kinds) for kernel, kinds in compiled.items() if len(kinds) > 1} == {}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [  # a minute each, so one of them stands for all where nobody asks for the slow ones
        pytest.param(name, dtype, marks=[pytest.mark.slow] if (name, dtype) != ("sm_90", torch.bfloat16) else [])
        for name in aot.TARGETS
        for dtype in (torch.bfloat16, torch.float32)
    ],
)
def test_kernels_compile_ahead_of_time(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of every op; its shared memory fits the device."""
    on_triton(monkeypatch)
    target, device_class, shared_limit = aot.TARGETS[name]
    with tk.use_backend("triton"), aot.recorded(monkeypatch, device_class) as launches:
        call_all(dtype)
    names = {(launch.kernel.fn.__module__, launch.name) for launch in launches}
    assert len(names) >= len(OPS) + 3
    for launch in launches:
        kernel = aot.compiled(launch, target)
        assert kernel.metadata.shared <= shared_limit, f"{launch.name}: {kernel.metadata.shared} bytes of shared memory"
        assert kernel.asm["amdgcn" if name.startswith("gfx") else "ptx"]


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "sm_90" else [pytest.mark.slow]) for n in aot.TARGETS]
)
def test_products_of_codes_have_the_order_of_a_plain_cache(
    name: str, dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensor cores' layouts, and with them the order of the products' sums, are those of elements loaded as such.

    The bits alone would not show it: an output of 8 bits of mantissa seldom tells one order from another.
    """
    on_triton(monkeypatch)
    target, device_class, _ = aot.TARGETS[name]
    layouts = {}
    for stored in (None, "int8", "int4", "fp8"):
        with tk.use_backend("triton"), aot.recorded(monkeypatch, device_class) as launches:
            attend(dtype, head_dim, 1, stored)
        (launch,) = (each for each in launches if each.name == "task_kernel")
        code = aot.compiled(launch, target).asm["ttgir"]
        for alias, layout in re.findall(r"^(#mma\d*) = (.*)", code, re.M):
            code = re.sub(rf"{alias}\b", layout, code)
        layouts[stored] = set(re.findall(r"tt\.dot .*?(tensor<.*) loc", code))
    assert len(layouts[None]) == 2  # scores and values
    assert layouts == dict.fromkeys(layouts, layouts[None])
