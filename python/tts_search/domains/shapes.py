"""The shapes in which files store tasks: the reader for each shape, and the error for an entry that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Shapes"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shapes(Generic[T]):
    """Readers of entries. Each has the fields by which it recognises an entry.

    Attributes
    ----------
    what : str
        What an entry is, for errors.
    names : str
        The shapes, for errors.
    readers : tuple of (fields, reader)
        ``reader(entry, number)`` returns the task of an entry that has all the fields; the first reader that fits is
        used. A field with a colon, ``"grader:choice"``, must have this value.
    """

    what: str
    names: str
    readers: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], T]], ...]

    def known(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry of a file is in one of the shapes."""
        return self._reader(entry) is not None

    def read(self, entry: Mapping[str, Any], number: str) -> T:
        """Return the task of an entry; its id is the number if the entry names none.

        Raises
        ------
        ValueError
            If it has none of the shapes, or an invalid field; the message names the field.
        """
        reader = self._reader(entry)
        if reader is None:
            raise ValueError(f"expected the fields of {self.names}")
        try:
            return reader(entry, number)
        except KeyError as error:
            raise ValueError(f"{error.args[0]}: expected in {self.what}, got none") from None
        except (TypeError, AttributeError, IndexError, SyntaxError, RecursionError) as error:
            raise ValueError(f"{self.what}: {type(error).__name__}: {error}") from None

    def _reader(self, entry: Mapping[str, Any]) -> Callable[[Mapping[str, Any], str], T] | None:
        return next((reader for fields, reader in self.readers if all(_has(entry, field) for field in fields)), None)


def _has(entry: Mapping[str, Any], field: str) -> bool:
    name, _, value = field.partition(":")
    return entry.get(name) == value if value else entry.get(name) is not None
