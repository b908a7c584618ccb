"""Values that go in and out of a sandbox: plain data, without methods of their own.

Whatever candidate code returns is reduced to values of Python's own types before anybody compares it. So an object that
claims to be equal to everything never leaves the process that made it. Both sides of the pipe use this module, so it
imports only the standard library.
"""

from __future__ import annotations

import math
from typing import Any, Final

__all__ = ["NotPlainError", "from_json", "same_value", "to_json"]

MAX_DEPTH: Final = 100
MAX_ITEMS: Final = 1_000_000
_EXACT: Final = 2**53  # all JSON readers keep integers below it exact
_TOLERANCE: Final = 1e-9  # for floats: the last digits of a sum depend on its order


class NotPlainError(ValueError):
    """A value is not plain data, or is too large."""


def to_json(value: Any, depth: int = 0) -> Any:
    """Return a plain value as JSON. Types that JSON lacks become an object with the type's name and the parts.

    Raises
    ------
    NotPlainError
        If it is of another type, nested deeper than 100 levels, or longer than a million items.
    """
    if depth > MAX_DEPTH:
        raise NotPlainError(f"expected a value of at most {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < _EXACT else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if not isinstance(value, (list, tuple, set, frozenset, dict)):
        raise NotPlainError(f"expected plain data, got a {type(value).__name__}")
    if len(value) > MAX_ITEMS:
        raise NotPlainError(f"expected at most {MAX_ITEMS} items, got {len(value)}")
    if isinstance(value, dict):
        return {"dict": [[to_json(key, depth + 1), to_json(item, depth + 1)] for key, item in value.items()]}
    kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
    items = [to_json(item, depth + 1) for item in value]
    return items if kind is list else {kind.__name__: items}


def from_json(data: Any) -> Any:
    """Return the value from the output of `to_json`.

    Raises
    ------
    NotPlainError
        If the data is not such output: the other side of the pipe may send anything.
    """
    if isinstance(data, list):
        return [from_json(item) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) == 1:
        ((kind, parts),) = data.items()
        try:
            return _made(kind, parts)
        except (TypeError, ValueError, OverflowError):
            pass
    raise NotPlainError("expected a value, got an object of another kind")


def _made(kind: str, parts: Any) -> Any:
    if kind == "int":
        return int(parts, 16)
    if kind == "bytes":
        return bytes.fromhex(parts)
    if kind == "complex":
        return complex(*parts)
    if kind == "dict":
        return {from_json(key): from_json(item) for key, item in parts}
    makers: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
    if kind not in makers:
        raise ValueError(kind)
    return makers[kind](map(from_json, parts))


def same_value(expected: Any, got: Any) -> bool:
    """Whether two plain values are equal in Python's sense. Floats: within 1e-9 of the larger one, or of 1.

    Examples
    --------
    >>> same_value([0.3], [0.1 + 0.2]), same_value((1,), [1])
    (True, False)
    """
    if isinstance(expected, float) and isinstance(got, (int, float)):
        if math.isnan(expected):
            return math.isnan(got)
        try:
            return math.isclose(expected, got, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        except OverflowError:  # an int that is larger than all floats
            return False
    if type(expected) is type(got) and isinstance(expected, (list, tuple)):
        return len(expected) == len(got) and all(map(same_value, expected, got))
    if isinstance(expected, dict) and isinstance(got, dict):
        return expected.keys() == got.keys() and all(same_value(value, got[key]) for key, value in expected.items())
    return bool(expected == got)
