"""A beam: candidates that compete with each other for places."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

from tts_search.search.algorithms.branches import has_grown, mark_pruned
from tts_search.search.run import Branch, Run

__all__ = ["Beam"]


class Beam:
    """Candidates that compete with each other.

    Parameters
    ----------
    run : Run
        The search.
    width : int
        Candidates of a round.
    keep : int
        Those of them that survive it.

    Attributes
    ----------
    survivors : list of Branch
        Who continues, in order; with ``completed="compete"`` finished branches among them.
    ended : list of Branch
        Branches that left the beam, or keep a place in it for good, in order of ending.
    pool : list of Branch
        The candidates of this round, in order.
    places : int
        How many of the pool survive: `keep`, less the places that are taken for good.
    """

    def __init__(self, run: Run, width: int, keep: int) -> None:
        self.run, self.width, self.keep = run, width, keep
        self.completed = run.config.completed
        self.survivors = [run.root]
        self.ended: list[Branch] = []
        self.pool: list[Branch] = []
        self.places = keep

    @property
    def live(self) -> list[Branch]:
        """The survivors that will have children."""
        return [branch for branch in self.survivors if not branch.ended]

    @property
    def contenders(self) -> list[Branch]:
        """Who of the pool competes for the places."""
        return [branch for branch in self.pool if not (branch.ended and self.completed == "leave")]

    @property
    def members(self) -> list[Branch]:
        """All that have ended or may continue."""
        return [*self.ended, *self.survivors]

    def deal(self) -> list[Branch]:
        """Deal the next candidates: one survivor a turn, A, B, C, A, ... (the first round: the root at each).

        If finished branches leave, those who stay share all `width` turns. Else a survivor has what each of `keep`
        places gets, and the turns of a place that is not taken, or taken by a finished branch, are lost.
        """
        if self.completed == "leave" or self.survivors == [self.run.root]:
            return list(islice(cycle(self.survivors), self.width))
        places = (turn % self.keep for turn in range(self.width))
        return [self.survivors[place] for place in places if place < len(self.survivors)]

    def gather(self, turns: list[Branch], children: Iterator[Branch]) -> None:
        """Make the pool of the round: at each turn the next new child, or (once) the finished branch that competes.

        Without those that have no text and, if duplicates are dropped, of equal texts all but the first.
        """
        pool: dict[int, Branch] = {}
        for branch in turns:
            member = branch if branch.ended else next(children)
            pool.setdefault(member.id, member)
        self.pool = self._filtered([*pool.values()])
        mark_pruned(self.run, list(pool.values()), self.pool, "empty, or repeats another")

    def _filtered(self, pool: list[Branch]) -> list[Branch]:
        grown = [branch for branch in pool if has_grown(branch)]
        if not self.run.config.dedupe:
            return grown
        leaving = {branch.id for branch in grown if branch.ended and self.completed == "leave"}
        first: dict[str, int] = {}  # who leaves does not compete, so takes nothing from others
        for branch in grown:
            if branch.id not in leaving:
                first.setdefault("".join(branch.texts), branch.id)
        stay = leaving.union(first.values())
        return [branch for branch in grown if branch.id in stay]

    def prune(self, best: list[Branch]) -> None:
        """Let the best of the pool survive; they stay in candidate order."""
        contenders, survives = self.contenders, {branch.id for branch in best}
        if self.completed == "leave":
            self.ended += [branch for branch in self.pool if branch.ended]
        chosen = [branch for branch in contenders if branch.id in survives]
        mark_pruned(self.run, contenders, chosen, f"number {{rank}} of {{count}} by score, and {len(chosen)} stay")
        if self.completed == "occupy":  # finished branches keep their places for good
            self.ended += [branch for branch in chosen if branch.ended]
            chosen = [branch for branch in chosen if not branch.ended]
            self.places = self.keep - len(self.ended)
        self.survivors = chosen
