"""Finds the tokens that can complete one of several pieces of text, at which a text may end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

__all__ = ["Endings", "closes"]


class Endings:
    """Decides at which tokens a text may end, without decoding the text at every token.

    Parameters
    ----------
    texts : collection of str
        Pieces of text that end a text that contains them; none of them empty.
    tokens : collection of int
        Tokens that end it by themselves.
    decode : callable
        The text of tokens.
    before : sequence of int
        Tokens that come before a token when it is decoded, so that it is not at the beginning of a text.
    """

    def __init__(
        self,
        texts: Collection[str],
        tokens: Collection[int],
        decode: Callable[[Sequence[int]], str],
        before: Sequence[int],
    ) -> None:
        self._last = {text[-1] for text in texts}
        self._tokens = frozenset(tokens)
        self._decode = decode
        self._before = list(before)
        self._before_text = decode(before)

    def may_end(self, token: int) -> bool:
        """Whether a text may end here: the token adds the last character of a piece, or a part of a character."""
        if token in self._tokens:
            return True
        if not self._last:
            return False
        text = self._decode([*self._before, token])
        clean = text.startswith(self._before_text) and "\ufffd" not in text
        return not clean or any(last in text[len(self._before_text) :] for last in self._last)


def closes(text: str, delimiter: str | None) -> bool:
    """Whether a step's text holds the delimiter: a blank one after something other than white space."""
    if not delimiter:
        return False
    blank = len(text) - len(text.lstrip())
    return text.find(delimiter, 0 if delimiter.strip() else blank + 1) >= 0
