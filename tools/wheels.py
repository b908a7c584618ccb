"""Builds, audits and tests release wheels: `make wheel`, or one step by `tools/wheels.py build | audit | test`.

The sdist is made first and unpacked, and every wheel is built from it. Without the manylinux image, zig's clang is the
compiler: it links against the C library of any older glibc. All wheels are built in one CMake tree, so that the
operator library, which knows no Python, is compiled once and is the same file in all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

ROOT = Path(__file__).resolve().parents[1]
BUILD, DIST = ROOT / "build" / "wheels", ROOT / "dist"
BIN = Path(sys.executable).parent
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

GLIBC = (2, 28)
PLATFORM = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_x86_64"
LIMIT = 5 * 2**20  # bytes of compiled code in a CPU wheel
FROM_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")  # loaded before ours, by torch
FROM_SYSTEM = ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2")

FROM_GCC = ("libstdc++.so.6", "libgcc_s.so.1")  # torch loads them too

OPTIONS = {"stdin": subprocess.DEVNULL, "check": True}


def main() -> None:
    """Run the steps that are asked for; all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", default=["build", "audit", "test"], metavar="build | audit | test")
    parser.add_argument("--python", nargs="+", default=list(VERSIONS), help="versions to build for, if they are here")
    parser.add_argument("--torch", default=pinned("torch"), help="release that the tests run with")
    parser.add_argument("--tests", choices=("all", "kernels", "smoke"), default="all")
    parser.add_argument(
        "--cuda", action="store_true", help="the CUDA wheels: version +cu13, with what `make cuda` built"
    )
    arguments = parser.parse_args()
    interpreters = {one: path for one in arguments.python if (path := find_python(one)) is not None}
    print(
        f"== Pythons: {', '.join(interpreters)}; not here: {', '.join({*arguments.python} - {*interpreters}) or 'none'}"
    )
    if "build" in arguments.steps:
        build(interpreters)
        if arguments.cuda:
            add_cuda([wheel_for(one, cuda=False) for one in interpreters])
    wheels = {one: wheel_for(one, cuda=arguments.cuda) for one in interpreters}
    if "audit" in arguments.steps:
        audit(list(wheels.values()))
    if "test" in arguments.steps:
        for one, wheel in wheels.items():
            test(wheel, interpreters[one], arguments.torch, arguments.tests)


def find_python(wanted: str) -> Path | None:
    """The interpreter of a version, on PATH or among those of pyenv."""
    folders = [*map(Path, os.environ["PATH"].split(os.pathsep)), *pyenv_folders(wanted)]
    for folder in folders:
        path = folder / f"python{wanted}"
        probe = [str(path), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if path.is_file() and os.access(path, os.X_OK):
            found = subprocess.run(probe, capture_output=True, text=True, check=False).stdout.strip()
            if found == wanted:  # a shim of pyenv may be there for a Python that is not
                return path
    return None


def pyenv_folders(wanted: str) -> list[Path]:
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return sorted(root.glob(f"versions/{wanted}.*/bin"), reverse=True)


def pinned(name: str) -> str:
    """The version of a package that was tested."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.split("==")[1].split(";")[0].strip() for line in lines if line.startswith(f"{name}=="))


def environment(path: Path, python: Path, *packages: str) -> Path:
    """Make an empty environment with packages; return its interpreter."""
    uv = [str(BIN / "uv")]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    links = [word for link in os.environ.get("PIP_FIND_LINKS", "").split() for word in ("--find-links", link)]
    inside = path / "bin" / "python"
    subprocess.run([*uv, "venv", "-q", "--clear", "--python", str(python), str(path)], **OPTIONS)
    if any(package.startswith("torch==") and package != f"torch=={pinned('torch')}" for package in packages):
        constraints = []
    subprocess.run([*uv, "pip", "install", "-q", "--python", str(inside), *constraints, *links, *packages], **OPTIONS)
    return inside


# ---- build ---------------------------------------------------------------------------------------------------------


def build(interpreters: dict[str, Path]) -> None:
    """Build the sdist, and a wheel from it for each interpreter."""
    DIST.mkdir(exist_ok=True)
    sdist = call_backend(Path(sys.executable), ROOT, f"build_sdist({str(DIST)!r})", {})
    print(f"== {sdist}: {(DIST / sdist).stat().st_size / 2**20:.1f} MiB")
    source = BUILD / "source"
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(DIST / sdist) as archive:
        archive.extractall(source.with_name("unpacked"), filter="data")
    (source.with_name("unpacked") / sdist.removesuffix(".tar.gz")).rename(source)
    for one, python in interpreters.items():
        inside = environment(BUILD / f"build-{one}", python, "setuptools", "wheel", "pybind11")
        shutil.rmtree(source / "build", ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            name = call_backend(inside, source, f"build_wheel({folder!r})", build_variables())
            exclude = [word for library in FROM_TORCH for word in ("--exclude", library)]
            command = [BIN / "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", "-w", DIST, *exclude]
            path = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
            subprocess.run([*map(str, command), f"{folder}/{name}"], env=path, capture_output=True, **OPTIONS)
        print(f"== {wheel_for(one, cuda=False).name}")


def call_backend(python: Path, source: Path, call: str, variables: dict[str, str]) -> str:
    """Call a hook of the build backend (PEP 517) and return the name of the file that it made."""
    code = f"from setuptools import build_meta; print(build_meta.{call})"
    run = subprocess.run(
        [str(python), "-c", code], cwd=source, env={**os.environ, **variables}, capture_output=True, text=True
    )
    if run.returncode:
        sys.exit(f"{call}: {run.stdout[-3000:]}\n{run.stderr[-3000:]}")
    return run.stdout.splitlines()[-1]


def build_variables() -> dict[str, str]:
    """What setup.py and CMake read: one build tree, zig as the compiler, torch's headers from this environment."""
    tools = BUILD / "zig"
    tools.mkdir(parents=True, exist_ok=True)
    target = f"-target x86_64-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    import torch
    import ziglang

    zig = Path(ziglang.__file__).with_name("zig")
    for name, command in (("c++", f"c++ {target}"), ("ar", "ar"), ("ranlib", "ranlib")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{zig}" {command} "$@"\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    options = {
        "CMAKE_CXX_COMPILER": tools / "c++",
        "CMAKE_AR": tools / "ar",
        "CMAKE_RANLIB": tools / "ranlib",
        "TORCH_DIR": Path(torch.__file__).parent,
        "CMAKE_MODULE_LINKER_FLAGS": "-Wl,--strip-debug",  # zig's C++ library comes with what a debugger reads
    }
    forget = ("_Python*", "PYTHON_*", "pybind11*")  # of the Python before
    return {
        "CMAKE_ARGS": " ".join(
            [f"-U{name}" for name in forget] + [f"-D{name}={value}" for name, value in options.items()]
        ),
        "CMAKE_GENERATOR": "Ninja",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "SOURCE_DATE_EPOCH": "315532800",  # the first date that a zip file can hold
        "TTS_KERNELS_BUILD_DIR": str(BUILD / "cmake"),
    }


def add_cuda(wheels: Sequence[Path]) -> None:
    """Make CUDA wheels of CPU wheels: the same files and the CUDA library, as local version +cu13."""
    library = ROOT / "build" / "cuda" / "_cuda.so"
    if not library.is_file():
        sys.exit(f"{library}: expected the CUDA library; `make cuda` builds it")
    needs = max(GLIBC, read_elf(library)[1])  # nvcc's host compiler is the system's, with the system's glibc
    tool = [sys.executable, "-m", "wheel"]
    for wheel in wheels:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*tool, "unpack", "-d", folder, str(wheel)], stdout=subprocess.DEVNULL, **OPTIONS)
            (unpacked,) = Path(folder).iterdir()
            (info,) = unpacked.glob("*.dist-info")
            shutil.copy(library, unpacked / "tts_kernels" / "_cuda.so")
            metadata = (info / "METADATA").read_text(encoding="utf-8")
            (info / "METADATA").write_text(re.sub(r"(?m)^(Version: .*)$", r"\1+cu13", metadata), encoding="utf-8")
            tags = (info / "WHEEL").read_text(encoding="utf-8")
            platform = f"manylinux_{needs[0]}_{needs[1]}_x86_64"
            (info / "WHEEL").write_text(tags.replace(PLATFORM, platform), encoding="utf-8")
            info.rename(info.with_name(info.name.replace(".dist-info", "+cu13.dist-info")))
            subprocess.run([*tool, "pack", "-d", str(DIST), str(unpacked)], stdout=subprocess.DEVNULL, **OPTIONS)


def wheel_for(python: str, *, cuda: bool) -> Path:
    """The wheel that was built for a Python."""
    tag = python.replace(".", "")
    found = sorted(DIST.glob(f"tts_kernels-*-cp{tag}-cp{tag}-manylinux*.whl"), key=lambda path: path.stat().st_mtime)
    found = [path for path in found if ("+cu" in path.name) == cuda]
    if not found:
        sys.exit(f"dist: expected a wheel for Python {python}")
    return found[-1]


# ---- audit ---------------------------------------------------------------------------------------------------------


def audit(wheels: Sequence[Path]) -> None:
    """Check tags, the glibc and the libraries that are needed, sizes, and that the operator library is one file."""
    libraries = set()
    for wheel in wheels:
        run = subprocess.run([str(BIN / "auditwheel"), "show", str(wheel)], capture_output=True, text=True, check=True)
        shown = " ".join(run.stdout.split())
        expect("manylinux" in shown, wheel, f"a manylinux tag from auditwheel, got {shown}")
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
            compiled = [name for name in archive.namelist() if name.endswith(".so")]
            size = sum(archive.getinfo(name).file_size for name in compiled if "_cuda" not in name)
            expect(size < LIMIT, wheel, f"less than {LIMIT} bytes of compiled code, got {size}")
            for name in compiled:
                audit_library(wheel, Path(archive.extract(name, folder)))
            libraries.add(hashlib.sha256(archive.read("tts_kernels/_ops.so")).hexdigest())
        print(
            f"== {wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB, {size / 2**20:.2f} MiB of it compiled (unpacked)"
        )
    expect(len(libraries) == 1, wheels[0], f"one operator library in all wheels, got {len(libraries)}")
    print(f"== one operator library, sha256 {libraries.pop()[:16]}")


def audit_library(wheel: Path, path: Path) -> None:
    """Check what a library needs and what it exports."""
    needed, glibc, exported = read_elf(path)
    if "_cuda" in path.name:
        expect(
            needed <= {*FROM_TORCH, *FROM_SYSTEM, *FROM_GCC},
            wheel,
            f"{path.name} to need no CUDA library, got {needed}",
        )
        return
    expect(needed <= {*FROM_TORCH, *FROM_SYSTEM}, wheel, f"{path.name} to need torch and glibc alone, got {needed}")
    expect(glibc <= GLIBC, wheel, f"{path.name} to need glibc {GLIBC} at most, got {glibc}")
    entry = {"PyInit__host"} if "_host" in path.name else set()
    expect(exported == entry, wheel, f"{path.name} to export {entry or 'nothing'}, got {sorted(exported)[:5]}")
    if not entry:
        command = [str(BIN / "torch-abi-audit"), str(path)]
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        stable = re.search(r"Torch ABI: +STABLE\n +Min torch: +2\.10\.", shown)
        expect(stable is not None, wheel, f"{path.name} to use torch's stable ABI of 2.10 alone, got {shown}")


def read_elf(path: Path) -> tuple[set[str], tuple[int, ...], set[str]]:
    """The libraries that a library needs, the glibc that its symbols need, the names that it exports."""
    with open(path, "rb") as file:
        sections = list(ELFFile(file).iter_sections())
        dynamic = [section for section in sections if isinstance(section, DynamicSection)]
        needed = {tag.needed for section in dynamic for tag in section.iter_tags("DT_NEEDED")}
        wanted = [name for section in sections if isinstance(section, GNUVerNeedSection) for name in names_of(section)]
        symbols = [one for section in sections if section.name == ".dynsym" for one in section.iter_symbols()]
        defined = [one for one in symbols if one["st_shndx"] != "SHN_UNDEF"]
        exported = {one.name for one in defined if one["st_info"]["bind"] != "STB_LOCAL"}
    matches = [re.fullmatch(r"GLIBC_([\d.]+)", name) for name in wanted]
    glibc = [tuple(map(int, match[1].split("."))) for match in matches if match]
    return needed, max(glibc, default=(0,)), exported


def names_of(section: GNUVerNeedSection) -> Iterator[str]:
    for _, entries in section.iter_versions():
        yield from (entry.name for entry in entries)


def expect(condition: bool, wheel: Path, what: str) -> None:
    if not condition:
        sys.exit(f"{wheel.name}: expected {what}")


# ---- test ----------------------------------------------------------------------------------------------------------

KERNELS = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py"))]
SMOKE = (
    "backend",
    "forest",
    "kv_cache",
    "plan",
    "prune",
    "symbols",
)  # what the module of each Python serves, above all
TESTS = {
    "all": [*KERNELS, str(ROOT / "tests" / "search"), str(ROOT / "tests" / "models")],
    "kernels": KERNELS,  # at every instruction set that the processor has (test_instruction_sets.py)
    "smoke": [str(ROOT / "tests" / f"test_{name}.py") for name in SMOKE],
}
PACKAGES = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "numpy")
# Deselected: they read what is built in the checkout, not what is installed.
CHECKOUT_ONLY = ("-m", "not slow and not gpu", "--ignore", str(ROOT / "tests" / "test_gpu_static.py"))


def test(wheel: Path, python: Path, torch: str, tests: str) -> None:
    """Install a wheel into an empty environment and run the tests there, from an empty folder."""
    print(f"== {wheel.name} with torch {torch}: {tests} tests", flush=True)
    extra = "[search,plot]" if tests == "all" else ""
    with tempfile.TemporaryDirectory() as folder:
        inside = environment(Path(folder) / "env", python, f"torch=={torch}", f"{wheel}{extra}", *PACKAGES)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TTS_"))}
        variables |= {"OMP_NUM_THREADS": "1"}
        work = Path(folder) / "work"
        work.mkdir()
        where = [str(inside), "-c", "import tts_kernels, tts_search; print(tts_kernels.__file__, tts_search.__file__)"]
        shown = subprocess.run(where, cwd=work, env=variables, capture_output=True, text=True, check=True).stdout
        expect(shown.count(folder) == 2, wheel, f"both packages from the environment, got {shown}")
        pytest = [str(inside), "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-n", "2"]
        pytest += ["-p", "no:cacheprovider", "--dist", "worksteal", *CHECKOUT_ONLY]
        subprocess.run([*pytest, *TESTS[tests]], cwd=work, env=variables, **OPTIONS)


if __name__ == "__main__":
    main()
