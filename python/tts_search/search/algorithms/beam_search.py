"""Beam search over steps: n candidates a round, the best of which survive and share the next n children."""

from __future__ import annotations

from tts_search.search.algorithms.groups import search_groups
from tts_search.search.moves import Moves
from tts_search.search.run import Branch, Run

__all__ = ["beam_search"]


def beam_search(run: Run) -> Moves[list[Branch]]:
    """Search with all candidates in one group: `keep` of n survive a round (Snell et al., arXiv 2408.03314).

    Raises
    ------
    SearchError
        As :func:`~tts_search.search.algorithms.groups.search_groups` does.
    """
    return search_groups(run)
