"""What a process has chosen: see :class:`tts_kernels.use_backend` and :class:`tts_kernels.debug_checks`."""

from __future__ import annotations

__all__ = ["state"]


class _State:
    """Plain attributes, so that torch.compile guards on them."""

    backend: str = "auto"
    debug_checks: bool = False


state = _State()
