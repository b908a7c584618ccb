"""Best-of-N: n independent completions, each read once by the verifier."""

from __future__ import annotations

from tts_search.algorithms.branch import Branch, Run
from tts_search.algorithms.moves import Moves, expand, score

__all__ = ["best_of_n"]


def best_of_n(run: Run) -> Moves[list[Branch]]:
    """Sample n completions in one go, without a delimiter; they are cut into steps for the verifier.

    Two calls in all: one of the policy, one of the verifier. The completions of a smaller n are the first ones of a
    larger.
    """
    run.round = 1
    completions = yield from expand(run, [run.root] * run.config.n, last=True)
    if not any(branch.text or branch.finished for branch in completions):
        raise run.error("policy: it returned nothing, an empty text for each sample")
    yield from score(run, completions, last=True)
    if run.config.sort_completed and run.scored:
        completions = sorted(completions, key=lambda branch: -branch.score)
    return completions
