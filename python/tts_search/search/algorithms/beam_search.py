"""Beam search over steps: each round has n candidates, and the best of them survive and share the next n children."""

from __future__ import annotations

from collections.abc import Sequence

from tts_search.search.algorithms.beam import Beam
from tts_search.search.algorithms.branches import in_order
from tts_search.search.moves import Moves, expand, release, score_and_prune
from tts_search.search.run import Branch, Run

__all__ = ["beam_search", "search_beams"]


def beam_search(run: Run) -> Moves[list[Branch]]:
    """Search with all candidates in one beam: `keep` of n survive a round (Snell et al., arXiv 2408.03314).

    Raises
    ------
    SearchError
        As :func:`search_beams` does.
    """
    return search_beams(run, [Beam(run, run.config.n, run.config.places)])


def search_beams(run: Run, beams: Sequence[Beam]) -> Moves[list[Branch]]:
    """Search in beams side by side, so that a round is one call of the policy and one of the verifier.

    A round: each beam deals children to its survivors, they are sampled and scored, and the best of each beam survive.

    Raises
    ------
    SearchError
        If the policy returns nothing, or it or the verifier something else than was asked for.
    """
    active = list(beams)
    for last in run.rounds():
        turns = [beam.deal() for beam in active]
        parents = [branch for own in turns for branch in own if not branch.ended]
        children = iter((yield from expand(run, parents, last=last)))
        for beam, own in zip(active, turns, strict=True):
            beam.gather(own, children)
        if not any(beam.pool or beam.ended for beam in beams):
            raise run.error("policy: it returned nothing, an empty text for each sample")
        new = [branch for beam in active for branch in beam.pool if branch.round == run.round]
        contenders, places = [beam.contenders for beam in active], [beam.places for beam in active]
        survivors = yield from score_and_prune(run, new, contenders, places, last=last)
        for beam, best in zip(active, survivors, strict=True):
            beam.prune(best)
        active = [beam for beam in active if beam.live]
        if not active or run.is_done(branch for beam in beams for branch in beam.members):
            break
        yield from release(run, [branch for beam in active for branch in beam.live])
    return in_order(run, [branch for beam in beams for branch in beam.members])
