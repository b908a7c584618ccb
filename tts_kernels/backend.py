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
    """Choose the implementation of every op for the whole process.

    Takes effect immediately. As a context manager it restores the old choice at the end.

    Parameters
    ----------
    name
        ``"auto"``: the fastest available one: C++, then Triton, then the reference.
        ``"cpp"``, ``"triton"`` or ``"reference"``: only this one.

    Raises
    ------
    ValueError
        For another name.
    RuntimeError
        If the backend is not available; the message has the reason.

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
    """Sets an attribute of `state` immediately. As a context manager it restores the old value at the end."""

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
    """Check the values of index tensors on a GPU, too. This synchronises the device at every call.

    While a CUDA graph is captured, and when it is replayed, nothing is checked, because values cannot be read then.

    A setter and a context manager, like `use_backend`. On a CPU, values are always checked.

    Examples
    --------
    >>> import tts_kernels as tk
    >>> with tk.debug_checks(True):
    ...     pass
    """

    _name = "debug_checks"


class deterministic(_Switch):  # noqa: N801
    """Make the result of `linear` on a GPU independent of the other rows, to the bit, as for every other op.

    By default torch's library multiplies, and it chooses the order of its sums by the number of rows. With this option
    our own kernel multiplies; its order depends only on the number of columns. On a CPU nothing changes: results are
    always independent. With ``use_backend("triton")`` torch's library is still used.

    A setter and a context manager, like `use_backend`. docs/backends.md has the cost.

    Examples
    --------
    >>> import tts_kernels as tk
    >>> with tk.deterministic(True):
    ...     pass
    """

    _name = "deterministic"


def missing(name: str) -> str:
    """Return why a backend is not available; empty if it is."""
    return triton.missing() if name == "triton" else ""
