"""The searches of RyanLiu112/compute-optimal-tts (commit 0ee2578)."""

from __future__ import annotations

from dataclasses import dataclass, field

from tts_search.search.algorithms.best_of_n import best_of_n as sample_n
from tts_search.search.algorithms.branches import best, mark_pruned
from tts_search.search.algorithms.peers.common import stop_short, to_delimiter
from tts_search.search.moves import Moves, expand, release, score
from tts_search.search.run import Branch, Run
from tts_search.search.voting import Ballot

__all__ = ["beam_search", "best_of_n"]

_BALLOT = Ballot(everyone=True, exact=True)


def best_of_n(run: Run) -> Moves[list[Branch]]:
    """Sample n completions; the best is the first maximum, finished or not."""
    run.ballot = _BALLOT
    return sample_n(run)


@dataclass(slots=True)
class _Search:
    """One of the independent searches: who continues, best first, and who has taken a place for good."""

    frontier: list[Branch]
    places: int
    ended: list[Branch] = field(default_factory=list)

    def take(self, chosen: list[Branch], keep: int) -> None:
        """Give places to the best, in order; those that have ended keep theirs.

        The number of places is read at the last unfinished one: an ended one that ranks below it gives its place up
        one round late.
        """
        self.frontier = []
        for branch in chosen:
            if branch.ended:
                self.ended.append(branch)
            else:
                self.frontier.append(branch)
                self.places = keep - len(self.ended)
        if len(self.ended) >= keep:
            del self.ended[keep:]
            self.frontier = []


def beam_search(run: Run) -> Moves[list[Branch]]:
    """Search several times over, with `keep` survivors of ``keep * expand`` candidates each; it is DVTS with keep 1.

    The searches share the root, and their rounds run side by side.
    """
    run.ballot = _BALLOT
    config = run.config
    keep, width = config.places, config.places * config.expand
    searches = [_Search([run.root], keep) for _ in range(config.n // width)]
    active = searches
    for last in run.rounds():
        count = width if run.round == 1 else config.expand
        parents = [[branch for branch in one.frontier for _ in range(count)] for one in active]
        turns = [branch for own in parents for branch in own]
        children = iter((yield from expand(run, turns, last=last, params=to_delimiter(run))))
        pools = [_legal(run, [next(children) for _ in own]) for own in parents]
        yield from score(run, [branch for pool in pools for branch in pool], last=last)
        for one, pool in zip(active, pools, strict=True):
            chosen = best(pool, one.places)
            mark_pruned(run, pool, chosen, f"number {{rank}} of {{count}} by score, and {len(chosen)} stay")
            one.take(chosen, keep)
        active = [one for one in active if one.frontier]
        if not active:
            break
        yield from release(run, [branch for one in active for branch in one.frontier])
    return [branch for one in searches for branch in one.ended]


def _legal(run: Run, children: list[Branch]) -> list[Branch]:
    """Drop children that are empty, cut by their length or repeat a sibling, unless that leaves a parent none."""
    stop_short(children)
    families: dict[int, list[Branch]] = {}
    for branch in children:
        assert branch.parent is not None
        families.setdefault(branch.parent.id, []).append(branch)
    legal: set[int] = set()
    for family in families.values():
        first: dict[str, int] = {}
        for branch in family:
            if branch.text and not branch.cut:
                first.setdefault(branch.text, branch.id)
        legal.update(first.values() or (branch.id for branch in family))
    kept = [branch for branch in children if branch.id in legal]
    mark_pruned(run, children, kept, "empty, cut by its length, or repeats another")
    return kept
