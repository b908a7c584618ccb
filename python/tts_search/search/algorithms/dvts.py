"""Diverse verifier tree search: beam search in independent subtrees, so that one good start cannot take all places."""

from __future__ import annotations

from tts_search.search.algorithms.beam import Beam
from tts_search.search.algorithms.beam_search import search_beams
from tts_search.search.moves import Moves
from tts_search.search.run import Branch, Run

__all__ = ["dvts"]


def dvts(run: Run) -> Moves[list[Branch]]:
    """Search in n / expand beams of `expand` candidates, one of which survives (Beeching et al., 2024).

    Raises
    ------
    SearchError
        As :func:`~tts_search.search.algorithms.beam_search.search_beams` does.
    """
    return search_beams(run, [Beam(run, run.config.width, keep=1) for _ in range(run.config.groups)])
