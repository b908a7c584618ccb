"""The kernels' own tests with every instruction set that this processor has, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tts_kernels as tk

HERE = Path(__file__).parent
FILES = sorted(
    str(f)
    for f in HERE.glob("test_*.py")
    if (HERE.parent / "csrc" / "cpu" / f.name[5:]).with_suffix(".cpp").exists() or f.name == "test_row_independence.py"
)
# Sets that have kernels of their own for these alone.
LINEAR = ("test_linear.py", "test_linear_logprob.py", "test_linear_quantized.py")
OWN = {
    "avx_vnni": LINEAR,
    "avx512_vnni": LINEAR,
    "amx": (*LINEAR, "test_tree_attention.py", "test_row_independence.py"),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("isa", [isa for isa in tk.backend_info().cpu_isas if isa != tk.backend_info().cpu_isa])
def test_kernels_at(isa: str) -> None:
    """The rest of the suite runs with the level in use."""
    files = [f for f in FILES if isa not in OWN or f.endswith(OWN[isa])]
    assert files
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not slow and not gpu",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    done = subprocess.run(
        command, env={**os.environ, "TTS_KERNELS_CPU_ISA": isa}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
