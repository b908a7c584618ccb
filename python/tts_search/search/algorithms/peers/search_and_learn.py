"""The searches of huggingface/search-and-learn (commit 6f81cac)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice

from tts_search.search.algorithms.best_of_n import best_of_n as sample_n
from tts_search.search.algorithms.branches import best, distinct, mark_pruned
from tts_search.search.algorithms.peers.common import stop_short
from tts_search.search.moves import Moves, expand, release, score
from tts_search.search.run import Branch, Run
from tts_search.search.types import StepParams
from tts_search.search.voting import Ballot

__all__ = ["beam_search", "best_of_n", "dvts"]

_BALLOT = Ballot(everyone=True, vote_aggregate="last")
_LAST_MAX_TOKENS = 2048  # of a step of the last round of DVTS, whatever the option says


def best_of_n(run: Run) -> Moves[list[Branch]]:
    """Sample n completions; the best is the first maximum, finished or not."""
    run.ballot = _BALLOT
    return sample_n(run)


def beam_search(run: Run) -> Moves[list[Branch]]:
    """Keep the best `keep` of n candidates; finished ones leave, and only what has ended is reported."""
    run.ballot = _BALLOT
    config = run.config
    beams, completed = [run.root], list[Branch]()
    for last in run.rounds():
        children = yield from expand(run, islice(cycle(beams), config.n), last=last)
        stop_short(children)
        yield from score(run, children, last=last)
        completed += [branch for branch in children if branch.ended]
        active = [branch for branch in children if not branch.ended]
        if not active:
            break
        others = distinct(active) if config.dedupe else active
        mark_pruned(run, active, others, "repeats another")
        chosen = {branch.id for branch in best(others, config.places)}
        beams = [branch for branch in others if branch.id in chosen]
        mark_pruned(run, others, beams, f"number {{rank}} of {{count}} by score, and {len(beams)} stay")
        yield from release(run, beams)
    if config.sort_completed:
        completed.sort(key=lambda branch: -branch.score)
    return list(islice(cycle(completed), config.n))  # cut to n, or repeated


def dvts(run: Run) -> Moves[list[Branch]]:
    """Let the best of `expand` children go on in each subtree; reported are all siblings of its last round.

    A winner that ended, or that holds ``boxed{`` (the config's `stop_text`), ends its subtree.
    """
    run.ballot = _BALLOT
    config = run.config
    beams = [run.root] * (config.n // config.expand)
    siblings: list[list[Branch]] = [[] for _ in beams]
    live = list(range(len(beams)))
    for last in run.rounds():
        parents = [beams[subtree] for subtree in live for _ in range(config.expand)]
        children = yield from expand(run, parents, last=last, params=_last_params(run) if last else None)
        stop_short(children)
        yield from score(run, children, last=last, ends=lambda branch: branch.cut)
        new = iter(children)
        for subtree in live:
            siblings[subtree] = list(islice(new, config.expand))
            (beams[subtree],) = best(siblings[subtree], 1)
            mark_pruned(run, siblings[subtree], [beams[subtree]], "number {rank} of {count} by score, and 1 stays")
        live = [subtree for subtree in live if not beams[subtree].ended]
        if not live:
            break
        yield from release(run, [beams[subtree] for subtree in live])
    return [branch for own in siblings for branch in own]


def _last_params(run: Run) -> Callable[[Branch], StepParams]:
    params = replace(run.config, max_step_tokens=_LAST_MAX_TOKENS).step_params
    return lambda branch: params(last=True, tokens_left=run.tokens_left(branch))
