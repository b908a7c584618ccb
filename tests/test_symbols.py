"""The operator library as a file: what it needs, which symbols it exports, and that instruction sets stay separate."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rules import ISAS

from tts_kernels import _library


def symbols(*flags: str) -> list[tuple[str, str]]:
    """(kind, demangled name) of each symbol."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    run = subprocess.run(["nm", "-C", *flags, str(_library.PATH)], check=True, capture_output=True, text=True)
    return [(m[1], m[2]) for m in re.finditer(r"(?m)^(?:[0-9a-f]+)?\s+(\w) (.+)$", run.stdout)]


def test_no_python_in_the_operator_library() -> None:
    assert not [name for kind, name in symbols("-D") if kind == "U" and re.match(r"_?Py", name)]


def test_nothing_of_ours_is_exported() -> None:
    assert not [name for _, name in symbols("-D", "--defined-only") if name.startswith("tts::")]


def test_kernels_carry_their_instruction_set() -> None:
    """An inline function compiled for AVX-512 must never be the copy that an older processor runs."""
    everything = symbols()
    if not everything:
        pytest.skip("the library is stripped")
    ours = [(kind, name) for kind, name in everything if "tts::" in name]
    kernels = {s for s in ISAS for _, name in ours if name.startswith(f"tts::{s}::")}
    assert "generic" in kernels


def test_kernel_files_include_nothing_that_could_be_shared() -> None:
    """An inline function of a standard header would have one symbol for all instruction sets."""
    root = Path(__file__).parent.parent / "csrc"
    files = {
        str(f.relative_to(root / folder)): f for folder in ("cpu", "include") for f in (root / folder).rglob("*.*")
    }
    own = {name for name in files if name.endswith(".h")}
    assert own
    del files["dispatch.cpp"]
    for file in files.values():
        for header in re.findall(r'#include [<"]([^>"]+)[>"]', file.read_text()):
            assert header in own | {"cstdint", "immintrin.h"}, f"{file.name} includes {header}"


def test_a_name_of_the_kernels_has_one_definition() -> None:
    """The headers share a namespace: of two classes or constants of one name the linker keeps whichever comes first."""
    root = Path(__file__).parent.parent / "csrc"
    files: dict[str, set[str]] = {}
    for file in [f for folder in ("cpu", "include") for f in (root / folder).rglob("*.h")]:
        for name in re.findall(r"(?m)^(?:struct|class|inline constexpr [\w:]+) (\w+)(?: \{| =|<)", file.read_text()):
            files.setdefault(name, set()).add(file.name)
    assert len(files) > 50
    assert not {name: sorted(where) for name, where in files.items() if len(where) > 1}
