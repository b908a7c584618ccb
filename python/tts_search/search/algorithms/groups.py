"""Rounds of groups of candidates: beam search is one group, DVTS one for each subtree.

A round: children are dealt to the survivors of the last one, sampled, scored; in each group the best `keep` survive.
What finished branches do, and the order of everything that can make a difference, is told at the place that decides
it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

from tts_search.search.moves import Moves, expand, release, score_and_prune
from tts_search.search.run import Branch, Run

__all__ = ["has_grown", "in_order", "mark_pruned", "search_groups"]


def search_groups(run: Run) -> Moves[list[Branch]]:
    """Search in ``config.groups`` groups and return the completions in order.

    Raises
    ------
    SearchError
        If the policy returns nothing, or it or the verifier something else than was asked for.
    """
    config = run.config
    groups = [Group(run) for _ in range(config.groups)]
    active = groups
    for run.round in range(1, config.max_steps + 1):
        last = run.round == config.max_steps
        deals = [group.turns() for group in active]
        parents = [branch for turns in deals for branch in turns if not branch.ended]
        children = yield from expand(run, parents, last=last)
        new = iter(children)
        for group, turns in zip(active, deals, strict=True):
            group.gather(turns, new)
        if not any(group.pool or group.ended for group in groups):
            raise run.error("policy: it returned nothing, an empty text for each sample")
        candidates = [branch for group in active for branch in group.pool if branch.round == run.round]
        contenders, places = [group.contenders for group in active], [group.places for group in active]
        survivors = yield from score_and_prune(run, candidates, contenders, places, last=last)
        for group, best in zip(active, survivors, strict=True):
            group.prune(best)
        active = [group for group in active if group.live]
        if not active or run.is_done(_members(groups)):
            break
        yield from release(run, [branch for group in active for branch in group.live])
    return _report(run, groups)


class Group:
    """Candidates that compete with each other.

    Attributes
    ----------
    survivors : list of Branch
        Who continues, in order; with ``completed="compete"`` finished branches among them.
    ended : list of Branch
        Branches that left the beam, or keep a place in it for good, in order of ending.
    pool : list of Branch
        The candidates of this round, in order.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = run.config
        self.rules = run.config._rules
        self.survivors = [run.root]
        self.ended: list[Branch] = []
        self.pool: list[Branch] = []
        self.places = run.config.places

    @property
    def live(self) -> list[Branch]:
        """The survivors that will have children."""
        return [branch for branch in self.survivors if not branch.ended]

    def turns(self) -> list[Branch]:
        """Deal the next candidates: one survivor a turn, A, B, C, A, ... (the first round: the root at each).

        If finished branches leave, those who stay share all `width` turns. Else a survivor has what each of `keep`
        places gets, and the turns of a place that is not taken, or taken by a finished branch, are lost.
        """
        width, keep = self.config.width, self.config.places
        if self.survivors == [self.run.root]:
            return [self.run.root] * (self.rules.first or width)
        if self.config.completed == "leave":
            turns = list(islice(cycle(self.survivors), width)) if self.survivors else []
        else:
            places = (turn % keep for turn in range(width))
            turns = [self.survivors[place] for place in places if place < len(self.survivors)]
        if self.rules.deal == "block":
            order = {branch.id: index for index, branch in enumerate(self.survivors)}
            turns.sort(key=lambda branch: order[branch.id])
        return turns

    def gather(self, turns: list[Branch], children: Iterator[Branch]) -> None:
        """Make the pool of the round: at each turn the next new child, or the finished branch that competes."""
        seen: set[int] = set()
        pool = []
        for branch in turns:
            if not branch.ended:
                pool.append(next(children))
            elif self.rules.copies or branch.id not in seen:
                pool.append(branch)
            seen.add(branch.id)
        self.pool = self._filter(pool)
        mark_pruned(self.run, pool, self.pool, "empty, cut by its length, or repeats another")

    def _filter(self, pool: list[Branch]) -> list[Branch]:
        """Drop candidates without a text, and duplicates: of equal text, the first one stays."""
        if self.rules.filter_siblings:
            pool = _filter_siblings(pool)
        pool = [branch for branch in pool if has_grown(branch) or self.rules.empty_stays]
        if not self.config.dedupe:
            return pool
        texts: set[str] = set()
        kept = []
        for branch in pool:
            leaves = self.config.completed == "leave" and branch.ended  # does not compete, so takes nothing from others
            text = "".join(branch.texts)
            if leaves or text not in texts:
                kept.append(branch)
            if not leaves:
                texts.add(text)
        return kept

    @property
    def contenders(self) -> list[Branch]:
        """Who of the pool competes for the places."""
        if self.config.completed == "leave":
            return [branch for branch in self.pool if not branch.ended]
        return self.pool

    def prune(self, best: list[Branch]) -> None:
        """Let the best of the pool survive, best first."""
        contenders = self.contenders
        if self.config.completed == "leave":
            self.ended += [branch for branch in self.pool if branch.ended]
        chosen = best if self.rules.order == "score" else self._in_pool_order(best)
        mark_pruned(self.run, contenders, chosen, f"number {{rank}} of {{count}} by score, and {len(chosen)} stay")
        if self.config.completed == "occupy":
            self._take_places(chosen)
        else:
            self.survivors = chosen

    def _in_pool_order(self, best: list[Branch]) -> list[Branch]:
        left = Counter(branch.id for branch in best)  # a copy that competes has its original's id
        chosen = []
        for branch in self.contenders:
            if left[branch.id]:
                left[branch.id] -= 1
                chosen.append(branch)
        return chosen

    def _take_places(self, chosen: list[Branch]) -> None:
        """Finished branches among the chosen keep their places for good; the rest of the places is open next round."""
        self.survivors = []
        keep = self.config.places
        for branch in chosen:
            if branch.ended:
                self.ended.append(branch)
            else:
                self.survivors.append(branch)
            if not (branch.ended and self.rules.late_places):
                self.places = keep - len(self.ended)
            if len(self.ended) == keep:
                self.survivors = []
                break


def _filter_siblings(pool: list[Branch]) -> list[Branch]:
    """Drop children that are empty, cut by their length or repeat a sibling, unless that leaves a parent none."""
    families: dict[int, list[Branch]] = {}
    for branch in pool:
        assert branch.parent is not None
        families.setdefault(branch.parent.id, []).append(branch)
    dropped: set[int] = set()
    for family in families.values():
        first: dict[str, int] = {}
        for branch in family:
            if branch.text and not branch.cut:
                first.setdefault(branch.text, branch.id)
        if first:
            dropped |= {branch.id for branch in family} - set(first.values())
    return [branch for branch in pool if branch.id not in dropped]


def mark_pruned(run: Run, before: Sequence[Branch], after: Sequence[Branch], why: str) -> None:
    """Mark those that this round left out; in `why`, ``{rank}`` and ``{count}`` are their place by score among all."""
    kept = {branch.id for branch in after}
    ranked = {branch.id: rank for rank, branch in enumerate(sorted(before, key=_descending), start=1)}
    for branch in before:
        if branch.id not in kept:
            branch.state, branch.pruned_in = "pruned", run.round
            branch.why = why.format(rank=ranked[branch.id], count=len(ranked))


def _descending(branch: Branch) -> float:
    return math.inf if math.isnan(branch.score) else -branch.score


def has_grown(branch: Branch) -> bool:
    """Whether a new branch has a text, or has ended without one."""
    return bool(branch.text) or branch.finished or branch.stopped


def _members(groups: list[Group]) -> list[Branch]:
    return [branch for group in groups for branch in [*group.ended, *group.survivors]]


def _report(run: Run, groups: list[Group]) -> list[Branch]:
    """Return the completions in order."""
    config, rules = run.config, run.config._rules
    if rules.report == "groups":
        return [branch for group in groups for branch in group.ended]
    if rules.report == "siblings":
        return [branch for group in groups for branch in group.pool]
    if rules.report == "beam":
        return [branch for group in groups for branch in group.turns()]
    members = in_order(run, _members(groups))
    return list(islice(cycle(members), config.n)) if rules.pad else members


def in_order(run: Run, members: list[Branch]) -> list[Branch]:
    """Return branches in the order of completions: as they finished, then the unfinished; or by score."""
    ordered = sorted(members, key=lambda branch: branch.id)  # rounds in order, and the candidates of a round in order
    if run.config._rules.report == "ended":
        ordered = [branch for branch in ordered if branch.ended]
    else:
        ordered.sort(key=lambda branch: not branch.finished)
    if run.config.sort_completed and run.scored:
        ordered.sort(key=lambda branch: -branch.score)
    return ordered
