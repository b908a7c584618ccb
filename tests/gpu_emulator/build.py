"""Finds the compilers; compiles .cu to PTX, and PTX to a library or, under a sanitizer, a program. Results are cached.

The cache is in ``$XDG_CACHE_HOME/tts_kernels/gpu_emulator`` (or ``~/.cache/...``), with one folder for each hash of the
inputs: source, options, compiler, the runtime. Nothing is written beside the sources.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME = HERE / "runtime"
# Bytes of translated C++ up to which a sanitizer's reports name lines. clang carries the line of every register's last
# assignment along every edge of the control flow: 0.3 MB take it 12 s and 1.6 GB, and 1.3 s and 0.1 GB without lines.
MOST_WITH_LINES = 500_000
SANITIZERS = {None: "", "address": "EMU_ASAN", "thread": "EMU_TSAN"}


class ToolMissing(RuntimeError):  # noqa: N818
    """A compiler that this step needs is not installed."""


@functools.cache
def nvcc() -> str | None:
    """nvcc: of the PATH, of CUDA_HOME, or of the PyPI package nvidia-cuda-nvcc."""
    candidates = [shutil.which("nvcc")]
    candidates += [f"{os.environ[v]}/bin/nvcc" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    candidates += ["/usr/local/cuda/bin/nvcc"]
    try:
        import nvidia  # type: ignore[import-not-found]

        candidates += [str(p) for root in nvidia.__path__ for p in Path(root).glob("*/bin/nvcc")]
    except ImportError:
        pass
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


@functools.cache
def clang() -> str | None:
    """The newest clang++ that has the sanitizers' runtime; g++ knows no TSan fibers in time, so it must be clang."""
    names = ["clang++", *(f"clang++-{v}" for v in range(25, 14, -1))]
    found = (shutil.which(name) for name in names)
    return next((path for path in found if path and _links_sanitizer(path)), None)


def _links_sanitizer(compiler: str) -> bool:
    runtime = subprocess.run(
        [compiler, "-print-file-name=libclang_rt.tsan.a"], capture_output=True, text=True, check=False
    ).stdout.strip()
    resources = subprocess.run([compiler, "-print-resource-dir"], capture_output=True, text=True, check=False)
    return os.path.isabs(runtime) or any(Path(resources.stdout.strip()).glob("lib/*/libclang_rt.tsan*.a"))


@functools.cache
def cxx() -> str | None:
    return next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


def require(tool: str) -> str:
    """Path of "nvcc", "clang" or "cxx".

    Raises
    ------
    ToolMissing
        With what to install.
    """
    path = {"nvcc": nvcc, "clang": clang, "cxx": cxx}[tool]()
    if path is None:
        raise ToolMissing(f"no {tool}: `make gpu-tools` installs the compilers of the GPU emulator")
    return path


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tts_kernels" / "gpu_emulator"


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _machine() -> str:
    """The processor's features: -march=native is part of what is cached."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return ""
    return flags[1] if flags else ""


@functools.cache
def _runtime() -> str:
    """A hash of what translated code is compiled with; the translation itself is hashed beside it."""
    digest = hashlib.sha256(_machine().encode())
    for path in sorted(RUNTIME.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _cached(key: Sequence[str], name: str, make: Callable[[Path], None]) -> Path:
    """The file `name` that `make(folder)` writes, made once for each key; safe among processes."""
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:24]
    final = cache_folder() / digest
    if not (final / name).exists():
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as work:
            built = Path(work) / "out"
            built.mkdir()
            make(built)
            try:
                built.rename(final)
            except OSError:  # another process was faster
                if not (final / name).exists():
                    raise
    return final / name


def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}{done.stdout}")


def _includes(source: Path, include_dirs: Sequence[Path], seen: dict[Path, str]) -> None:
    """The quoted includes of a file, deep: they are part of its hash."""
    if source in seen:
        return
    seen[source] = source.read_text()
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', seen[source], re.M):
        for folder in (source.parent, *include_dirs):
            if (folder / name).exists():
                _includes((folder / name).resolve(), include_dirs, seen)
                break


def compile_cuda(
    source: str | Path, arch: str = "sm_80", options: Sequence[str] = (), include_dirs: Sequence[Path] = ()
) -> str:
    """PTX of a .cu file, with line numbers.

    Raises
    ------
    ToolMissing
        There is no nvcc.
    RuntimeError
        nvcc's errors.
    """
    compiler = require("nvcc")
    source = Path(source).resolve()
    seen: dict[Path, str] = {}
    _includes(source, include_dirs, seen)
    flags = ["-std=c++20", f"-arch={arch}", "-ptx", "-lineinfo", "-O3", *options, *(f"-I{d}" for d in include_dirs)]

    def make(folder: Path) -> None:
        _run([compiler, *flags, "-o", str(folder / "kernel.ptx"), str(source)])

    key = [_version(compiler), *flags, *(f"{p}\n{text}" for p, text in sorted(seen.items()))]
    return _cached(key, "kernel.ptx", make).read_text()


def compile_translation(cpp: str, sanitize: str | None, lines: bool = False) -> Path:
    """A shared library of translated C++ and the runtime; with a sanitizer, a program that replays launches.

    `lines` lets the sanitizer's reports name them.
    """
    compiler = require("clang") if sanitize else clang() or require("cxx")
    defines = [f"-D{SANITIZERS[sanitize]}"] if sanitize else []
    common = [
        "-std=c++20",
        "-O1",
        *(["-g1", "-gdwarf-4"] if lines else ["-g0"]),
        "-march=native",
        "-w",
        "-fPIC",
        f"-I{HERE}",
        *defines,
    ]
    exact = ["-ffp-contract=off", "-frounding-math", "-fno-strict-aliasing", "-fno-math-errno"]
    instrument = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"] if sanitize else []

    def make_object(source: str) -> Callable[[Path], None]:
        return lambda folder: _run([compiler, *common, "-O2", "-c", str(RUNTIME / source), "-o", str(folder / "o")])

    def make(folder: Path) -> None:
        (folder / "kernel.cpp").write_text(cpp)
        _run([compiler, *common, *exact, *instrument, "-c", "kernel.cpp", "-o", "kernel.o"], cwd=folder)
        sources = ["scheduler.cpp", "replay.cpp"] if sanitize else ["scheduler.cpp"]
        objects = [str(_cached([*key, s], "o", make_object(s))) for s in sources]
        link = [f"-fsanitize={sanitize}"] if sanitize else ["-shared"]
        _run([compiler, *link, "kernel.o", *objects, "-o", "kernel"], cwd=folder)
        (folder / "kernel.o").unlink()

    key = [_version(compiler), _runtime(), *common, *exact, *instrument]
    return _cached([*key, cpp], "kernel", make)
