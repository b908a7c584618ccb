"""Seeds of draws: a branch's seed is a hash of (seed, problem, path), so nothing else that runs can change it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["Seeds", "seed_of"]


class Seeds:
    """The seeds of one problem's branches.

    Each is the number made of the first 63 bits of BLAKE2b-64 (big-endian) over the UTF-8 bytes of three lines: the
    search's seed in decimal, the problem's text, and the path's child numbers joined by dots. That is a fixed public
    function: the same on every machine, in every process and version. A problem is known by its text, not by its place
    in a list, so a data set can be split, shuffled or resumed without changing a draw (and the same text twice gives
    the same result twice).

    Examples
    --------
    >>> Seeds(0, "What is 1 + 1?").of((0, 3)) == seed_of(0, "What is 1 + 1?", (0, 3))
    True
    """

    def __init__(self, seed: int, problem: str) -> None:
        head = f"{seed}\n{problem}\n".encode("utf-8", "surrogatepass")
        self._head = hashlib.blake2b(head, digest_size=8)

    def of(self, path: Iterable[int]) -> int:
        """Return the seed of the branch at `path` (child numbers from the root), ``0 <= seed < 2**63``."""
        digest = self._head.copy()
        digest.update(".".join(map(str, path)).encode())
        return int.from_bytes(digest.digest(), "big") >> 1


def seed_of(seed: int, problem: str, path: Iterable[int]) -> int:
    """Return the seed of one branch; see :class:`Seeds`."""
    return Seeds(seed, problem).of(path)
