"""Best-of-N: n independent completions, each read once by the verifier."""

from __future__ import annotations

from collections.abc import Iterator

from tts_search.search.algorithms.branches import check_growth
from tts_search.search.config import SearchConfig
from tts_search.search.moves import Moves, expand, score
from tts_search.search.run import Branch, Run

__all__ = ["best_of_n"]


def best_of_n(run: Run) -> Moves[list[Branch]]:
    """Sample n completions in one go, without a delimiter; they are cut into steps for the verifier.

    Two calls in all: one of the policy, one of the verifier; with ``agree_margin`` as many for each portion. The
    completions of a smaller n are the first ones of a larger.

    Raises
    ------
    SearchError
        If the policy returns nothing, or it or the verifier something else than was asked for.
    """
    completions: list[Branch] = []
    for size in _portions(run.config):
        run.round += 1
        samples = yield from expand(run, [run.root] * size, last=True)
        check_growth(run, samples)
        yield from score(run, samples, last=True)
        completions += samples
        if run.is_done(completions):
            break
    if run.config.sort_completed and run.scored:
        completions = sorted(completions, key=lambda branch: -branch.score)
    return completions


def _portions(config: SearchConfig) -> Iterator[int]:
    """Yield sizes that add up to n: all at once, or `agree_margin` and then each time as many as there are."""
    done = 0
    while done < config.n:
        size = min(config.n - done, done or config.agree_margin or config.n)
        yield size
        done += size
