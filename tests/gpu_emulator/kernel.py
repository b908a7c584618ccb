"""Load kernels and launch them: in this process, or under a sanitizer in one of its own."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import build, ptx, report
from .errors import KernelFault
from .translate import Parameter, Translation, translate

Dim = int | Sequence[int]
SHARED_LIMIT = 227 * 1024  # of the largest GPUs
# Threads that TSan tells apart are 255: of a block, or of a launch; with blocks that are one thread each, and those
# that carry clocks about.
MOST_APART = 240


class Pointers:
    """A device array of pointers to tensors, as an argument or as a field of a `Struct`."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = list(tensors)


class Struct:
    """A struct passed by value, laid out as C does: tensors are pointers, other fields are ctypes values or numbers.

    A plain int is 4 bytes, a plain float a float; say ``ctypes.c_int64(n)`` for others. Nested structs are allowed.
    """

    def __init__(self, *fields: Any) -> None:
        self.fields = fields


def load(
    source: str | Path,
    name: str | None = None,
    *,
    sanitize: str | None = None,
    alone: bool = False,
    arch: str = "sm_80",
    options: Sequence[str] = (),
    include_dirs: Sequence[str | Path] = (),
) -> Kernel:
    """Translate and compile a kernel for this machine.

    Parameters
    ----------
    source : str or Path
        A .cu or .ptx file, or the text of a PTX module (Triton's ``compiled.asm["ptx"]``).
    name : str, optional
        The kernel's name in the PTX, or a part that only one name has (C++ names are mangled). Needed if there are
        several.
    sanitize : {None, "address", "thread"}
        None runs in this process, with bounds, alignment and barriers checked. The others run each launch in a process
        of its own under clang's sanitizer.
    alone : bool
        Translate this kernel without the module's others: sooner done where they are large.
    arch, options, include_dirs
        For nvcc; a .ptx file ignores them.

    Raises
    ------
    UnsupportedPTX
        The module holds an instruction, or a modifier of one, that the emulator does not know.
    build.ToolMissing
        There is no nvcc (for a .cu file), no C++ compiler, or no clang (for a sanitizer).
    ValueError
        No kernel, or several, of that name.
    """
    if sanitize not in build.SANITIZERS:
        raise ValueError(f"sanitize must be None, 'address' or 'thread', got {sanitize!r}")
    text = _ptx_of(source, arch, tuple(options), tuple(map(Path, include_dirs)))
    return Module(text, sanitize, only=name if alone else None).kernel(name)


def _ptx_of(source: str | Path, arch: str, options: tuple[str, ...], include_dirs: tuple[Path, ...]) -> str:
    if isinstance(source, str) and "\n" in source:
        return source
    path = Path(source)
    if path.suffix == ".cu":
        return build.compile_cuda(path, arch, options, include_dirs)
    return path.read_text()


@functools.lru_cache(maxsize=64)
def _translated(text: str, only: str | None) -> Translation:
    module = ptx.parse(text)
    if only is not None:
        kept = _pick([f.name for f in module.functions.values() if f.entry], only)
        module.functions = {n: f for n, f in module.functions.items() if not f.entry or n == kept}
    return translate(module)


def _pick(names: Sequence[str], name: str | None) -> str:
    """The name that is `name`, or the only one that contains it."""
    matching = [n for n in names if name is None or n == name] or [n for n in names if name and name in n]
    if len(matching) != 1:
        raise ValueError(f"name must pick one kernel of {list(names)}, got {name!r}")
    return matching[0]


class Module:
    """A translated PTX module; its kernels share its global variables."""

    def __init__(self, text: str, sanitize: str | None = None, only: str | None = None) -> None:
        self.text, self.sanitize = text, sanitize
        self.translation = _translated(text, only)
        self.path = build.compile_translation(self.translation.source, sanitize)
        self.library = None if sanitize else _open(self.path)

    def program_with_lines(self) -> Path | None:
        """The same program, whose reports name lines; None if that is too much for the compiler."""
        source = self.translation.source
        if len(source) > build.MOST_WITH_LINES:
            return None
        return build.compile_translation(source, self.sanitize, lines=True)

    def kernel(self, name: str | None = None) -> Kernel:
        """The kernel of that name, or the one whose name contains it."""
        return Kernel(self, _pick(list(self.translation.kernels), name))

    def variable(self, name: str) -> torch.Tensor:
        """The bytes of a ``__device__`` or ``__constant__`` variable, shared with the kernels."""
        if self.library is None:
            raise ValueError("variables are at hand only without a sanitizer")
        size = ctypes.c_uint64()
        address = self.library.emu_variable(name.encode(), ctypes.byref(size))
        if not address:
            raise ValueError(f"name must be a global variable of the module, got {name!r}")
        buffer = (ctypes.c_uint8 * size.value).from_address(address)
        return torch.frombuffer(buffer, dtype=torch.uint8)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_smem", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("timeout", ctypes.c_double),
        ("cooperative", ctypes.c_uint32),
        ("split_masks", ctypes.c_uint32),
        ("duplicate_stores", ctypes.c_uint32),
        ("first_apart", ctypes.c_uint32),
        ("last_apart", ctypes.c_uint32),
    )


class _Fault(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char * 32),
        ("line", ctypes.c_uint32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("text", ctypes.c_char * 2048),
    )


@functools.cache
def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    library.emu_add_buffer.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p)
    library.emu_add_buffer.restype = None
    library.emu_clear_buffers.restype = None
    library.emu_variable.argtypes = (ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64))
    library.emu_variable.restype = ctypes.c_uint64
    library.emu_launch.argtypes = (
        ctypes.c_char_p,
        ctypes.POINTER(_Launch),
        ctypes.c_char_p,
        ctypes.c_uint32,
        ctypes.POINTER(_Fault),
    )
    return library


@dataclass(frozen=True)
class Buffer:
    """Bytes that a kernel may touch: the reach of a tensor, from its first element to the end of its last."""

    address: int
    size: int
    name: str
    owner: torch.Tensor  # keeps the memory alive


@dataclass(frozen=True)
class _Pointer:
    """8 bytes at `at` of the parameters (holder -1) or of a buffer that hold the address of a tensor."""

    holder: int
    at: int
    address: int


class _Arguments:
    """The bytes of a launch's parameters, the buffers that they point to, and where the pointers stand."""

    def __init__(self, params: Sequence[Parameter], args: Sequence[Any], buffers: Sequence[torch.Tensor]) -> None:
        if len(args) != len(params):
            raise ValueError(f"args must be {len(params)} values, one a parameter, got {len(args)}")
        self.buffers: list[Buffer] = []
        self.pointers: list[_Pointer] = []
        self.bytes = bytearray(params[-1].offset + params[-1].size if params else 0)
        for i, (param, arg) in enumerate(zip(params, args, strict=True)):
            data = self._encode(arg, param, f"args[{i}]", -1, param.offset)
            if len(data) != param.size:
                raise ValueError(f"args[{i}] must be {param.size} bytes (.{param.type} {param.name}), got {len(data)}")
            self.bytes[param.offset : param.offset + param.size] = data
        for i, tensor in enumerate(buffers):
            self._buffer(tensor, f"buffers[{i}]")

    def _encode(self, arg: Any, param: Parameter | None, name: str, holder: int, at: int) -> bytes:
        if isinstance(arg, torch.Tensor):
            return self._pointer(arg, name, holder, at)
        if isinstance(arg, Pointers):
            return self._pointer(self._table(arg, name), name, holder, at)
        if isinstance(arg, Struct):
            return self._struct(arg, name, holder, at)
        if arg is None:
            return bytes(8)
        if isinstance(arg, ctypes._SimpleCData | ctypes.Structure | ctypes.Array):
            return bytes(arg)
        if isinstance(arg, bool | int | float):
            return _number(arg, param)
        raise TypeError(f"{name} must be a tensor, a number, a ctypes value, Pointers, Struct or None, got {type(arg)}")

    def _pointer(self, tensor: torch.Tensor, name: str, holder: int, at: int) -> bytes:
        self._buffer(tensor, name)
        self.pointers.append(_Pointer(holder, at, tensor.data_ptr()))
        return struct.pack("<Q", tensor.data_ptr())

    def _buffer(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must be a CPU tensor, got one on {tensor.device}")
        if tensor.numel():
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            self.buffers.append(Buffer(tensor.data_ptr(), reach * tensor.element_size(), name, tensor))

    def _table(self, pointers: Pointers, name: str) -> torch.Tensor:
        table = torch.tensor([t.data_ptr() for t in pointers.tensors], dtype=torch.int64)
        for i, tensor in enumerate(pointers.tensors):
            self._buffer(tensor, f"{name}[{i}]")
            self.pointers.append(_Pointer(table.data_ptr(), 8 * i, tensor.data_ptr()))
        return table

    def _struct(self, value: Struct, name: str, holder: int, at: int) -> bytes:
        data, align = bytearray(), 1
        for i, item in enumerate(value.fields):
            inner = _alignment(item)
            align = max(align, inner)
            data += bytes(-len(data) % inner)
            data += self._encode(item, None, f"{name}.{i}", holder, at + len(data))
        return bytes(data + bytes(-len(data) % align))


def _alignment(item: Any) -> int:
    if isinstance(item, Struct):
        return max((_alignment(f) for f in item.fields), default=1)
    if isinstance(item, bool | int | float):
        return 4
    if isinstance(item, ctypes._SimpleCData | ctypes.Structure | ctypes.Array):
        return ctypes.alignment(item)
    return 8


def _number(value: float, param: Parameter | None) -> bytes:
    if param is None or param.type == "b8":
        return struct.pack("<f" if isinstance(value, float) else "<i", value)
    if param.type in ("f32", "f64"):
        return struct.pack({"f32": "<f", "f64": "<d"}[param.type], value)
    if isinstance(value, float):
        return struct.pack("<d" if param.size == 8 else "<f", value)
    return (int(value) % 2 ** (8 * param.size)).to_bytes(param.size, "little")


class Kernel:
    """A kernel that can be launched on CPU tensors."""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.name = module, name
        self.params = module.translation.kernels[name]
        self.static_shared = module.translation.static_shared[name]
        self.most_threads = module.translation.most_threads[name]

    def launch(
        self,
        grid: Dim,
        block: Dim,
        args: Sequence[Any] = (),
        *,
        dynamic_smem: int = 0,
        seed: int = 0,
        buffers: Sequence[torch.Tensor] = (),
        cooperative: bool = False,
        split_masks: bool = False,
        duplicate_stores: bool = False,
        timeout: float = 60.0,
    ) -> None:
        """Run the kernel; tensors are changed in place.

        Parameters
        ----------
        grid, block : int or up to three
            Their sizes.
        args : sequence
            One value a parameter: a CPU tensor (its address), a number, a ctypes value, `Pointers`, `Struct`, or None
            (a null pointer). A view passes its first element's address, and may be touched from there to its last
            element only.
        dynamic_smem : int
            Bytes of dynamic shared memory.
        seed : int
            0 runs blocks and threads in order; any other shuffles both and switches threads at atomics.
        buffers : sequence of tensors
            More memory that the kernel may touch.
        cooperative : bool
            Run all blocks at once, as grid-wide barriers need; otherwise one after another.
        split_masks : bool
            Let ``activemask`` see only some of the lanes that are converged.
        duplicate_stores : bool
            Let threads of a block store one value to one shared word by one statement between two barriers: no race,
            then, under ``sanitize="thread"``. Triton does so with tiles that have fewer elements than threads.
        timeout : float
            Seconds until a loop counts as a hang.

        Raises
        ------
        KernelFault
            The kernel did something wrong; see `KernelFault.kind`. Buffers then hold what had been written.
        ValueError
            Sizes that no GPU takes, a block of more threads than ThreadSanitizer tells apart, or arguments that do not
            match the parameters.
        """
        launch = self._sized(grid, block, dynamic_smem)
        launch.seed, launch.timeout = seed, timeout
        launch.cooperative, launch.split_masks = cooperative, split_masks
        launch.duplicate_stores = duplicate_stores
        arguments = _Arguments(self.params, args, buffers)
        if self.module.library is not None:
            self._run_here(launch, arguments)
        else:
            self._run_apart(launch, arguments)

    def _sized(self, grid: Dim, block: Dim, dynamic_smem: int, shared_limit: int = SHARED_LIMIT) -> _Launch:
        """A launch of these sizes, if a GPU takes them; else ValueError."""
        launch = _Launch(
            _dims(grid, "grid", (2**31 - 1, 65535, 65535)), _dims(block, "block", (1024, 1024, 64)), dynamic_smem
        )
        threads, most = launch.block[0] * launch.block[1] * launch.block[2], self.most_threads
        if threads > most:
            raise ValueError(f"block must hold at most {most} threads, got {threads}")
        if not 0 <= dynamic_smem <= shared_limit - self.static_shared:
            raise ValueError(f"dynamic_smem must be in [0, {shared_limit - self.static_shared}], got {dynamic_smem}")
        return launch

    def _run_here(self, launch: _Launch, arguments: _Arguments) -> None:
        library = self.module.library
        assert library is not None
        library.emu_clear_buffers()
        for buffer in arguments.buffers:
            library.emu_add_buffer(buffer.address, buffer.size, buffer.name.encode())
        fault = _Fault()
        data = bytes(arguments.bytes)
        if library.emu_launch(self.name.encode(), ctypes.byref(launch), data, len(data), ctypes.byref(fault)):
            raise self._fault(fault)

    def _fault(self, fault: _Fault) -> KernelFault:
        return self._fault_at(
            fault.kind.decode(),
            fault.text.decode(errors="replace"),
            tuple(fault.block),
            tuple(fault.thread),
            fault.line,
        )

    def _fault_at(
        self, kind: str, text: str, block: tuple[int, ...], thread: tuple[int, ...], line: int
    ) -> KernelFault:
        instruction = self.module.text.split("\n")[line - 1].strip() if line else ""
        return KernelFault(
            kind, text, block, thread, line, instruction, self.module.translation.locations.get(line, "")
        )

    # -- in a process of its own --
    def _run_apart(self, launch: _Launch, arguments: _Arguments) -> None:
        allocations, patience = _allocations(arguments.buffers), 60 + 20 * launch.timeout
        request, *requests = self._requests(launch, arguments, allocations)
        done = _replay(self.module.path, request, patience)
        fault = self._read_reply(done.answer, allocations) if done.answer else None
        if done.failed:  # first: a race may be what led to the fault
            raise self._sanitizer_fault(done, request, patience)
        if fault:
            raise fault
        for again in requests:
            done = _replay(self.module.path, again, patience)
            if done.failed:
                raise self._sanitizer_fault(done, again, patience)

    def _requests(self, launch: _Launch, arguments: _Arguments, allocations: list[Buffer]) -> list[bytes]:
        """The launch; under ThreadSanitizer once more with the threads of the first and the last block told apart from
        all others, if blocks meet and have more threads than it can tell apart.
        """
        ways = [(0, 0)]
        threads, blocks = math.prod(launch.block), math.prod(launch.grid)
        if self.module.sanitize == "thread":
            if threads > MOST_APART:
                raise ValueError(f"block must hold at most {MOST_APART} threads for ThreadSanitizer, got {threads}")
            if self.module.translation.blocks_meet and threads * blocks > MOST_APART:
                if 2 * threads + blocks - 2 <= MOST_APART:
                    ways.append((1, 1))
                elif threads + blocks - 1 <= MOST_APART:
                    ways += [(1, 0), (0, 1)]
                else:
                    raise ValueError(
                        f"grid must hold at most {MOST_APART + 1 - threads} blocks of {threads} threads, which meet in "
                        f"global memory, for ThreadSanitizer, got {blocks}"
                    )
        requests = []
        for launch.first_apart, launch.last_apart in ways:
            requests.append(self._request(launch, arguments, allocations))
        return requests

    def _request(self, launch: _Launch, arguments: _Arguments, allocations: list[Buffer]) -> bytes:
        lines = [f"kernel {self.name}"]
        lines += [
            f"{what} {' '.join(map(str, dims))}" for what, dims in (("grid", launch.grid), ("block", launch.block))
        ]
        flags = (launch.cooperative, launch.split_masks, launch.duplicate_stores, launch.first_apart, launch.last_apart)
        options = (launch.dynamic_smem, launch.seed, 20 * launch.timeout, *flags)
        lines += ["options " + " ".join(map(str, options)), f"params {len(arguments.bytes)}"]
        lines += [f"buffer {b.size} {b.address % 256} {b.name}" for b in allocations]
        for pointer in arguments.pointers:
            target = _holder(allocations, pointer.address)
            if target is None:
                continue  # an empty tensor: whatever the address, nobody may follow it
            holder, at = -1, pointer.at
            if pointer.holder >= 0:
                found = _holder(allocations, pointer.holder)
                assert found is not None
                holder, at = found, pointer.at + pointer.holder - allocations[found].address
            lines.append(f"pointer {holder} {at} {target} {pointer.address - allocations[target].address}")
        head = "\n".join([*lines, "data\n"]).encode()
        return head + bytes(arguments.bytes) + b"".join(ctypes.string_at(b.address, b.size) for b in allocations)

    def _read_reply(self, answer: bytes, allocations: list[Buffer]) -> KernelFault | None:
        failed = struct.unpack_from("<i", answer)[0]
        fault = _Fault.from_buffer_copy(answer, 4)
        at = 4 + ctypes.sizeof(_Fault)
        for buffer in allocations:
            ctypes.memmove(buffer.address, answer[at : at + buffer.size], buffer.size)
            at += buffer.size
        return self._fault(fault) if failed else None

    def _sanitizer_fault(self, done: _Replayed, request: bytes, patience: float) -> KernelFault:
        """The first thing that a sanitizer reported, in a second run with lines where there is one."""
        program = self.module.path
        with_lines = self.module.program_with_lines()
        if with_lines and (again := _replay(with_lines, request, patience)).failed:
            program, done = with_lines, again
        found = report.parse(done.text, program)
        if found is None:
            return KernelFault("crash", f"the emulator's process ended with {done.code}:\n{done.text[-2000:]}")
        told = [self._tell(access) for access in found.accesses]
        first = found.accesses[0] if found.accesses else report.Access("", (), (), 0)
        kind = {"address": "address", "thread": "race"}[self.module.sanitize or "address"]
        return self._fault_at(kind, "\n  ".join([found.title, *told]), first.block, first.thread, first.line)

    def _tell(self, access: report.Access) -> str:
        thread = f" thread {access.thread}" if access.thread else ""
        who = f"block {access.block}{thread}" if access.block else "the runtime"
        if not access.line:  # the runtime's own, or the kernel is too large for lines
            return f"{access.what} by {who}"
        line = self.module.text.split("\n")[access.line - 1].strip()
        source = self.module.translation.locations.get(access.line, "")
        return f"{access.what} by {who} at PTX line {access.line}: {line}  {source}"


@dataclass(frozen=True)
class _Replayed:
    """What a launch in a process of its own left."""

    answer: bytes
    text: str
    code: int

    @property
    def failed(self) -> bool:
        return self.code != 0 or "Sanitizer" in self.text


def _replay(program: Path, request: bytes, patience: float) -> _Replayed:
    with tempfile.TemporaryDirectory() as folder:
        asked, reply = Path(folder) / "request", Path(folder) / "reply"
        asked.write_bytes(request)
        done = subprocess.run(
            [str(program), str(asked), str(reply)],
            capture_output=True,
            check=False,
            env={**os.environ, **_SANITIZER_OPTIONS},
            timeout=patience,
        )
        answer = reply.read_bytes() if reply.exists() else b""
    return _Replayed(answer, done.stderr.decode(errors="replace"), done.returncode)


_SANITIZER_OPTIONS = {
    "TSAN_OPTIONS": "symbolize=0:history_size=4:exitcode=66:report_thread_leaks=0",
    "ASAN_OPTIONS": "symbolize=0:detect_stack_use_after_return=0:detect_leaks=0",
}


def _dims(value: Dim, name: str, limits: tuple[int, int, int]) -> Any:
    sizes = [value] if isinstance(value, int) else list(value)
    if not 1 <= len(sizes) <= 3 or not all(1 <= n <= limit for n, limit in zip(sizes, limits, strict=False)):
        raise ValueError(f"{name} must be one to three sizes of 1 to {limits}, got {value!r}")
    return (ctypes.c_uint32 * 3)(*sizes, *[1] * (3 - len(sizes)))


def _allocations(buffers: Sequence[Buffer]) -> list[Buffer]:
    """Buffers that overlap become one, since a sanitizer's process has to allocate them anew."""
    merged: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (b.address, -b.size)):
        last = merged[-1] if merged else None
        if last is not None and buffer.address < last.address + last.size:
            size = max(last.size, buffer.address + buffer.size - last.address)
            merged[-1] = Buffer(last.address, size, last.name, last.owner)
        else:
            merged.append(buffer)
    return merged


def _holder(buffers: Sequence[Buffer], address: int) -> int | None:
    return next((i for i, b in enumerate(buffers) if b.address <= address < b.address + b.size), None)
