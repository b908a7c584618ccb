"""The searches of its_hub (1.2.0): an empty step is a step like others, and finished paths compete as copies."""

from __future__ import annotations

from tts_search.search.algorithms.best_of_n import best_of_n as sample_n
from tts_search.search.algorithms.branches import best, mark_pruned
from tts_search.search.algorithms.particle_filtering import resample
from tts_search.search.algorithms.peers.common import to_delimiter
from tts_search.search.moves import Moves, expand, release, score
from tts_search.search.run import Branch, Run
from tts_search.search.voting import Ballot

__all__ = ["beam_search", "best_of_n", "particle_filtering"]

_BALLOT = Ballot(everyone=True)


def best_of_n(run: Run) -> Moves[list[Branch]]:
    """Sample n completions; the best is the first maximum, finished or not."""
    run.ballot = _BALLOT
    return sample_n(run)


def beam_search(run: Run) -> Moves[list[Branch]]:
    """Start with `expand` paths; the best `keep` of a round are replicated in turn, `expand` times each.

    Reported are the candidates that would be next, copies included.
    """
    run.ballot = _BALLOT
    paths = [run.root] * run.config.expand
    for last in run.rounds():
        paths = yield from _grown(run, paths, last)
        kept = best(paths, run.config.places)
        mark_pruned(run, paths, kept, f"number {{rank}} of {{count}} by score, and {len(kept)} stay")
        paths = kept * run.config.expand
        live = [branch for branch in kept if not branch.ended]
        if not live:
            break
        yield from release(run, live)
    return paths


def particle_filtering(run: Run) -> Moves[list[Branch]]:
    """Draw n paths of each round's n with replacement, in proportion to the odds of their scores."""
    run.ballot = _BALLOT
    paths = [run.root] * run.config.n
    for last in run.rounds():
        paths = yield from _grown(run, paths, last)
        paths = resample(run, paths)
        live = [branch for branch in paths if not branch.ended]
        if not live:
            break
        yield from release(run, live)
    return paths


def _grown(run: Run, paths: list[Branch], last: bool) -> Moves[list[Branch]]:
    """Grow the paths that have not ended by a step each, and have them scored; the others stay as they are."""
    live = [branch for branch in paths if not branch.ended]
    children = yield from expand(run, live, last=last, params=to_delimiter(run))
    yield from score(run, children, last=last)
    new = iter(children)
    return [branch if branch.ended else next(new) for branch in paths]
