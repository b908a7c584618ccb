"""The kernels of the level amx as they are installed, on a processor without AMX: its instructions in software.

A processor without AMX raises SIGILL where it meets them, and the handler of tests/host/amx_by_sigill.h executes them.
The library that installs the handler also says that there is AMX (`tts_amx_in_software` in csrc/cpu/dispatch.cpp), so
the level can be asked for. Without that library `TTS_KERNELS_CPU_ISA=amx` is refused there.

pytest's own handler of SIGILL, which ends the process, must not come after it. Here are a few cases. All tests of the
level, which take minutes:

    export LD_PRELOAD=$PWD/build/cpp/libamx_by_sigill.so TTS_KERNELS_CPU_ISA=amx OMP_NUM_THREADS=1
    .venv/bin/pytest -p no:faulthandler tests/test_linear.py tests/test_linear_quantized.py tests/test_tree_attention.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tts_kernels as tk

HERE = Path(__file__).parent
LIBRARY = HERE.parent / "build" / "cpp" / "libamx_by_sigill.so"
# Tests against reference.py, and which of their cases in bfloat16 (dtype1): enough for every height of a tile.
CASES = {
    "test_linear.py": "test_equals_the_definition and not 1537",
    "test_linear_quantized.py": "test_has_the_bits_of_the_definition and (13-33-130 or 33-31-65 or 48-50-19)",
    "test_tree_attention.py": "test_head_sizes",
}


def levels(**environment: str) -> subprocess.CompletedProcess[str]:
    code = "import tts_kernels as tk; print(tk.backend_info().cpu_isa)"
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def preloaded() -> dict[str, str]:
    """What a process has in its environment to run at the level amx here."""
    isas = tk.backend_info().cpu_isas
    if "amx" in isas:
        pytest.skip("this processor has AMX: test_instruction_sets.py runs its level")
    if "avx512_bf16" not in isas:
        pytest.skip("the level amx needs AVX-512 BF16, too, which is not executed in software")
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY} is not built: `make test` does, or cmake --build build/cpp --target host_tests")
    return {"LD_PRELOAD": str(LIBRARY), "TTS_KERNELS_CPU_ISA": "amx", "OMP_NUM_THREADS": "1"}


def test_small_cases_at_amx(preloaded: dict[str, str]) -> None:
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:faulthandler", "-p", "no:cacheprovider",
        "-k", f"dtype1 and (({') or ('.join(CASES.values())}))", *(str(HERE / file) for file in CASES),
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, **preloaded}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.usefixtures("preloaded")
def test_only_the_preloaded_library_allows_the_level() -> None:
    refused = levels(TTS_KERNELS_CPU_ISA="amx", LD_PRELOAD="")
    assert refused.returncode
    assert "expected one of" in refused.stderr
    # Where it is preloaded the default stays what it is.
    assert levels(LD_PRELOAD=str(LIBRARY), TTS_KERNELS_CPU_ISA="").stdout == f"{tk.backend_info().cpu_isa}\n"
