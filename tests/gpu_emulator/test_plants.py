"""Faults planted in copies of our own kernels: the operators' tests in the emulator must find each.

A race must be found by ThreadSanitizer, not by a wrong value: without a barrier, values may still be right in the order
in which threads happen to run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpu_emulator import clang, nvcc
from gpu_emulator.build import HERE, _cached
from gpu_emulator.library import CSRC

from .test_operators import CODES, FEW, file_of

pytestmark = [pytest.mark.skipif(nvcc() is None, reason="no nvcc"), pytest.mark.timeout(3600)]
needs_clang = pytest.mark.skipif(clang() is None, reason="no clang")
TESTS = HERE.parent


@dataclass(frozen=True)
class Plant:
    """`old` in `file` of csrc/cuda becomes `new`; the tests `only` of an operator find a `fault`.

    It does so everywhere, or where it occurs for the `place`-th time, from 0.
    """

    file: str
    old: str
    new: str
    operator: str
    only: str
    fault: str = "data race"
    sanitizer: str | None = "thread"
    place: int | None = None

    def text(self) -> str:
        """The file with the fault in it."""
        parts = (CSRC / "cuda" / self.file).read_text().split(self.old)
        assert len(parts) > (self.place or 0) + 1, "the plant no longer fits its kernel"
        if self.place is None:
            return self.new.join(parts)
        head, tail = parts[: self.place + 1], parts[self.place + 1 :]
        return self.old.join(head) + self.new + self.old.join(tail)


PLANTS = {
    "arrives_last has no fences": Plant(
        "score_and_prune.cu", "__threadfence();", "", "score_and_prune", "with_a_prior"
    ),
    "sum_before writes while others read its last sums": Plant(
        "prune.cuh", "__syncthreads();  // the last call's sums have been read", "", "prune", FEW["prune"]
    ),
    "weigh_pieces writes while others read the last pieces": Plant(
        "sample.cu", "__syncthreads();  // the last pieces have been read", "", "sample", FEW["sample"]
    ),
    "blocks that share a row meet without fences": Plant(
        "sample.cu", "__threadfence();", "", "sample", "ends_decide and 2051-all"
    ),
    "codes become elements before all of them are there": Plant(
        "tree_attention_mma.cuh", "__syncwarp();  // other lanes' copies", "", "tree_attention", CODES
    ),
    "elements are written over codes that others have yet to read": Plant(
        "tree_attention_mma.cuh", "__syncwarp();  // the codes have been read", "", "tree_attention", CODES
    ),
    "keys are quantised before other lanes have rotated them": Plant(
        "rope_append.cu", "__syncwarp();", "", "rope_append", "rotated_keys[34-int4-dtype1"
    ),
    "copy_pages takes a cache more than there is room for": Plant(
        "copy_pages.cu", "end - begin < kMaxCaches", "end - begin <= kMaxCaches", "copy_pages", "more_caches",
        "out-of-bounds", None,
    ),
}  # fmt: skip


def plant(p: Plant) -> Path:
    """A copy of csrc with the fault in it; one place for each content, so that what is built of it is cached too."""
    text = p.text()
    key = [f"{path.relative_to(CSRC)}\n{path.read_text()}" for path in sorted(CSRC.rglob("*.[ch]*"))]

    def make(folder: Path) -> None:
        shutil.copytree(CSRC, folder / "csrc")
        (folder / "csrc/cuda" / p.file).write_text(text)

    return _cached([*key, p.file, text], "csrc", make)


def run(p: Plant) -> str:
    """What the operator's tests print; that of the first one that fails."""
    options = ["-p", "gpu_emulator.plugin", "--emulate", p.operator, "--emulate-sources", str(plant(p))]
    options += ["--emulate-sanitize", p.sanitizer] if p.sanitizer else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "--timeout", "3000", *options]
    command += ["-k", p.only, file_of(p.operator)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def assert_named(p: Plant) -> None:
    out = run(p)
    assert re.search(rf"^(race|{p.fault}): .*{p.fault if p.sanitizer else ''}", out, re.M), out[-8000:]


# Attention over codes takes many minutes to compile for a sanitizer.
@needs_clang
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if p.only == CODES else []) for name, p in PLANTS.items()]
)
def test_a_planted_fault_is_named(name: str) -> None:
    assert_named(PLANTS[name])


# Whose tests meet in the barriers of a file.
BARRIERS = {
    "linear_logprob.cu": ("linear_logprob", FEW["linear_logprob"]),
    "matmul_nt.cuh": ("linear_logprob", FEW["linear_logprob"]),
    "prune.cuh": ("prune", FEW["prune"]),
    "quantized_tile.cuh": ("linear", "company[form1-dtype1"),  # of several chunks in a block
    "reduce.cuh": ("sample", FEW["sample"]),
    "sample.cu": ("sample", FEW["sample"]),
    "score_and_prune.cu": ("score_and_prune", FEW["score_and_prune"]),
    "step_scores.cu": ("step_scores", FEW["step_scores"]),
    "tree_attention_fma.cuh": ("tree_attention", f"{FEW['tree_attention']} or {CODES}"),
    "tree_attention_mma.cuh": ("tree_attention", f"{FEW['tree_attention']} or {CODES}"),
}
BARRIER = "__syncthreads();"


def barriers() -> list[Plant]:
    """Every barrier of our kernels, lost."""
    found = []
    for path in sorted((CSRC / "cuda").glob("*.cu*")):
        for place in range(path.read_text().count(BARRIER)):
            operator, only = BARRIERS[path.name]
            found.append(Plant(path.name, BARRIER, "", operator, only, place=place))
    return found


@needs_clang
@pytest.mark.slow
@pytest.mark.parametrize("p", barriers(), ids=lambda p: f"{p.file}-{p.place}")
def test_a_lost_barrier_is_named(p: Plant) -> None:
    assert_named(p)
