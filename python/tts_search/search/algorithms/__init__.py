"""Search algorithms: generators for one problem that do no I/O.

They yield lists of requests (:mod:`tts_search.search.protocol`) and are sent the answers; what they return is the
completions, in order. One file each, over the moves that they share (:mod:`tts_search.search.moves`).
"""

from __future__ import annotations

from collections.abc import Callable

from tts_search.search.algorithms.beam_search import beam_search
from tts_search.search.algorithms.best_of_n import best_of_n
from tts_search.search.algorithms.budget_forcing import budget_forcing
from tts_search.search.algorithms.dvts import dvts
from tts_search.search.algorithms.frontier import ets, rebase
from tts_search.search.algorithms.particle_filtering import particle_filtering
from tts_search.search.algorithms.puct import puct
from tts_search.search.moves import Moves
from tts_search.search.run import Branch, Run

__all__ = ["ALGORITHMS", "Branch", "Moves", "Run"]

ALGORITHMS: dict[str, Callable[[Run], Moves[list[Branch]]]] = {
    "best_of_n": best_of_n,
    "beam_search": beam_search,
    "dvts": dvts,
    "rebase": rebase,
    "ets": ets,
    "particle_filtering": particle_filtering,
    "puct": puct,
    "budget_forcing": budget_forcing,
}
"""The algorithm of each ``SearchConfig.method``."""
