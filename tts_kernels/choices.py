"""The choices of this process: see `use_backend`, `debug_checks` and `deterministic`."""

from __future__ import annotations

__all__ = ["state"]


class _State:
    """Choices as plain attributes, so that torch.compile guards on them."""

    backend: str = "auto"
    debug_checks: bool = False
    deterministic: bool = False


state = _State()
