"""The CPU's own tests, run on the CUDA operators: glue, host code and kernels, the kernels in the emulator.

A process for each operator, since the emulated library takes the place of the CPU's kernels in it (`plugin.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from gpu_emulator import clang, nvcc
from gpu_emulator.build import HERE
from gpu_emulator.library import operators

pytestmark = [pytest.mark.skipif(nvcc() is None, reason="no nvcc"), pytest.mark.timeout(3600)]
TESTS = HERE.parent
ALL = operators()
QUICK = ("aggregate_steps", "prune")  # compiled in seconds; the others take a minute or two the first time
# What asks about the CPU itself, and torch's checks of registration, which the CPU's own run makes.
NOT_OURS = ("instruction_sets", "opcheck", "isa")
# Tens of thousands of launches or blocks: hours here, seconds on a GPU.
TOO_MANY = ("distribution", "chi_square", "independent_draws", "smallest_set")
# Small cases of each kind, for the sanitizers: a process a launch.
FEW = {
    "aggregate_steps": "strided",
    "step_scores": "test_equals_the_definition and 3-17",
    "prune": "test_sizes or groups_of_nan or saturated",
    "score_and_prune": "equals_its_parts and last",
    "linear_logprob": "test_equals_the_definition and size2",
    "sample": "draws_exactly and 37",
}


def run(operator: str, *arguments: str, tests: str = "", only: str = "test_", but: tuple[str, ...] = NOT_OURS) -> None:
    """One operator's tests in a process of their own; every one passes, and kernels were launched."""
    choice = " and ".join([f"({only})", *(f"not {name}" for name in but)])
    options = ["-p", "no:cacheprovider", "-p", "gpu_emulator.plugin", "--emulate", operator, "-x", "--timeout", "3000"]
    command = [sys.executable, "-m", "pytest", *options, "-k", choice, *arguments]
    command += [tests or str(TESTS / f"test_{operator}.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    launches = re.search(r"(\d+) emulated launches", done.stdout)
    assert launches is not None
    assert int(launches[1]) > 0


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    "operator", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_the_cases_of_the_cpu(operator: str, seed: int) -> None:
    run(operator, "--emulate-seed", str(seed), but=NOT_OURS + TOO_MANY)


@pytest.mark.slow
def test_launches() -> None:
    run("score_and_prune,linear_logprob,step_scores", tests=str(HERE / "launches.py"))


@pytest.mark.slow
@pytest.mark.skipif(clang() is None, reason="no clang")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("operator", FEW)
def test_under_a_sanitizer(operator: str, sanitizer: str) -> None:
    run(operator, "--emulate-sanitize", sanitizer, only=FEW[operator])
