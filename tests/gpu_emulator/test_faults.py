"""Kernels with faults on purpose: each fault is found, and the message names the thread and the place."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from gpu_emulator import Kernel, KernelFault, clang, load, nvcc
from gpu_emulator.build import HERE

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
needs_clang = pytest.mark.skipif(clang() is None, reason="no clang")


@cache
def broken(name: str, sanitize: str | None = None) -> Kernel:
    return load(HERE / "kernels" / "broken.cu", name, sanitize=sanitize)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


CASES: dict[str, tuple[int, int, Any, str, str]] = {  # grid, block, args, kind, a part of the message
    "shared_out_of_bounds": (1, 32, lambda: [ints(32), 1], "out-of-bounds", "past its end (128 bytes)"),
    "global_out_of_bounds": (
        1,
        64,
        lambda: [torch.zeros(64), torch.zeros(64)],
        "out-of-bounds",
        "args[0], 4 bytes past",
    ),
    "misaligned": (1, 8, lambda: [torch.zeros(64, dtype=torch.int8), torch.zeros(8)], "misaligned", "multiple of 4"),
    "local_out_of_bounds": (1, 32, lambda: [ints(32), 9], "out-of-bounds", "local memory"),
    "divergent_barrier": (1, 32, lambda: [ints(32)], "divergent-barrier", "has exited"),
    "two_barriers": (1, 64, lambda: [ints(64)], "divergent-barrier", "in another place"),
    "absent_lane": (1, 32, lambda: [ints(32)], "absent-lane", "names lane"),
    "unnamed_lane": (1, 32, lambda: [ints(32)], "absent-lane", "does not name it"),
    "waiting_elsewhere": (1, 32, lambda: [ints(32)], "absent-lane", "waits at barrier 0"),
    "cp_async_without_wait": (1, 32, lambda: [torch.zeros(32, 4), torch.zeros(32, 4)], "cp.async", "still in flight"),
    "cp_async_one_group_too_few": (
        1,
        32,
        lambda: [torch.zeros(64, 4), torch.zeros(32, 4)],
        "cp.async",
        "still in flight",
    ),
    "trapping": (1, 1, lambda: [3], "trap", "trap"),
}


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("name", CASES)
def test_fault_is_caught(name: str, seed: int) -> None:
    grid, block, args, kind, text = CASES[name]
    with pytest.raises(KernelFault) as caught:
        broken(name).launch(grid, block, args(), seed=seed)
    fault = caught.value
    assert fault.kind == kind
    assert text in str(fault)
    assert fault.block == (0, 0, 0)
    assert 0 <= fault.thread[0] < block
    assert "broken.cu:" in fault.source
    assert fault.instruction


def test_the_launch_after_a_fault_is_right() -> None:
    y = ints(32)
    with pytest.raises(KernelFault):
        broken("shared_out_of_bounds").launch(1, 32, [y, 1])
    broken("shared_out_of_bounds").launch(1, 32, [y, 0])
    assert y.tolist() == [3] * 32


def test_missing_syncthreads_shows_in_order() -> None:
    """Threads run one after another, so the first reads what the last has not written yet."""
    x, y = torch.arange(64.0), torch.zeros(64)
    broken("missing_syncthreads").launch(1, 64, [x, y])
    assert y.isnan().any()


def test_missing_syncwarp_shows_in_order() -> None:
    x, y = torch.arange(32, dtype=torch.int32), ints(32)
    broken("missing_syncwarp").launch(1, 32, [x, y])
    assert y.tolist() != (x ^ 1).tolist()


def test_uninitialised_shared_memory_reads_as_nan() -> None:
    y = torch.zeros(32)
    broken("uninitialised_shared").launch(1, 32, [y])
    assert y[31].isnan()
    assert y[:31].eq(1).all()


def test_order_of_blocks_shows_by_seed() -> None:
    def last_writer(seed: int) -> int:
        y = ints(8)
        broken("two_blocks_one_word").launch(6, 8, [y], seed=seed)
        return int(y[0])

    assert len({last_writer(seed) for seed in range(1, 12)}) > 1


def test_hang_is_reported() -> None:
    with pytest.raises(KernelFault, match="still running") as caught:
        broken("endless").launch(1, 32, [ints(1)], timeout=0.3)
    assert caught.value.kind == "timeout"


RACES: dict[str, tuple[int, int, Any]] = {
    "missing_syncthreads": (1, 64, lambda: [torch.zeros(64), torch.zeros(64)]),
    "missing_syncwarp": (1, 32, lambda: [ints(32), ints(32)]),
    "missing_threadfence": (8, 1, lambda: [torch.zeros(8), torch.zeros(8), ints(1), torch.zeros(1)]),
    "late_threadfence": (8, 1, lambda: [torch.zeros(8), torch.zeros(8), ints(1), torch.zeros(1)]),
    # Blocks of more threads than ThreadSanitizer tells apart, together.
    "missing_threadfence_in_blocks": (8, 128, lambda: [torch.zeros(8), torch.zeros(8), ints(1), torch.zeros(1)]),
    "missing_barrier_before_a_fence": (30, 64, lambda: [torch.zeros(30), ints(1), torch.zeros(1)]),
    "two_blocks_one_word": (2, 8, lambda: [ints(8)]),
    "cp_async_over_a_reader": (1, 32, lambda: [torch.zeros(64, 4), torch.zeros(64, 4)]),
    "cp_async_of_another_blocks_write": (2, 32, lambda: [torch.zeros(64, 4), torch.zeros(64, 4)]),
}


@needs_clang
@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("name", RACES)
def test_race_is_caught(name: str, seed: int) -> None:
    grid, block, args = RACES[name]
    with pytest.raises(KernelFault, match="data race") as caught:
        broken(name, "thread").launch(grid, block, args(), seed=seed)
    fault = caught.value
    assert fault.kind in ("race", "cp.async")
    assert fault.ptx_line > 0
    assert len(fault.block) == 3


@needs_clang
@pytest.mark.parametrize(("grid", "block"), [(1, 256), (120, 128), (240, 32)])
def test_more_threads_than_a_sanitizer_tells_apart_are_refused(grid: int, block: int) -> None:
    with pytest.raises(ValueError, match="for ThreadSanitizer, got"):
        broken("missing_threadfence_in_blocks", "thread").launch(
            grid, block, [torch.zeros(grid), torch.zeros(grid), ints(1), torch.zeros(1)]
        )


@needs_clang
def test_duplicate_stores_are_of_one_value() -> None:
    """Several threads that store to one word: a race, unless the caller lets them, and they store the same."""
    kernel = broken("two_threads_one_word", "thread")
    kernel.launch(1, 64, [ints(64), 0], duplicate_stores=True)
    for distinct, duplicates in ((0, False), (1, True)):
        with pytest.raises(KernelFault, match="data race"):
            kernel.launch(1, 64, [ints(64), distinct], duplicate_stores=duplicates)


ADDRESSES: dict[str, tuple[int, int, Any]] = {
    "shared_out_of_bounds": (1, 32, lambda: [ints(32), 1]),
    "global_out_of_bounds": (1, 64, lambda: [torch.zeros(64), torch.zeros(64)]),
    "local_out_of_bounds": (1, 32, lambda: [ints(32), 9]),
}


@needs_clang
@pytest.mark.parametrize("name", ADDRESSES)
def test_address_sanitizer_catches(name: str) -> None:
    grid, block, args = ADDRESSES[name]
    with pytest.raises(KernelFault, match=r"overflow|poison") as caught:
        broken(name, "address").launch(grid, block, args())
    assert caught.value.kind == "address"
    assert caught.value.ptx_line > 0
