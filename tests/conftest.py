from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import tts_kernels

_SANITIZED = os.environ.get("TTS_SANITIZED")  # by tests/sanitize.sh
if _SANITIZED and not Path(tts_kernels.__file__).is_relative_to(_SANITIZED):
    raise ImportError(f"expected tts_kernels of {_SANITIZED}, got {tts_kernels.__file__}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
