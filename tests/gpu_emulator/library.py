"""The CUDA operators on CPU tensors: their glue and host code unchanged, their kernels in the emulator.

The library consists of csrc/ops/cuda, csrc/cuda's host code and cudart.cpp. It registers its operators for the CPU, and
so replaces the CPU's kernels in this process. `plugin.py` does this for pytest.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from .build import HERE, _cached, _includes, _run, _version, compile_cuda, require
from .kernel import Buffer, Kernel, Module, _Pointer
from .translate import Parameter

ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
INCLUDES = (CSRC / "include", CSRC / "cpu", CSRC / "host")
# Blocks as small as ThreadSanitizer needs them to tell a few apart, thread by thread.
_DEFINES = {None: (), "address": (), "thread": ("-DTTS_CUDA_MOST_THREADS=64",)}
_TIMEOUT = 600.0  # seconds for one launch: of thousands of blocks, on a busy machine
_WRAPPED = ("torch_get_const_data_ptr", "torch_get_mutable_data_ptr", "aoti_torch_empty_strided")

T = TypeVar("T")

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_bool,
    ctypes.POINTER(ctypes.c_void_p),
)
_BUFFER = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64)


@dataclass(frozen=True)
class Launched:
    """One launch, for tests that count them."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int


@dataclass
class _Arguments:
    """What `Kernel` takes a launch's parameters as: bytes, buffers, and where pointers to them stand."""

    bytes: bytes
    buffers: list[Buffer]
    pointers: list[_Pointer] = field(default_factory=list)

    def __post_init__(self) -> None:
        words = memoryview(self.bytes[: len(self.bytes) // 8 * 8]).cast("Q")
        for i, word in enumerate(words):
            if any(b.address <= word < b.address + b.size for b in self.buffers):
                self.pointers.append(_Pointer(-1, 8 * i, word))


class Library:
    """The emulated operators, loaded into torch.

    Parameters
    ----------
    operators
        Names of files of csrc/ops/cuda without the suffix; those not named stay the CPU's own.
    sanitize
        As in `load`.
    seed
        As in `Kernel.launch`.
    csrc
        Where the sources are: tests plant faults in copies of them.
    """

    def __init__(self, operators: Iterable[str], sanitize: str | None = None, seed: int = 0, csrc: Path = CSRC) -> None:
        self.sanitize, self.seed = sanitize, seed
        self.fault: Exception | None = None
        self.launches: list[Launched] = []
        self._buffers: dict[int, int] = {}
        build = _Build(csrc.resolve(), _DEFINES[sanitize])
        sources = build.kernel_sources(operators)
        path = build.library(sorted(operators), sources)
        self._kernels = _Kernels(build, sources, sanitize)
        self._callbacks = (_LAUNCH(self._launch), _BUFFER(self._note))
        torch.ops.load_library(str(path))
        ctypes.CDLL(str(path)).emulator_connect(*self._callbacks)

    def _note(self, address: int, size: int) -> None:
        if size == 0:
            self._buffers.clear()
        else:
            self._buffers[address] = max(size, self._buffers.get(address, 0))

    def _launch(
        self,
        name: bytes,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        limit: int,
        together: bool,
        args: Sequence[int],
    ) -> bool:
        try:
            kernel = self._kernels[name.decode()]
            self.launches.append(Launched(kernel.name, tuple(grid[:3]), tuple(block[:3]), shared))
            launch = kernel._sized(grid[:3], block[:3], shared, limit)
            launch.seed, launch.timeout, launch.cooperative = self.seed, _TIMEOUT, together
            none = torch.empty(0)  # the operator keeps the memory
            buffers = [Buffer(a, size, f"buffer {i}", none) for i, (a, size) in enumerate(self._buffers.items())]
            arguments = _Arguments(_bytes(kernel.params, args), buffers)
            if self.sanitize is None:
                kernel._run_here(launch, arguments)  # type: ignore[arg-type]
            else:
                kernel._run_apart(launch, arguments)  # type: ignore[arg-type]
        except Exception as fault:  # nothing may pass through the operator's C++
            self.fault = fault
            print(fault)
            return False
        return True


class _Kernels:
    """Kernels by name, each translated and compiled alone when it is first asked for: attention has many large ones."""

    def __init__(self, build: _Build, sources: Iterable[Path], sanitize: str | None) -> None:
        self._texts = _for_each(build.ptx, sources)
        self._sanitize = sanitize

    @functools.cache  # noqa: B019  (one library a process)
    def __getitem__(self, name: str) -> Kernel:
        text = next(t for t in self._texts if f".entry {name}(" in t)
        return Module(text, self._sanitize, only=name).kernel(name)


def _bytes(params: Sequence[Parameter], args: Sequence[int]) -> bytes:
    data = bytearray(params[-1].offset + params[-1].size if params else 0)
    for param, address in zip(params, args, strict=False):
        data[param.offset : param.offset + param.size] = ctypes.string_at(address, param.size)
    return bytes(data)


def operators() -> list[str]:
    """Every operator that has CUDA kernels."""
    return sorted(path.stem for path in (CSRC / "ops/cuda").glob("*.cpp"))


# ---- building ----


def _for_each(make: Callable[[Path], T], sources: Iterable[Path]) -> list[T]:
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(make, sources))


@dataclass(frozen=True)
class _Build:
    """Compiles the operators of a folder like csrc; `defines` are nvcc's, for kernels and their host code."""

    csrc: Path
    defines: tuple[str, ...]

    @property
    def includes(self) -> tuple[Path, ...]:
        return (self.csrc / "include", self.csrc / "cpu", self.csrc / "host")

    def kernel_sources(self, names: Iterable[str]) -> list[Path]:
        """The .cu files behind the headers of csrc/cuda that the operators include."""
        sources = set()
        for name in names:
            seen: dict[Path, str] = {}
            _includes(self.csrc / f"ops/cuda/{name}.cpp", self.includes, seen)
            sources |= {p.with_suffix(".cu") for p in seen if p.parent.name == "cuda" and p.with_suffix(".cu").exists()}
        return sorted(sources)

    def ptx(self, source: Path) -> str:
        return compile_cuda(source, options=self.defines, include_dirs=self.includes)

    def library(self, names: Sequence[str], kernels: Sequence[Path]) -> Path:
        glue = [self.csrc / f"ops/cuda/{name}.cpp" for name in names] + [HERE / "cudart.cpp"]
        objects = _for_each(self._object, [*glue, *kernels])
        wrap = [f"-Wl,--wrap={name}" for name in _WRAPPED]
        link = [require("cxx"), "-shared", *wrap, *map(str, objects), f"-L{_torch()}/lib", "-ltorch_cpu"]

        def make(folder: Path) -> None:
            _run([*link, "-o", str(folder / "_emulated.so")])

        return _cached([_version(require("cxx")), *link], "_emulated.so", make)

    def _object(self, source: Path) -> Path:
        """A glue file by the C++ compiler; by nvcc, which knows where CUDA's headers are, host code of the rest."""
        seen: dict[Path, str] = {}
        _includes(source.resolve(), self.includes, seen)
        flags = [
            "-std=c++20",
            *(f"-I{d}" for d in self.includes),
            f"-I{_torch()}/include",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ]
        if source.parent.parent.name == "ops":
            compiler = require("cxx")
            flags += ["-O1", "-fPIC", "-fvisibility=hidden", "-DTTS_EMULATED"]
        else:
            compiler = require("nvcc")
            flags += ["-gencode=arch=compute_80,code=compute_80", "-cudart=none"]  # machine code would take longest
            flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", *self.defines]

        def make(folder: Path) -> None:
            _run([compiler, *flags, "-c", str(source), "-o", str(folder / "o")])

        return _cached([_version(compiler), *flags, *(f"{p}\n{text}" for p, text in sorted(seen.items()))], "o", make)


def _torch() -> str:
    return str(Path(torch.__file__).parent)
