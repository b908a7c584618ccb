"""Checks of options; an error names the option, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Container

from tts_search.errors import ConfigError

__all__ = ["integer", "is_finite", "is_int", "is_text", "one_of", "unused"]


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise the error of a value that is none of the choices."""
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def integer(name: str, value: object, *, at_least: int) -> None:
    """Raise the error of a value that is no int, or too small a one."""
    if not is_int(value, at_least):
        raise ConfigError(f"{name}: expected an int >= {at_least}, got {value!r}")


def is_int(value: object, at_least: int | None = 1) -> bool:
    """Whether a value is an int (a bool is none), and not too small a one."""
    return isinstance(value, int) and not isinstance(value, bool) and (at_least is None or value >= at_least)


def is_text(value: object) -> bool:
    """Whether a value is a text that is not empty."""
    return isinstance(value, str) and bool(value)


def is_finite(value: object) -> bool:
    """Whether a value is a number, neither NaN nor infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def unused(problem: int, known: Container[int], driver: object) -> None:
    """Raise the error of the number of a problem that a policy or a verifier has in flight."""
    if problem in known:
        raise ValueError(f"problem {problem} is in flight: {type(driver).__name__} serves one search at a time")
