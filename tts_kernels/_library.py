"""Loads the operator library, which registers every op in ``torch.ops.tts_kernels``."""

from __future__ import annotations

from pathlib import Path

import torch

PATH = Path(__file__).with_name("_ops.so")


def load() -> None:
    """Load ``_ops.so`` into torch.

    Raises
    ------
    ImportError
        If the library was not built, or needs a newer torch than the one that is installed.
    """
    if not PATH.exists():
        raise ImportError(f"{PATH} is missing: build the package with `pip install .`")
    try:
        torch.ops.load_library(str(PATH))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"{PATH} does not load in torch {torch.__version__} (2.10 or newer is needed): {error}"
        ) from error


load()
