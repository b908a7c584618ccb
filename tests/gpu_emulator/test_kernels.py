"""Correct kernels run without errors, in any order of threads and blocks, and under both sanitizers."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from gpu_emulator import Kernel, clang, load, nvcc
from gpu_emulator.build import HERE

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")

sanitizers = pytest.mark.parametrize(
    "sanitize",
    [
        None,
        *(
            pytest.param(s, marks=pytest.mark.skipif(clang() is None, reason=f"no clang: -fsanitize={s}"))
            for s in ("address", "thread")
        ),
    ],
)
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


@cache
def right(name: str, sanitize: str | None = None) -> Kernel:
    return load(HERE / "kernels" / "right.cu", name, sanitize=sanitize)


@sanitizers
@seeds
def test_softmax(seed: int, sanitize: str | None) -> None:
    x, y = torch.randn(3, 301), torch.empty(3, 301)
    right("softmax", sanitize).launch(3, 96, [x, y, 301], dynamic_smem=4 * 301, seed=seed)
    torch.testing.assert_close(y, x.softmax(1), rtol=1e-5, atol=1e-7)


@sanitizers
@seeds
def test_decode_attention(seed: int, sanitize: str | None) -> None:
    q, k, v = torch.randn(64).bfloat16(), torch.randn(37, 64).bfloat16(), torch.randn(37, 64).bfloat16()
    out = torch.empty(64)
    right("decode", sanitize).launch(1, 128, [q, k, v, out, 37], dynamic_smem=4 * 37, seed=seed)
    weights = (k.double() @ q.double() / 8).softmax(0)
    torch.testing.assert_close(out.double(), weights @ v.double(), rtol=1e-5, atol=1e-6)


@sanitizers
@seeds
def test_bitonic_topk(seed: int, sanitize: str | None) -> None:
    scores = torch.randint(0, 40, (128,)).float() - 20  # many ties
    best = torch.empty(9, dtype=torch.int32)
    right("topk", sanitize).launch(1, 128, [scores, best, 9], seed=seed)
    assert best.tolist() == sorted(range(128), key=lambda i: (-float(scores[i]), i))[:9]


@sanitizers
@seeds
def test_last_block_done(seed: int, sanitize: str | None) -> None:
    x, partial, total = torch.randn(12, 32), torch.full((12,), torch.nan), torch.full((1,), torch.nan)
    right("ticket_sum", sanitize).launch(12, 32, [x, partial, torch.zeros(1, dtype=torch.int32), total], seed=seed)
    torch.testing.assert_close(total[0].double(), x.double().sum(), rtol=1e-5, atol=1e-5)


@sanitizers
@seeds
def test_histogram(seed: int, sanitize: str | None) -> None:
    x, bins = torch.randint(0, 64, (1000,), dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    right("histogram", sanitize).launch(3, 128, [x, bins, 1000], seed=seed)
    assert bins.tolist() == torch.bincount(x, minlength=64).tolist()


@sanitizers
@seeds
def test_warp_scan(seed: int, sanitize: str | None) -> None:
    x, y = torch.randint(-9, 9, (32,), dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    right("warp_scan", sanitize).launch(1, 32, [x, y], seed=seed)
    assert y.tolist() == x.cumsum(0).tolist()


@sanitizers
@seeds
def test_cp_async_in_many_blocks(seed: int, sanitize: str | None) -> None:
    """Blocks run one after another on the same stacks and the same shared memory, which is no race of theirs."""
    x, y = torch.randn(7, 304), torch.full((7, 384), torch.nan)
    right("staged_rows", sanitize).launch(7, 32, [x, y, 302, 304], seed=seed)
    assert torch.equal(y[:, :302], x[:, :302])
    assert y[:, 302:].eq(0).all()


@cache
def kernel(file: str, name: str, sanitize: str | None = None) -> Kernel:
    return load(HERE / "kernels" / file, name, sanitize=sanitize)


def i32(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


@sanitizers
@pytest.mark.parametrize("split", [False, True])
def test_cooperative_groups(split: bool, sanitize: str | None) -> None:
    x = torch.arange(64, dtype=torch.int32) * 7 % 10
    tiles, odd, scan = i32(64), i32(64), i32(64)
    kernel("cooperative.cu", "groups", sanitize).launch(1, 64, [x, tiles, odd, scan], seed=3, split_masks=split)
    assert tiles.tolist() == x.view(8, 8).sum(1, dtype=torch.int32).repeat_interleave(8).tolist()
    assert scan.tolist() == x.view(2, 32).cumsum(1).flatten().tolist()
    assert odd[x % 2 == 0].eq(-1).all()
    leaders = odd[odd >= 100] - 100
    assert int(leaders.sum()) == int((x % 2).sum())  # whatever the groups were, they cover all odd lanes
    assert len(leaders) == 2 or split


@sanitizers
def test_grid_barrier(sanitize: str | None) -> None:
    x, partial, total = torch.arange(5, dtype=torch.int32) + 1, i32(5), i32(5)
    kernel("cooperative.cu", "grid_sum", sanitize).launch(5, 32, [x, partial, total], cooperative=True, seed=2)
    assert total.tolist() == [15] * 5


@sanitizers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cp_async_ldmatrix_mma(dtype: torch.dtype, sanitize: str | None) -> None:
    a, b, c = torch.randn(16, 80).to(dtype), torch.randn(8, 80).to(dtype), torch.zeros(16, 8)
    name = "product_bf16" if dtype == torch.bfloat16 else "product_f16"
    kernel("tensor_core.cu", name, sanitize).launch(1, 32, [a, b, c, 80], seed=4)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


def test_transposing_matrix_moves() -> None:
    x = torch.randint(0, 30000, (8, 8), dtype=torch.int16)
    y, same = torch.zeros_like(x), torch.zeros_like(x)
    kernel("tensor_core.cu", "transpose").launch(1, 32, [x, y, same])
    assert torch.equal(y, x.T)
    assert torch.equal(same, x)


@pytest.mark.slow
@sanitizers
def test_cub_block_primitives(sanitize: str | None) -> None:
    x = torch.randint(0, 2**20, (128,), dtype=torch.int32)
    sorted_, scanned, total = i32(128), i32(128), i32(1)
    kernel("cub.cu", "sort_scan_reduce", sanitize).launch(1, 64, [x, sorted_, scanned, total], seed=5)
    assert sorted_.tolist() == sorted(x.tolist())
    assert scanned.tolist() == (x.cumsum(0) - x).tolist()
    assert total.item() == x.sum().item()
