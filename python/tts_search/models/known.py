"""The branches of a problem that a policy or a verifier still holds: named by numbers, found by their texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

__all__ = ["KnownBranches"]

_Text = TypeVar("_Text", str, tuple[str, ...])
Held = TypeVar("Held")


class KnownBranches(Generic[_Text, Held]):
    """The branches of one problem that can be continued: of each, its text and what is held of it (such as its KV).

    A request has a branch's number and its text. The text decides, because a caller may have edited it, or may have
    taken a new number. The branch with the longest text that the request's text begins with is continued; the rest of
    the text is read.

    Parameters
    ----------
    nothing : str or tuple of str
        The empty text, of the kind that branches have here: their steps as one text, or step by step.
    root : Held
        What is held of the problem alone, branch 0. It is never forgotten, so any text can be read from there.
    begins : callable
        ``begins(start, text)``: whether what is held of one text can be continued to the other.
    """

    def __init__(self, nothing: _Text, root: Held, begins: Callable[[_Text, _Text], bool]) -> None:
        self.root = root
        self._start: tuple[_Text, Held] = (nothing, root)
        self._begins: Callable[[_Text, _Text], bool] = begins
        self._known: dict[int, tuple[_Text, Held]] = {0: self._start}

    def longest(self, number: int, text: _Text) -> tuple[_Text, Held]:
        """Return the longest known text that this text begins with, and what is held of it.

        If the numbered branch has exactly this text, it is the one. O(1) in this case, else O(branches).
        """
        own = self._known.get(number)
        if own is not None and own[0] == text:
            return own
        begun = (known for known in self._known.values() if self._begins(known[0], text))
        return max(begun, key=lambda known: len(known[0]), default=self._start)

    def put(self, number: int, text: _Text, held: Held) -> Held | None:
        """Store a branch under this number. Return what was held under it before."""
        before = self._known.get(number)
        self._known[number] = (text, held)
        return None if before is None else before[1]

    def drop(self, numbers: Iterable[int]) -> list[Held]:
        """Forget branches. Return what was held of those that were known."""
        return [known[1] for number in numbers if (known := self._known.pop(number, None)) is not None]
