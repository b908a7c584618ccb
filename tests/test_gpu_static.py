"""The compiler's word on the CUDA kernels: nothing spills, shared memory fits."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "gpu_static.py"
spec = importlib.util.spec_from_file_location("gpu_static", PATH)
assert spec is not None
assert spec.loader is not None
gpu_static = importlib.util.module_from_spec(spec)
sys.modules["gpu_static"] = gpu_static
spec.loader.exec_module(gpu_static)


def kernel(**changes: int) -> object:
    numbers = {"architecture": 80, "threads": 128, "registers": 64, "spilled": 0, "stack": 0, "shared": 0, **changes}
    return gpu_static.Kernel("file", "kernel", **numbers)


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 8),  # 8 KB of registers a block
        ({"registers": 32}, 16),  # 64 warps
        ({"registers": 32, "architecture": 86}, 12),  # 48 warps
        ({"registers": 32, "threads": 32, "architecture": 86}, 16),  # blocks
        ({"registers": 33, "threads": 1024}, 1),  # registers come in units of 8 a thread
        ({"shared": 40 << 10}, 4),  # 1 KB more each for the system
        ({"shared": 40 << 10, "architecture": 90}, 5),
    ],
)
def test_occupancy(changes: dict[str, int], blocks: int) -> None:
    assert kernel(**changes).blocks == blocks  # type: ignore[attr-defined]


def test_faults_are_found() -> None:
    assert kernel().faults() == []  # type: ignore[attr-defined]
    assert "spills 12 bytes" in kernel(spilled=12).faults()[0]  # type: ignore[attr-defined]
    assert "shared memory" in kernel(shared=164 << 10).faults()[0]  # type: ignore[attr-defined]
    assert "does not fit" in kernel(registers=255, threads=1024).faults()[0]  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", gpu_static.ARCHITECTURES)
def test_no_kernel_spills_or_has_too_much_shared_memory(architecture: int) -> None:
    kernels = gpu_static.survey([architecture])
    assert len({k.file for k in kernels}) == len(list((PATH.parents[1] / "csrc/cuda").glob("*.cu")))
    assert [fault for k in kernels for fault in k.faults()] == []
