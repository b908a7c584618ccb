"""Search algorithms: generators for one problem that do no I/O.

They yield lists of requests (:mod:`tts_search.protocol`) and are sent the answers; what they return is the
completions, in order. One file each, over the moves that they share (:mod:`tts_search.algorithms.moves`).
"""

from __future__ import annotations

from collections.abc import Callable

from tts_search.algorithms.beam_search import beam_search
from tts_search.algorithms.best_of_n import best_of_n
from tts_search.algorithms.branch import Branch, Run
from tts_search.algorithms.dvts import dvts
from tts_search.algorithms.moves import Moves

__all__ = ["ALGORITHMS", "Branch", "Moves", "Run"]

ALGORITHMS: dict[str, Callable[[Run], Moves[list[Branch]]]] = {
    "best_of_n": best_of_n,
    "beam_search": beam_search,
    "dvts": dvts,
}
"""The algorithm of each ``SearchConfig.method``."""
