"""One op: its registered overload, its reference, its argument check and its fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _library
from .backend import state

_DEVICES = ("cpu", "meta") if _library.CUDA_MISSING else ("cpu", "meta", "cuda")


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

    A call to the C++ kernels runs no Python check: they check all that they read and fail bare, and only then does
    `check` look for the culprit.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        check: Callable[..., None],
        fake: Callable[..., Any],
    ) -> None:
        self.name = name
        self.reference = reference
        self.check = check
        self.overload = getattr(torch.ops.tts_kernels, name).default
        torch.library.register_fake(f"tts_kernels::{name}", self._checked(fake))

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            if state.backend != "reference" and self._has_kernel(args):
                return self.overload(*args)
        elif state.backend != "reference":
            if state.debug_checks:
                self.check(*args)
            try:
                return self.overload(*args)
            except NotImplementedError:  # no kernel where the tensors are
                pass
            except RuntimeError:
                self.check(*args)
                raise
        self.check(*args)
        return self.reference(*args)

    @staticmethod
    def _has_kernel(args: tuple[Any, ...]) -> bool:
        """Whether the tensors are where a compiled kernel is."""
        first = args[0] if isinstance(args[0], torch.Tensor) else next(iter(args[0]), None)
        return first is None or not isinstance(first, torch.Tensor) or first.device.type in _DEVICES

    def _checked(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.check(*args)
            return fake(*args)

        return run
