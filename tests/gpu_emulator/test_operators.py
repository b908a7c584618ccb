"""The CPU's own tests, run on the CUDA operators: glue and host code, and the kernels in the emulator.

There is a process for each operator, because the emulated library replaces the CPU's kernels in it (`plugin.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpu_emulator import clang, compile_cuda, nvcc
from gpu_emulator.build import HERE
from gpu_emulator.library import INCLUDES, ROOT, operators
from gpu_emulator.rounding import fusible

pytestmark = [pytest.mark.skipif(nvcc() is None, reason="no nvcc"), pytest.mark.timeout(3600)]
TESTS = HERE.parent
ALL = [name for name in operators() if name != "linear"]  # which has tests of its own below
LONG = ("sample", "tree_attention")  # minutes: many draws, many large kernels
# What an operator's tests compare it with, to the bit.
PARTS = {"score_and_prune": ("step_scores", "aggregate_steps", "prune")}
# What asks about the CPU itself, and torch's checks of registration, which the CPU's own run makes.
NOT_OURS = ("instruction_sets", "threads_do_not", "opcheck", "isa", "on_a_cpu")
# Tens of thousands of launches or blocks: hours here, seconds on a GPU.
TOO_MANY = ("distribution", "chi_square", "independent_draws", "smallest_set", "random_rows")
# Some cases of each kind, for the sanitizers: a process for each launch.
FEW = {
    "aggregate_steps": "strided",
    "append_kv": "strided or nan",
    "copy_pages": "strided or codes",
    "merge_states": "empty_state or nan_shows",
    "rope_append": "strided or non_finite or what_append_makes_of_the_rotated_keys[34",
    "step_scores": "test_equals_the_definition and 3-17",
    "prune": "test_sizes or groups_of_nan or saturated",
    "score_and_prune": "equals_its_parts and last",
    "linear_logprob": "test_equals_the_definition and (size2 or size3 or size6)",
    "sample": "(draws_exactly or likeliest) and 37 or likeliest_tokens_of or ends_decide and 2051-plain"
    " or ends_decide and 2051-all",
    "tree_attention": "test_head_sizes[7- or test_head_sizes[64-",  # plain and on tensor cores
}
# The same over codes, whose kernels take many minutes to compile for a sanitizer.
CODES = "plain_cache_of_their_elements[int4-dtype1"


def file_of(operator: str) -> str:
    """The file of an operator's tests: the CPU's own, but for linear, whose weight is another on a GPU."""
    return str(HERE / "linear.py" if operator == "linear" else TESTS / f"test_{operator}.py")


def assert_cases_pass(
    operator: str, *arguments: str, tests: str = "", only: str = "test_", but: tuple[str, ...] = NOT_OURS
) -> None:
    """One operator's tests in a process of their own; every one passes, and kernels were launched."""
    options = ["-p", "gpu_emulator.plugin", "--emulate", ",".join([operator, *PARTS.get(operator, ())]), *arguments]
    assert_passing(options, tests or file_of(operator), only, but)


def assert_passing(options: Sequence[str], tests: str, only: str, but: Sequence[str]) -> None:
    """The same for any plugin that says how many launches it emulated."""
    choice = " and ".join([f"({only})", *(f"not {name}" for name in but)])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "--timeout", "3000", *options]
    command += ["-k", choice, tests]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    launches = re.search(r"(\d+) emulated launches", done.stdout)
    assert launches is not None
    assert int(launches[1]) > 0
    print(f"{tests}: {re.findall('[0-9]+ passed', done.stdout)}, {launches[1]} launches")


@pytest.mark.parametrize("seed", [0, 3, 11])
@pytest.mark.parametrize(
    "operator", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in ALL]
)
def test_the_cases_of_the_cpu(operator: str, seed: int) -> None:
    assert_cases_pass(operator, "--emulate-seed", str(seed), but=NOT_OURS + TOO_MANY)


@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_no_rounding_is_left_to_the_compiler(source: Path) -> None:
    """Else a GPU may compute what the emulator has not run."""
    assert fusible(compile_cuda(source, include_dirs=INCLUDES)) == []


# float16 has bfloat16's ways, which take minutes to compile.
@pytest.mark.parametrize(
    ("seed", "only"),
    [(0, "test_ and not dtype2"), *(pytest.param(seed, "test_", marks=pytest.mark.slow) for seed in (3, 11))],
)
def test_linear_as_a_gpu_does_it(seed: int, only: str) -> None:
    assert_cases_pass("linear", "--emulate-seed", str(seed), only=only)


@pytest.mark.skipif(clang() is None, reason="no clang")
@pytest.mark.parametrize("sanitizer", [pytest.param("address", marks=pytest.mark.slow), "thread"])
def test_linear_under_a_sanitizer(sanitizer: str) -> None:
    assert_cases_pass("linear", "--emulate-sanitize", sanitizer, only="zero_points[4-dtype1")


def test_launches() -> None:
    assert_cases_pass(",".join(operators()), tests=str(HERE / "launches.py"))


@pytest.mark.parametrize("only", ["64", pytest.param("128 or 20", marks=pytest.mark.slow)])
def test_attention_has_the_same_bits_in_any_company(only: str) -> None:
    assert_cases_pass("tree_attention,append_kv,copy_pages", tests=str(HERE / "same_bits.py"), only=only)


@pytest.mark.skipif(clang() is None, reason="no clang")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("operator", FEW)
def test_under_a_sanitizer(operator: str, sanitizer: str) -> None:
    assert_cases_pass(operator, "--emulate-sanitize", sanitizer, only=FEW[operator])


@pytest.mark.slow
@pytest.mark.skipif(clang() is None, reason="no clang")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_attention_over_codes_under_a_sanitizer(sanitizer: str) -> None:
    assert_cases_pass("tree_attention", "--emulate-sanitize", sanitizer, only=CODES)


@pytest.mark.slow
@pytest.mark.skipif(clang() is None, reason="no clang")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("head_dim", [96, 128, 256])
def test_larger_heads_under_a_sanitizer(head_dim: int, sanitizer: str) -> None:
    assert_cases_pass("tree_attention", "--emulate-sanitize", sanitizer, only=f"test_head_sizes[{head_dim}-")
