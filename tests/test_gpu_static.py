"""The compiler's data on the CUDA kernels: nothing spills, shared memory fits. And the predictions of a model."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

costs, gpu_model, gpu_static = map(importlib.import_module, ("costs", "gpu_model", "gpu_static"))
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def kernel(**changes: int) -> gpu_static.Kernel:  # type: ignore[name-defined]
    numbers = {"architecture": 80, "threads": 128, "registers": 64, "spilled": 0, "stack": 0, "shared": 0, **changes}
    return gpu_static.Kernel("file", "kernel", **numbers)


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 8),  # 8 KB of registers a block
        ({"registers": 32}, 16),  # 64 warps
        ({"registers": 32, "architecture": 86}, 12),  # 48 warps
        ({"registers": 32, "threads": 32, "architecture": 86}, 16),  # blocks
        ({"registers": 33, "threads": 1024}, 1),  # registers come in units of 8 per thread
        ({"shared": 40 << 10}, 4),  # 1 KB more each for the system
        ({"shared": 40 << 10, "architecture": 90}, 5),
    ],
)
def test_occupancy(changes: dict[str, int], blocks: int) -> None:
    assert kernel(**changes).blocks == blocks


def test_faults_are_found() -> None:
    assert kernel().faults() == []
    assert "spills 12 bytes" in kernel(spilled=12).faults()[0]
    assert "shared memory" in kernel(shared=164 << 10).faults()[0]
    assert "does not fit" in kernel(registers=255, threads=1024).faults()[0]


SPILLS = """
__global__ void __launch_bounds__(1024, 2) sums(const float* x, float* y) {  // 32 registers per thread
    float row[64];
    for (int i = 0; i < 64; ++i) row[i] = x[threadIdx.x + 1024 * i];
    __syncthreads();
    for (int i = 0; i < 64; ++i) y[threadIdx.x + 1024 * i] = row[63 - i] * row[(i * 7) % 64];
}
"""


@needs_nvcc
def test_a_kernel_that_spills_is_found(tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    (found,) = gpu_static.compile_kernels(source, 80)
    assert found.threads == 1024
    assert found.registers == 32
    assert "spills" in found.faults()[0]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@needs_nvcc
@pytest.mark.parametrize("architecture", gpu_static.ARCHITECTURES)
def test_no_kernel_spills_or_has_too_much_shared_memory(architecture: int) -> None:
    kernels = gpu_static.survey([architecture])
    assert len({k.file for k in kernels}) == len(list((ROOT / "csrc/cuda").glob("*.cu")))
    assert [fault for k in kernels for fault in k.faults()] == []


# ---- the model ----


def written() -> str:
    """The page that is kept with the sources."""
    return (ROOT / "benchmarks/gpu_static.md").read_text()


def test_the_page_has_every_kernel_of_the_model_and_no_spills() -> None:
    lines = re.findall(r"^\| \w+ \| `([^`]+)` \|(.*)$", written(), re.M)
    names = [name for name, _ in lines]
    for name, line in lines:
        cells = re.findall(r"(\d+), (\d+), (\d+) \(\d+%\)", line)
        assert len(cells) == len(gpu_static.ARCHITECTURES), name
        assert all(spilled == "0" for _, spilled, _ in cells), name
        fits = any if re.search(gpu_static.WHERE_THERE_IS_ROOM, name) else all
        assert fits(int(blocks) > 0 for *_, blocks in cells), name
    for case in gpu_model.cases():
        for launch in case.launches:
            assert [name for name in names if re.search(launch.kernel, name)], launch.kernel


@pytest.mark.parametrize("gpu", gpu_model.GPUS.values(), ids=gpu_model.GPUS)
def test_nothing_is_predicted_below_the_roofline(gpu: gpu_model.GPU) -> None:  # type: ignore[name-defined]
    cases = gpu_model.cases()
    assert {case.op.strip("_") for case in cases} == {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    for case in cases:
        full = gpu_model.seconds(case, gpu, lambda *_: kernel(registers=32))
        assert gpu.roofline(case.bound) < full <= gpu_model.seconds(case, gpu, lambda *_: kernel(registers=255))


def test_a_launch_is_as_slow_as_what_it_lacks_most() -> None:
    gpu = gpu_model.GPUS["H100"]
    read = gpu_model.Launch("", blocks=10 * gpu.sms, under_way=1 << 15, memory=1e9)
    bandwidth = 1e9 / (gpu_model.SUSTAINED * gpu.memory)
    assert read.seconds(gpu, 4) == pytest.approx(bandwidth + gpu_model.LAUNCH)
    few = replace(read, under_way=64)
    assert few.seconds(gpu, 4) == pytest.approx(1e9 * gpu_model.LATENCY / (gpu.sms * 4 * 64) + gpu_model.LAUNCH)
    products = replace(read, tensor=1e13)
    assert products.seconds(gpu, 4) == pytest.approx(1e13 / (0.63 * gpu.tensor) + gpu_model.LAUNCH)
    uneven = replace(products, blocks=10 * gpu.sms + 1)
    assert uneven.seconds(gpu, 4) - gpu_model.LAUNCH == pytest.approx(
        1.1 * 10 * gpu.sms / (10 * gpu.sms + 1) * 1e13 / (0.63 * gpu.tensor)
    )


def test_costs_are_those_of_a_naive_count() -> None:
    bf16 = gpu_model.BF16
    assert costs.linear_logprob(3, 5, 7, bf16) == gpu_model.Bound(2 * 5 * 7, 2 * 3 * 5 * 7, bf16)
    tokens, reads = 10 + 2 * 3, 2 * 13  # two branches of 3 tokens below 10
    expected = gpu_model.Bound(16 * 2 * 2 * 8 * 2, 26 * 4 * 8 * 4, bf16)
    assert costs.tree_attention(tokens, reads, 4, 2, 8, bf16) == expected
    plan = [gpu_model.Task(2, [10]), gpu_model.Task(1, [3]), gpu_model.Task(1, [3])]
    first, merge = gpu_model.tree_attention(plan, 4, 2, 4, 2, 8, tokens)
    assert (first.blocks, merge.blocks) == (6, 2)
    assert first.memory == 16 * 2 * 2 * 8 * 2
    assert first.tensor == 3 * 2 * 4 * 16 * 64 * 8  # tiles of 16 lanes by 64 keys
