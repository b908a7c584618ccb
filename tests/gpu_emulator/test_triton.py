"""Triton's PTX, compiled ahead of time: these tests run the code for a GPU, not Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from gpu_emulator import Kernel, clang, load
from gpu_emulator.build import HERE
from gpu_emulator.test_operators import assert_passing, file_of

pytest.importorskip("triton", reason="no triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# A few of each op's own tests: nearly every launch is another specialisation, which Triton and the emulator compile
# anew. Head sizes and dtypes that tree_attention has a way of its own for are all there.
OPS = {
    "aggregate_steps": "strided or nan",
    "append_kv": "strided or nan",
    "copy_pages": "strided",
    "linear": "test_whole_numbers[form0-size1-dtype1 or test_zero_points[4-dtype1 or spoils",
    "linear_logprob": "large_logits or test_equals_the_definition[dtype1-size3]",
    "merge_states": "empty_state or nan_shows",
    "prune": "saturated or nothing_kept or strided",
    "quantize_rows": "odd_groups or strided or whole_numbers",
    "rms_norm": "zero_rows or strided",
    "rope_append": "other_slots or non_finite or what_append_makes_of_the_rotated_keys[34-int4-dtype1"
    " or what_append_makes_of_the_rotated_keys[34-int8-dtype0 or fp8",
    "sample": "kth_stay or min_p_is or smallest_set or renormalises or greedy_takes or ties_at_the_lower_id[5"
    " or random_rows or infinite_logits or extreme_temperatures or exactly_the_definition[1025-all"
    " or likeliest_tokens_of or stable_sort[37",
    "score_and_prune": "without_new_steps",
    "step_scores": "nan_passes or difference_of_labels",
    "swiglu": "extreme_gates or strided",
    "tree_attention": "rows_without_keys or test_head_sizes[64-dtype1 or test_head_sizes[96-dtype2"
    " or attend_as_a_plain_cache_of_their_elements or fp8_cache_attends_as_a_plain_cache_of_its_elements",
}
# What takes a sanitizer, a process for each launch, too long of these is left out or replaced.
FEW = {
    "quantize_rows": "strided",
    "linear": "test_zero_points[4-dtype1",
    "sample": "greedy_takes or exactly_the_definition[37-all or exactly_the_definition[1025-all-dtype1"
    " or likeliest_tokens_of",
    "tree_attention": "test_head_sizes[64-dtype1 or test_head_sizes[96-dtype2",
}
WAYS = {
    "in order": [],
    "shuffled": ["--emulate-seed", "3"],
    "address": ["--emulate-sanitize", "address"],
    "thread": ["--emulate-sanitize", "thread"],
}

EMULATED = ["-p", "triton_backend.emulated"]

capabilities = pytest.mark.parametrize("capability", [80, 120])


@triton.jit
def softmax(x, y, n, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0), tl.arange(0, block)
    values = tl.load(x + row * n + column, mask=column < n, other=-float("inf")).to(tl.float32)
    weights = tl.exp(values - tl.max(values, 0))
    tl.store(y + row * n + column, (weights / tl.sum(weights, 0)).to(y.dtype.element_ty), mask=column < n)


@triton.jit
def product(a, b, c, m, n, k, bm: tl.constexpr, bn: tl.constexpr, bk: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * bm + tl.arange(0, bm)
    j = tl.program_id(1) * bn + tl.arange(0, bn)
    total = tl.zeros((bm, bn), tl.float32)
    for start in range(0, k, bk):
        s = start + tl.arange(0, bk)
        left = tl.load(a + i[:, None] * k + s[None, :], mask=(i[:, None] < m) & (s[None, :] < k), other=0.0)
        right = tl.load(b + s[:, None] * n + j[None, :], mask=(s[:, None] < k) & (j[None, :] < n), other=0.0)
        total = tl.dot(left, right, total)
    tl.store(c + i[:, None] * n + j[None, :], total, mask=(i[:, None] < m) & (j[None, :] < n))


@triton.jit
def sort_and_scan(x, ordered, sums, positive, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * block + tl.arange(0, block)
    values = tl.load(x + at)
    tl.store(ordered + at, tl.sort(values, descending=True))
    tl.store(sums + at, tl.cumsum(values, 0))
    tl.atomic_add(positive, tl.sum((values > 0).to(tl.int32), 0))


class Compiled:
    """A Triton kernel for a GPU of that capability, as a kernel of the emulator."""

    def __init__(self, function: Any, types: dict[str, str], constants: dict[str, int], capability: int) -> None:
        signature = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        self.ptx, self.shared, self.name = compiled.asm["ptx"], compiled.metadata.shared, compiled.metadata.name

    def launch(self, grid: Any, args: list[Any], sanitize: str | None = None, seed: int = 0) -> None:
        kernel: Kernel = load(self.ptx, self.name, sanitize=sanitize)
        scratch = [None] * (len(kernel.params) - len(args))  # Triton's own buffers, unused here
        kernel.launch(grid, 128, [*args, *scratch], dynamic_smem=self.shared, seed=seed, duplicate_stores=True)


@capabilities
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_softmax(dtype: torch.dtype, capability: int) -> None:
    kind = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    compiled = Compiled(softmax, {"x": kind, "y": kind, "n": "i32"}, {"block": 512}, capability)
    x = torch.randn(3, 301).to(dtype)
    y = torch.empty_like(x)
    compiled.launch(3, [x, y, 301], seed=1)
    torch.testing.assert_close(y, x.float().softmax(1).to(dtype))


@pytest.mark.parametrize("sanitize", [None, "address", "thread"])
def test_bf16_dot(sanitize: str | None) -> None:
    """Shared memory by cp.async or stores, ldmatrix, mma.sync and barriers, as Triton arranges them."""
    if sanitize and clang() is None:
        pytest.skip("no clang")
    types = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "m": "i32", "n": "i32", "k": "i32"}
    compiled = Compiled(product, types, {"bm": 32, "bn": 32, "bk": 32}, 80)
    a, b, c = torch.randn(40, 72).bfloat16(), torch.randn(72, 50).bfloat16(), torch.empty(40, 50)
    compiled.launch((2, 2), [a, b, c, 40, 50, 72], sanitize, seed=2)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@capabilities
def test_sort_scan_and_atomics(capability: int) -> None:
    types = {"x": "*fp32", "ordered": "*fp32", "sums": "*fp32", "positive": "*i32"}
    compiled = Compiled(sort_and_scan, types, {"block": 256}, capability)
    x = torch.randn(2, 256)
    ordered, sums, positive = torch.empty_like(x), torch.empty_like(x), torch.zeros(1, dtype=torch.int32)
    compiled.launch(2, [x, ordered, sums, positive], seed=3)
    assert torch.equal(ordered, x.sort(1, descending=True).values)
    torch.testing.assert_close(sums, x.cumsum(1), rtol=1e-4, atol=1e-4)
    assert positive.item() == int((x > 0).sum())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_of_the_ops(op: str, way: str) -> None:
    """The ops' own tests on their Triton kernels, compiled for sm_80; a process for each op and way."""
    if way in ("address", "thread") and clang() is None:
        pytest.skip("no clang")
    only = FEW.get(op, OPS[op]) if way in ("address", "thread") else OPS[op]
    assert_passing([*EMULATED, *WAYS[way]], file_of(op), only, ())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "only",
    ["is_restored", "without_loss and llama", *(f"near_those_of_a_cpu and {kind}" for kind in ("xquant-3", "int4"))],
)
def test_the_block_cache(only: str) -> None:
    """A block's keys and values from its stored bytes; logits of a text beyond a block, without loss and with."""
    assert_passing(EMULATED, str(HERE.parent / "models/test_block_cache_on_triton.py"), only, ())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_offsets_beyond_32_bits() -> None:
    assert_passing(EMULATED, str(HERE.parent / "test_large_strides.py"), "test_", ())
