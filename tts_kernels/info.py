"""Information about this machine: versions of the kernels, instruction sets, a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _library
from .backend import BACKENDS, missing
from .choices import state
from .op import OPS

__all__ = ["BackendInfo", "backend_info"]


@dataclass(frozen=True)
class BackendInfo:
    """The result of `backend_info`.

    Attributes
    ----------
    in_use
        The choice made by `use_backend`.
    available
        Backend name -> empty if it is available, else the reason why not.
    cpu_isa
        Instruction set that the CPU kernels use.
    cpu_isa_reason
        The reason for it: a measurement on this kind of processor, or ``TTS_KERNELS_CPU_ISA``.
    cpu_isas
        The instruction sets that this build has and this processor can run, from the smallest to the largest.
    cuda
        Empty if the C++ backend has its CUDA kernels, else the reason why not.
    gpu
        The GPU that torch sees, or the reason why there is none.
    on_gpu
        Operator -> what runs it for a CUDA tensor at present. ``"cpp"`` if its CUDA kernel was built. (`linear` leaves
        products of floats to torch's library, unless `deterministic` is on.) Else ``"triton"`` if it has a Triton
        kernel and triton is installed. Else ``"torch"``, a composition of other operators, or the slow ``"reference"``.
    """

    in_use: str
    available: dict[str, str]
    cpu_isa: str
    cpu_isa_reason: str
    cpu_isas: tuple[str, ...]
    cuda: str
    gpu: str
    on_gpu: dict[str, str]


def backend_info() -> BackendInfo:
    """Return which backends are available, why others are not, and which one is used.

    Examples
    --------
    >>> import tts_kernels as tk
    >>> tk.backend_info().available["cpp"]
    ''
    """
    ops = torch.ops.tts_kernels
    return BackendInfo(
        in_use=state.backend,
        available={name: missing(name) for name in BACKENDS[1:]},
        cpu_isa=ops.cpu_isa(),
        cpu_isa_reason=ops.cpu_isa_reason(),
        cpu_isas=tuple(ops.cpu_isas().split(",")),
        cuda=_library.CUDA_MISSING,
        gpu=_gpu(),
        on_gpu={name: op.runs("cuda") for name, op in sorted(OPS.items())},
    )


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none: torch.cuda.is_available() is False"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
