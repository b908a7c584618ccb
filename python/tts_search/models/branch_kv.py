"""The branches that have keys and values in a pool: how they get them, how they give them back, and who holds what."""

from __future__ import annotations

from collections.abc import Sequence

from tts_search.models.branches import TokenBranch, kv_of
from tts_search.models.decoder import KVPool

__all__ = ["BranchKV"]


class BranchKV:
    """The KV of branches in one pool: forked from their parents, cut, and freed.

    It runs no forward. The caller who gets slots for a branch has to write them.

    Parameters
    ----------
    pool : KVPool
        The pool that holds the KV.

    Attributes
    ----------
    resident : dict of TokenBranch to None
        Branches that have KV.
    guests : set of TokenBranch
        Released branches that have KV again, so that descendants can be forked from them.
    full : bool
        Set by a caller that found no room; cleared as soon as any KV is freed.
    ticks : int
        Number of forwards with rows so far.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.switch = pool.shape.switch
        self.resident: dict[TokenBranch, None] = {}
        self.guests: set[TokenBranch] = set()
        self.full = False
        self.ticks = 0

    def is_right(self, branch: TokenBranch) -> bool:
        """Whether a branch's KV is of the kind that its length needs."""
        return self.switch is None or branch.far is (branch.length > self.switch)

    def take_side(self, branch: TokenBranch) -> None:
        """Change a branch to the kind of KV that its length needs: KV of the other kind is freed."""
        if not self.is_right(branch):
            self.drop(branch)
            assert not branch.holders, "a branch that others are built on has grown"
            assert branch.twin is None, "a branch that others are built on has grown"
            branch.far = not branch.far

    def above(self, node: TokenBranch) -> TokenBranch | None:
        """The branch whose KV a branch begins with: its parent, or the parent's twin if the kinds differ."""
        parent = node.parent
        if parent is None or parent.far is node.far:
            return parent
        if parent.twin is None:
            assert self.switch is not None
            tokens = parent.tokens if node.far else parent.tokens[: max(0, self.switch - parent.start)]
            twin = TokenBranch(
                parent.meter, parent.parent, parent.start, tokens, parent.given, released=True, twin=parent
            )
            twin.far, twin.reached = node.far, parent.reached
            parent.twin = twin
        return parent.twin

    def begin(self, node: TokenBranch) -> int:
        """How many tokens of a branch's path have KV, or will have when it is forked."""
        if node.kv is not None:
            return node.cached
        above = self.above(node)
        return 0 if above is None else self.pool.kept(kv_of(above), node.start)

    def has_source(self, node: TokenBranch) -> bool:
        """Whether a branch without KV can be forked now."""
        above = self.above(node)
        return above is None or (above.kv is not None and above.cached >= node.start)

    def incomplete(self, branch: TokenBranch) -> list[TokenBranch]:
        """A branch and its ancestors, from the first one without KV downwards."""
        nodes = [branch]
        while nodes[-1].kv is None and (above := self.above(nodes[-1])) is not None:
            if above.kv is None and above.holders:
                self.restore(above)
            if self.has_source(nodes[-1]):
                break
            nodes.append(above)
        return nodes[::-1]

    def give(
        self, nodes: Sequence[TokenBranch], sources: Sequence[TokenBranch | None], length: int | None = None
    ) -> None:
        """Fork the KV of ``sources`` for ``nodes`` (a root for None), cut to ``length`` or to where a node starts."""
        forest = self.pool.forest
        forks = iter(forest.fork([kv_of(source) for source in sources if source is not None]))
        for node, source in zip(nodes, sources, strict=True):
            node.kv = forest.add_root() if source is None else next(forks)
            size = node.start if length is None else length
            if source is not None and forest.length(node.kv) > size:  # counters of a running source lag behind
                forest.truncate(node.kv, size)
            self.resident[node] = None
            if node.released:
                self.guests.add(node)
            if (above := self.above(node)) is not None:
                above.holders.add(node)
            self.resize(node, forest.length(node.kv))
            node.meter.note_peaks()  # now: some are given back before a forward

    def restore(self, node: TokenBranch) -> None:
        """Restore a released branch's KV from a descendant that still reads it."""
        donor = node
        while donor.kv is None:
            donor = max(donor.holders, key=lambda child: child.start)
        self.give([node], [donor], node.start + node.held)

    def adopt(self, node: TokenBranch, kv: int, length: int) -> None:
        """Give a branch a part of the prefix cache's KV. This part may include its ancestors' tokens."""
        (node.kv,) = self.pool.forest.fork([kv])
        if self.pool.forest.length(node.kv) > length:
            self.pool.forest.truncate(node.kv, length)
        self.resident[node] = None
        if node.released:
            self.guests.add(node)
        self.resize(node, length)
        lower, end = node, length
        while True:
            lower.meter.cached += max(0, end - lower.reached)
            lower.reached = max(lower.reached, end)
            parent = lower.parent
            if parent is None or lower in parent.holders:
                return
            parent.holders.add(lower)
            held = max(parent.held, lower.start - parent.start)
            parent.meter.unique += held - parent.held
            parent.held = held
            if parent.kv is not None:
                return
            lower, end = parent, lower.start

    def truncate(self, branch: TokenBranch, length: int) -> None:
        """Cut a branch's KV after the first ``length`` tokens of its path. Tokens read again will count as new."""
        branch.reached = min(branch.reached, length)
        if branch.kv is not None and branch.cached > length:
            self.pool.forest.truncate(branch.kv, length)
            self.resize(branch, self.pool.forest.length(branch.kv))
            self.full = False

    def drop(self, node: TokenBranch) -> None:
        """Free a branch's KV, except what descendants read."""
        if node.kv is not None:
            self.pool.forest.free([node.kv])
            self.forget(node)

    def forget(self, node: TokenBranch) -> None:
        """Record that a branch no longer owns its KV."""
        del self.resident[node]
        self.guests.discard(node)
        node.kv, node.sought = None, False
        self.resize(node, 0)
        self.full = False

    def dismiss_guests(self, waiting: Sequence[TokenBranch]) -> None:
        """Free guests again, except those that one of ``waiting`` is still to be forked from."""
        if not self.guests:
            return
        needed = {node for branch in waiting for node in self.incomplete(branch)}
        needed |= {above for node in needed if node.kv is None and (above := self.above(node)) is not None}
        for guest in [guest for guest in self.guests if guest.holders and guest not in needed]:
            self.drop(guest)

    def resize(self, node: TokenBranch, cached: int) -> None:
        """Set how many tokens have KV through ``node``, and update the counters of its ancestors."""
        node.meter.settle(self.ticks)
        node.meter.logical += cached - node.cached
        node.cached = cached
        lower = node
        while True:
            held = max(lower.cached, *(child.start for child in lower.holders), lower.start) - lower.start
            lower.meter.unique += held - lower.held
            lower.held = held
            if lower.kv is not None or lower.holders or (above := self.above(lower)) is None:
                return
            above.holders.discard(lower)
            if above.kv is not None or any(child.start >= lower.start for child in above.holders):
                return  # it holds as much as before; siblings start at the same token, so the first one says so
            lower = above
