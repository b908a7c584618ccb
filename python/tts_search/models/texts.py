"""Streams with their text: where it ends, and which part of it is certain and can be sent already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from tts_search.models.endings import closes
from tts_search.models.generation import SampledStream

__all__ = ["Detokenizer", "GrowingText", "Stops", "TextStream"]

# Tokens before a text that are decoded with it. No decoder looks at more neighbours of a token than this.
_CONTEXT: Final = 8
_SETTLED: Final = 32  # the most tokens of a growing text that are decoded again with each new one
_PART: Final = "\ufffd"  # replaces bytes that are no character, or not a complete one


@dataclass(frozen=True, slots=True)
class Stops:
    """The conditions that end a text.

    Attributes
    ----------
    texts : tuple of str
        Pieces of text, none of them empty.
    tokens : frozenset of int
        Tokens that end it and are not part of it.
    eos : frozenset of int
        Those of them that mean that the answer is complete.
    keeps : {"nothing", "stop", "token"}
        How a text that ends at a piece is cut: before the piece, after the piece, or after the whole last token. In the
        last case a blank piece counts only after other text than white space (`closes`).
    """

    texts: tuple[str, ...]
    tokens: frozenset[int]
    eos: frozenset[int]
    keeps: Literal["nothing", "stop", "token"]

    def find(self, text: str) -> tuple[str, str] | None:
        """The text up to where it ends, and the first piece in it that ends it."""
        if self.keeps == "token":
            return next(((text, piece) for piece in self.texts if closes(text, piece)), None)
        places = [(at, piece) for piece in self.texts if (at := text.find(piece)) >= 0]
        if not places:
            return None
        at, piece = min(places, key=lambda place: place[0])
        return text[: at + len(piece) * (self.keeps == "stop")], piece

    def safe(self, text: str) -> int:
        """Length of the final part of a text: without an incomplete character or the beginning of a stop."""
        whole = len(text.rstrip(_PART))
        longest = max(map(len, self.texts), default=1) - 1
        for begin in range(max(0, whole - longest), whole):
            if any(piece.startswith(text[begin:whole]) for piece in self.texts):
                return begin
        return whole


class Detokenizer:
    """The texts of tokens, as they read after other tokens.

    Parameters
    ----------
    decode : callable
        The text of tokens.
    before : callable
        Returns the tokens before; called once, when they are needed.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Callable[[], list[int]]) -> None:
        self._decode = decode
        self._before = before
        self._context: list[int] = []
        self._context_text = ""

    def of(self, own: Sequence[int]) -> str:
        """The text of tokens."""
        if not self._context:
            self._stand_behind(self._before())
        text = self._decode([*self._context, *own])
        return text[len(self._context_text) :] if text.startswith(self._context_text) else self._decode(own)

    def whole(self, own: Sequence[int]) -> int:
        """How many tokens to keep so that their text does not end within a character (of 4 bytes at most)."""
        for count in range(len(own), max(0, len(own) - 4), -1):
            if not self.of(own[:count]).endswith(_PART):
                return count
        return len(own)

    def _stand_behind(self, tokens: list[int]) -> None:
        self._context = tokens[-_CONTEXT:]
        self._context_text = self._decode(self._context)


class GrowingText(Detokenizer):
    """The text of a stream, needed at each of its tokens. Each time only its end is decoded again."""

    _fixed: int = 0  # tokens that are not decoded again
    _fixed_text: str = ""

    def of(self, own: Sequence[int]) -> str:
        """The text of all tokens so far."""
        text = self._fixed_text + super().of(own[self._fixed :])
        if len(own) - self._fixed >= _SETTLED and not text.endswith(_PART):
            self._stand_behind([*self._context, *own[self._fixed :]])
            self._fixed, self._fixed_text = len(own), text
        return text


@dataclass(slots=True, eq=False)
class TextStream(SampledStream):
    """A branch that grows by text until a condition ends it.

    Attributes
    ----------
    text : Detokenizer
        Decodes its tokens.
    stops : Stops
        The conditions that end it.
    said : str
        Its text at the last check.
    kept : int or None
        If the limit ended it: the number of tokens that form whole characters.
    reason : str or None
        The reason why it ended: "eos", "stop" or "length".
    stop : int or str or None
        The token or the piece of text that ended it.
    unstopped : int
        Number of leading characters in which no stop was found.
    """

    text: Detokenizer = field(repr=False)
    stops: Stops
    said: str = field(init=False, default="")
    kept: int | None = field(init=False, default=None)
    reason: Literal["eos", "stop", "length"] | None = field(init=False, default=None)
    stop: int | str | None = field(init=False, default=None)
    unstopped: int = field(init=False, default=0)

    def ends(self) -> bool:
        """Whether it ends with its newest token."""
        own = self.branch.tokens
        if (token := own[-1]) in self.stops.tokens:
            own.pop()
            self.said, self.reason, self.stop = self.text.of(own), "eos" if token in self.stops.eos else "stop", token
        elif (found := self._stop(text := self.text.of(own))) is not None:
            (self.said, self.stop), self.reason = found, "stop"
        elif self.num_tokens == self.limit:
            self.kept = self.text.whole(own) if text.endswith(_PART) else len(own)
            self.said, self.reason = text if self.kept == len(own) else self.text.of(own[: self.kept]), "length"
        else:
            self.said = text
        return self.reason is not None

    def _stop(self, text: str) -> tuple[str, str] | None:
        """The text up to where it ends, and the piece that ends it. Only the unchecked part is searched."""
        if self.num_tokens < self.free_after:
            self.unstopped = len(text)
            return None
        found = self.stops.find(text[self.unstopped :])
        return None if found is None else (text[: self.unstopped] + found[0], found[1])
