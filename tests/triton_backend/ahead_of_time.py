"""Triton kernels compiled here in the form in which they would be launched on a GPU.

`recorded` calls the ops' Triton functions on CPU tensors and records every launch instead of running it. `compiled`
compiles a launch for a target. It specialises the launch as Triton's own launcher does: 1 is a constant, and multiples
of 16 are known to be such, except for arguments that a kernel names in ``do_not_specialize``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
}
OPTIONS = ("num_warps", "num_stages", "matrix_instr_nonkdim")

# Name -> (target, class of device in configs.py, bytes of shared memory that a block may have)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "ampere", 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), "hopper", 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), "blackwell", 227 << 10),
    "sm_120": (GPUTarget("cuda", 120, 32), "ada", 99 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "cdna", 64 << 10),
}


@dataclass
class Launch:
    """One launch: the kernel, its grid, its arguments by name, num_warps and the like."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)


@contextlib.contextmanager
def recorded(monkeypatch: Any, device_class: str) -> Iterator[list[Launch]]:
    """The launches of the Triton functions called inside, for that class of device."""
    from tts_kernels.triton import configs

    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
        launches.append(launch_of(kernel, grid, args, kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(configs, "device_class", lambda _device: device_class)
        yield launches


def launch_of(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What Triton's launcher is called with; the arguments in the kernel's order."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {k: given.pop(k) for k in OPTIONS if k in given}
    assert set(given) == set(kernel.arg_names), f"{kernel.__name__}: expected {kernel.arg_names}"
    return Launch(kernel, grid, {name: given[name] for name in kernel.arg_names}, options)


@dataclass(frozen=True)
class Specialisation:
    """What of a launch's arguments a compiled kernel depends on."""

    signature: dict[str, str]
    constants: dict[str, Any]
    hints: dict[tuple[int, ...], list[list[Any]]]


def specialised(launch: Launch) -> Specialisation:
    """As Triton's own launcher does it."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value, general = launch.arguments[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not general):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, float):
            signature[parameter.name] = "fp32"
            continue
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        signature[parameter.name] = (
            TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32" if -(2**31) <= value < 2**31 else "i64"
        )
        if number % 16 == 0 and not general:
            hints[i,] = [["tt.divisibility", 16]]
    return Specialisation(signature, constants, hints)


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The launch's kernel for a target."""
    given = specialised(launch)
    source = ASTSource(fn=launch.kernel, signature=given.signature, constexprs=given.constants, attrs=given.hints)
    return triton.compile(source, target=target, options=launch.options)
