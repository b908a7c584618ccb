"""Remembers the scores that a verifier has given. A score is found by the tokens that were scored."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

from tts_search.models.branches import TokenBranch
from tts_search.models.reading import Place

__all__ = ["ScoreMemory", "keys_of"]

_MOST: Final = 1 << 17  # about 20 MB
_BYTES: Final = 16


class ScoreMemory:
    """The most recent scores.

    The score at a place depends only on the tokens up to it. So a text that extends an earlier one needs new outputs
    only from its first new step on. The keys and values of the text before are in the prefix cache.

    Parameters
    ----------
    most : int
        How many scores are kept.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._scores: OrderedDict[bytes, float] = OrderedDict()  # the least recently used one first

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, key: bytes) -> float | None:
        """Return the score of a text, if it is known."""
        score = self._scores.get(key)
        if score is not None:
            self._scores.move_to_end(key)
        return score

    def put(self, key: bytes, score: float) -> None:
        """Keep the score of a text."""
        self._scores[key] = score
        self._scores.move_to_end(key)
        if len(self._scores) > self._most:
            self._scores.popitem(last=False)


def keys_of(places: Iterable[Place]) -> dict[Place, bytes]:
    """Return a digest of the tokens up to and including each place. O(tokens) for each branch."""
    positions: dict[TokenBranch, list[int]] = {}
    for branch, position in places:
        positions.setdefault(branch, []).append(position)
    keys = {}
    for branch, own in positions.items():
        path, digest, begin = array("q", branch.path()), blake2b(digest_size=_BYTES), 0
        for position in sorted(own):
            digest.update(path[begin : position + 1].tobytes())
            begin = position + 1
            keys[branch, position] = digest.copy().digest()
    return keys
