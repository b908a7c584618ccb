"""Loads the operator libraries, which register every op in ``torch.ops.tts_kernels``."""

from __future__ import annotations

from pathlib import Path

import torch

PATH = Path(__file__).with_name("_ops.so")
CUDA_PATH = PATH.with_name("_cuda.so")


def load() -> None:
    """Load ``_ops.so`` into torch.

    Raises
    ------
    ImportError
        If the library was not built or needs a newer torch, or if ``TTS_KERNELS_CPU_ISA`` asks for instructions that
        this CPU does not have.
    """
    if not PATH.exists():
        raise ImportError(f"{PATH} is missing: build the package with `pip install .`")
    try:
        torch.ops.load_library(str(PATH))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"{PATH} does not load in torch {torch.__version__} (2.10 or newer is needed): {error}"
        ) from error
    try:
        torch.ops.tts_kernels.cpu_isa()  # here, because torch loses the message of an error in one of its threads
    except RuntimeError as error:
        raise ImportError(str(error)) from error


def load_cuda() -> str:
    """Load ``_cuda.so`` if torch has CUDA. Returns the reason if it was not loaded, else an empty text."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not CUDA_PATH.exists():
        return "the CUDA library was not built (`make cuda`, or `CMAKE_ARGS=-DTTS_CUDA=ON pip install .`)"
    try:
        torch.ops.load_library(str(CUDA_PATH))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{CUDA_PATH} does not load: {error}"
    return ""


load()
CUDA_MISSING = load_cuda()
