"""Which implementation of the ops runs: the choice, and what is there."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Final

import torch

from . import _library, triton

BACKENDS: Final = ("auto", "cpp", "triton", "reference")


class _State:
    """The process-wide choices; plain attributes, so that torch.compile guards on them."""

    backend: str = "auto"
    debug_checks: bool = False


state = _State()


class use_backend:  # noqa: N801  (a setter that is also a context manager, like torch.inference_mode)
    """Choose the implementation of every op, for the process.

    Takes effect at once; as a context manager it puts the old choice back at the end.

    Parameters
    ----------
    name
        ``"auto"``: the fastest that is there: C++, then Triton, then the reference.
        ``"cpp"``, ``"triton"`` or ``"reference"``: that one alone.

    Raises
    ------
    ValueError
        For another name.
    RuntimeError
        If the backend is not there; the message says why.

    Examples
    --------
    >>> import tts_kernels as tk
    >>> with tk.use_backend("reference"):
    ...     tk.backend_info().in_use
    'reference'
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"name: expected one of {', '.join(BACKENDS)}, got {name!r}")
        if missing := _missing(name):
            raise RuntimeError(f"backend {name!r} is not there: {missing}")
        self._previous = state.backend
        state.backend = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        state.backend = self._previous


class debug_checks:  # noqa: N801
    """Check the values of index tensors on a GPU too (this synchronises the device at every call).

    While a CUDA graph is captured they are not: nothing can be read then, nor when it is replayed.

    A setter and a context manager, like `use_backend`. On a CPU values are always checked.

    Examples
    --------
    >>> import tts_kernels as tk
    >>> with tk.debug_checks(True):
    ...     pass
    """

    def __init__(self, enabled: bool) -> None:
        self._previous = state.debug_checks
        state.debug_checks = bool(enabled)

    def __enter__(self) -> debug_checks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        state.debug_checks = self._previous


def _missing(name: str) -> str:
    """Why a backend is not there; empty if it is."""
    return triton.missing() if name == "triton" else ""


@dataclass(frozen=True)
class BackendInfo:
    """What `backend_info` found.

    Attributes
    ----------
    in_use
        The choice made by `use_backend`.
    available
        Backend name -> empty if it is there, else why not.
    cpu_isa
        Instruction set that the CPU kernels use.
    cpu_isas
        Those that this build has and this processor runs, from slow to fast.
    cuda
        Empty if the C++ backend has its CUDA kernels, else why not.
    gpu
        The GPU that torch sees, or why there is none.
    on_gpu
        Operator -> what runs it for a CUDA tensor, as things stand: ``"cpp"`` if its CUDA kernel was built; else
        ``"triton"`` if it has one and triton is installed; else ``"torch"``, a composition of other operators, or the
        slow ``"reference"``.
    """

    in_use: str
    available: dict[str, str]
    cpu_isa: str
    cpu_isas: tuple[str, ...]
    cuda: str
    gpu: str
    on_gpu: dict[str, str]


def backend_info() -> BackendInfo:
    """Say which backends are there, why one is missing, and which is in use.

    Examples
    --------
    >>> import tts_kernels as tk
    >>> tk.backend_info().available["cpp"]
    ''
    """
    from .op import OPS  # which needs this module

    ops = torch.ops.tts_kernels
    return BackendInfo(
        in_use=state.backend,
        available={name: _missing(name) for name in BACKENDS[1:]},
        cpu_isa=ops.cpu_isa(),
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
