"""Particle filtering: branches are resampled in proportion to the odds of their scores."""

from __future__ import annotations

import math

from tts_search.search.algorithms.branches import check_growth, in_order, mark_pruned
from tts_search.search.moves import Moves, expand, release, score
from tts_search.search.run import Branch, Run

__all__ = ["odds", "particle_filtering", "resample"]


def particle_filtering(run: Run) -> Moves[list[Branch]]:
    """Search with n particles (Puri et al., arXiv 2502.01618), weighted as its_hub weighs them.

    Each round every particle that has not ended grows by a step; then n are drawn from all, with replacement, the
    ended ones too, with a probability in proportion to :func:`odds` of their scores. A branch that was drawn twice
    is two particles. It ends when all particles have, and returns them, copies included.

    Raises
    ------
    SearchError
        If the policy returns nothing, a score is not within [0, 1], or the policy or the verifier returns something
        else than was asked for.
    """
    config = run.config
    particles = [run.root] * config.n
    for last in run.rounds():
        children = yield from expand(run, [branch for branch in particles if not branch.ended], last=last)
        if run.round == 1:
            check_growth(run, children)
        yield from score(run, children, last=last)
        new = iter(children)
        particles = resample(run, [branch if branch.ended else next(new) for branch in particles])
        live = [branch for branch in particles if not branch.ended]
        if not live or run.is_done(particles):
            break
        yield from release(run, live)
    return in_order(run, particles)


def resample(run: Run, particles: list[Branch]) -> list[Branch]:
    """Draw n particles with replacement, each in proportion to its odds; the draws are the round's own."""
    weights = [odds(run, branch) for branch in particles]
    drawn = run.random(-2, run.round).choices(particles, weights, k=run.config.n)
    mark_pruned(run, particles, drawn, "not drawn; number {rank} of {count} by score")
    return drawn


def odds(run: Run, branch: Branch) -> float:
    """Return p / (1 - p) of a branch's score, which is kept 1e-7 away from 0 and 1; of one without a step, 1e-7.

    Raises
    ------
    SearchError
        If the score is not within [0, 1].
    """
    p = 0.0 if branch.score == -math.inf else branch.score
    if not 0 <= p <= 1:
        raise run.error(f"verifier: particle filtering needs scores within [0, 1], got {branch.score!r}")
    p = min(max(p, 1e-7), 1 - 1e-7)
    return p / (1 - p)
