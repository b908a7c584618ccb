"""Diverse verifier tree search: beam search in independent subtrees, so that one good start cannot take it all."""

from __future__ import annotations

from tts_search.search.algorithms.groups import search_groups
from tts_search.search.moves import Moves
from tts_search.search.run import Branch, Run

__all__ = ["dvts"]


def dvts(run: Run) -> Moves[list[Branch]]:
    """Search in n / expand groups of `expand` candidates, one of which survives (Beeching et al., 2024).

    The rounds of the subtrees run side by side, so a round is one call of the policy and one of the verifier all the
    same.

    Raises
    ------
    SearchError
        As :func:`~tts_search.search.algorithms.groups.search_groups` does.
    """
    return search_groups(run)
