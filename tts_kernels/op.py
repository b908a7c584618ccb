"""One op: its registered overloads, its reference, its argument check and its fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import triton
from .choices import state

OPS: dict[str, Op] = {}


class Op:
    """Calls ``torch.ops.tts_kernels.<name>``, or the implementation that the backend asks for.

    Parameters
    ----------
    name
        The operator's name.
    reference
        A function of plain torch with the same signature. It defines the result.
    check
        Raises the error that names a wrong argument; same signature, returns nothing. The fake uses it, too, so it must
        skip checks of values that cannot be read (`checks.readable`).
    fake
        Returns empty outputs of the right shapes; same signature.
    composed
        The operator as a composition of other operators and torch, fast enough for a GPU without its own kernel; None
        if there is none.
    rather_composed
        Whether the composition is faster than the kernel on a GPU for these arguments.
    no_cpp_for
        Why C++ has no kernel for these arguments on their device, so that "auto" uses Triton; empty if it has one.

    Before a call to C++ kernels, no Python check runs. The kernels check everything that they read, and fail with a
    bare message. Only then `check` finds the wrong argument. If C++ has no kernel for the tensors' device, "auto" tries
    Triton, then the composition, then the reference.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        check: Callable[..., None],
        fake: Callable[..., Any],
        composed: Callable[..., Any] | None = None,
        rather_composed: Callable[..., bool] = lambda *_: False,
        no_cpp_for: Callable[..., str] = lambda *_: "",
    ) -> None:
        self.name = name
        OPS[name] = self
        self.reference = reference
        self.check = check
        self.composed = composed
        self.rather_composed = rather_composed
        self.no_cpp_for = no_cpp_for
        self.overload = getattr(torch.ops.tts_kernels, name).default
        torch.library.register_fake(f"tts_kernels::{name}", self._checked(fake))
        self.triton = triton.define(self.overload, self._checked(fake))
        has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"tts_kernels::{name}", "CUDA")
        self._devices = ("cpu", "meta", "cuda") if has_cuda else ("cpu", "meta")

    def __call__(self, *args: Any) -> Any:
        """Run the op with the chosen backend."""
        device = self._device(args)
        runs = self.runs(device)
        if device == "cuda" and state.backend == "auto" and self.rather_composed(*args):
            runs = "torch"
        if runs == "cpp" and (reason := self.no_cpp_for(*args)):
            if state.backend != "auto" or self.triton is None or device not in triton.DEVICES:
                raise TypeError(reason)
            runs = "triton"
        if runs == "cpp":
            return self._cpp(args)
        if not torch.compiler.is_compiling() or self.triton is None:
            self.check(*args)
        run: Callable[..., Any] = {"triton": self.triton, "torch": self.composed}.get(runs) or self.reference
        return run(*args)

    def runs(self, device: str | None) -> str:
        """What runs for tensors on a kind of device: cpp, triton, torch (composed of other ops) or reference."""
        if state.backend in ("auto", "cpp") and (device is None or device in self._devices):
            return "cpp"
        if state.backend in ("auto", "triton") and self.triton is not None and device in triton.DEVICES:
            return "triton"
        return "torch" if state.backend != "reference" and self.composed and device in triton.DEVICES else "reference"

    def _cpp(self, args: tuple[Any, ...]) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if state.debug_checks:
            self.check(*args)
        try:
            return self.overload(*args)
        except RuntimeError:
            self.check(*args)
            raise

    @staticmethod
    def _device(args: tuple[Any, ...]) -> str | None:
        """The kind of device of the first tensor; None without tensors."""
        first = next(iter(args[0]), None) if isinstance(args[0], (list, tuple)) else args[0]
        return first.device.type if isinstance(first, torch.Tensor) else None

    def _checked(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.check(*args)
            return fake(*args)

        return run
