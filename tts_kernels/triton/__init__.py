"""The operators in Triton: one file for each op, each with a function of the operator's own name and signature.

`define` makes each of them an operator of its own, ``torch.ops.tts_kernels_triton.<name>``, so that torch.compile
sees one opaque call. Nothing here imports triton: a file of kernels does, when its operator first runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Final

import torch

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"

# Where Triton kernels can run: on GPUs, and with TRITON_INTERPRET=1 on the CPU (for tests, slowly).
DEVICES: Final = frozenset({"cuda", "xpu"} | ({"cpu"} if INTERPRETED else set()))

_LIBRARY = torch.library.Library("tts_kernels_triton", "DEF")


@functools.cache
def missing() -> str:
    """Why Triton cannot run here; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'tts-kernels[triton]')"
    if INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return ""
    return "no GPU is here (TRITON_INTERPRET=1, set before Python starts, runs Triton kernels on a CPU, slowly)"


def define(overload: torch._ops.OpOverload, fake: Callable[..., Any]) -> torch._ops.OpOverload | None:
    """The Triton kernel of an operator; None if there is no file for it, or no triton."""
    namespace, name = overload._schema.name.split("::")
    module = f"{__name__}.{name.removesuffix('_')}"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(module) is None:
        return None

    def run(*args: Any) -> Any:
        first = next(t for t in args if isinstance(t, torch.Tensor))  # all are on the same device
        with (torch.xpu if first.is_xpu else torch.cuda).device_of(first):
            return getattr(importlib.import_module(module), name)(*args)

    _LIBRARY.define(str(overload._schema).removeprefix(f"{namespace}::"))
    for key in ("CPU", "CUDA", "XPU"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"tts_kernels_triton::{name}", fake, lib=_LIBRARY)
    twin: torch._ops.OpOverload = getattr(torch.ops.tts_kernels_triton, name).default
    return twin
