"""The choice of implementation: C++, Triton or the reference."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Final

from . import triton
from .choices import state

if TYPE_CHECKING:
    from typing_extensions import Self

BACKENDS: Final = ("auto", "cpp", "triton", "reference")


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
        if reason := missing(name):
            raise RuntimeError(f"backend {name!r} is not there: {reason}")
        self._previous = state.backend
        state.backend = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        state.backend = self._previous


class _Switch:
    """An attribute of `state`, set at once; as a context manager it is put back at the end."""

    _name: str

    def __init__(self, enabled: bool) -> None:
        self._previous = getattr(state, self._name)
        setattr(state, self._name, bool(enabled))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        setattr(state, self._name, self._previous)


class debug_checks(_Switch):  # noqa: N801
    """Check the values of index tensors on a GPU too (this synchronises the device at every call).

    While a CUDA graph is captured they are not: nothing can be read then, nor when it is replayed.

    A setter and a context manager, like `use_backend`. On a CPU values are always checked.

    Examples
    --------
    >>> import tts_kernels as tk
    >>> with tk.debug_checks(True):
    ...     pass
    """

    _name = "debug_checks"


class deterministic(_Switch):  # noqa: N801
    """Have `linear` on a GPU give a row the same bits in any company, as every other op does.

    Torch's library, which multiplies otherwise, chooses the order of its sums by the number of rows. Then our own
    kernel does, whose order depends on the number of columns alone. On a CPU nothing changes: there it always does.
    With ``use_backend("triton")`` the library goes on.

    A setter and a context manager, like `use_backend`. What it costs: docs/backends.md.

    Examples
    --------
    >>> import tts_kernels as tk
    >>> with tk.deterministic(True):
    ...     pass
    """

    _name = "deterministic"


def missing(name: str) -> str:
    """Say why a backend is not there; empty if it is."""
    return triton.missing() if name == "triton" else ""
