"""One op: its registered overloads, its reference, its argument check and its fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import triton
from .choices import state

OPS: dict[str, Op] = {}


class Op:
    """Calls ``torch.ops.tts_kernels.<name>``, or another implementation where the backend asks for it.

    Parameters
    ----------
    name
        The operator's name.
    reference
        Plain torch, of the operator's own signature: it defines the result.
    check
        Raises the error that names a wrong argument; same signature, returns nothing. It must skip the checks of
        values for tensors whose values cannot be read (`checks.readable`), as it serves the fake too.
    fake
        Empty outputs of the right shapes, of the same signature.
    composed
        The operator by other operators and torch, fast enough for a GPU without a kernel of its own; None if it is not
        made of such.
    rather_composed
        Whether that is the better choice for these arguments on a GPU, although there is a kernel.
    no_cpp_for
        Why C++ has no kernel for these arguments on their device, where "auto" goes on to Triton; empty if it has.

    A call to the C++ kernels runs no Python check: they check all that they read and fail bare, and only then does
    `check` look for the culprit. Where they have no kernel for the tensors' device, "auto" goes on to Triton, where
    that has none either, to what the operator is composed of, and else to the reference.
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
        """Run the op by what the backend asks for."""
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
        """What runs for tensors on a kind of device: cpp, triton, torch (it is composed of other ops) or reference."""
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
        """The kind of device that the tensors are on, by the first; None without one."""
        first = next(iter(args[0]), None) if isinstance(args[0], (list, tuple)) else args[0]
        return first.device.type if isinstance(first, torch.Tensor) else None

    def _checked(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.check(*args)
            return fake(*args)

        return run
