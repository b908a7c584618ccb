"""Branches of many search trees over one KV pool: who has keys and values there, and what it takes to get them back.

A `Branch` is the tokens that it adds to a part of its parent's path. Its KV may be released at any time and comes back
by forwarding those tokens again, together with what its ancestors lack, in the same packed forward. So a search that
does not fit the pool does its work bit by bit and returns what it would have returned.

Where a decoder has a switch (`DecoderShape.switch`), keys of short texts and of long ones are of two kinds. A branch is
of the kind that its length says, and has a twin of the other kind as soon as a descendant is to be built on that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.decoder import Batch, KVPool
from tts_search.models.device import upload
from tts_search.models.meter import Meter
from tts_search.models.prefix import PrefixCache

if TYPE_CHECKING:
    from tts_search.models.graphs import DecodeGraphs

MAX_FORWARD_TOKENS: Final = 2048


@dataclass(slots=True, eq=False)
class Branch:
    """The first ``start`` tokens of the parent's path, then ``tokens``.

    Attributes
    ----------
    meter : Meter
        Where its cost is counted.
    parent : Branch or None
    start : int
        0 without a parent, and else at least the parent's own start.
    tokens : list of int
        Its own tokens; it grows at this end.
    given : int
        How many of `tokens` were not sampled but read (a prompt): they count as prefill.
    marks : list of int
        Positions in the path whose outputs are wanted, besides that of the last token.
    kv, cached : int
        Its forest branch while it has one, and how many tokens of the path have KV through it.
    reached : int
        The most tokens of the path that ever had KV; what is forwarded below that is forwarded again.
    held : int
        How many of `tokens` have KV that this branch or a descendant reads.
    holders : set of Branch
        The children that have KV or have such children: they read this branch's.
    released : bool
        Nobody asks for it any more; its descendants may.
    used : int
        When it was last forwarded.
    far : bool
        Whether its KV is that of a text beyond the decoder's switch.
    twin : Branch or None
        The same tokens with KV of the other kind, for descendants of that kind.
    sought : bool
        The prefix cache was asked for it since it has no KV.
    """

    meter: Meter
    parent: Branch | None = field(default=None, repr=False)
    start: int = 0
    tokens: list[int] = field(default_factory=list)
    given: int = 0
    marks: list[int] = field(default_factory=list)
    kv: int | None = None
    cached: int = 0
    reached: int = 0
    held: int = 0
    holders: set[Branch] = field(default_factory=set, repr=False)
    released: bool = False
    used: int = 0
    far: bool = False
    twin: Branch | None = field(default=None, repr=False)
    sought: bool = False

    def __post_init__(self) -> None:
        self.reached = self.start
        self.far = self.parent is not None and self.parent.far

    @property
    def length(self) -> int:
        """Tokens of its path."""
        return self.start + len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens of its own that have no KV; with the end of the parent's, if its KV was cut in front of it."""
        have = self.start if self.kv is None else self.cached
        return self.start + len(self.tokens) - have

    def path(self) -> list[int]:
        """All tokens from the root on."""
        parts: list[list[int]] = []
        node: Branch | None = self
        end = self.length
        while node is not None:
            parts.append(node.tokens[: end - node.start])
            end = node.start
            node = node.parent
        return list(itertools.chain.from_iterable(reversed(parts)))


class PoolTooSmallError(RuntimeError):
    """The pool cannot hold ``branch`` even with everything else released."""

    def __init__(self, branch: Branch, pool_tokens: int) -> None:
        super().__init__(
            f"kv_memory: the KV pool of {pool_tokens} tokens is too small for one branch of {branch.length} tokens"
        )
        self.branch = branch


class Worker(Protocol):
    """Whoever has work on a branch: the branch's KV is not idle.

    ``age`` counts up: the youngest gives way where there is no room for all.
    """

    @property
    def branch(self) -> Branch:
        """What it works on."""

    @property
    def age(self) -> int:
        """Its place in the order in which workers get on."""

    def give_up(self) -> None:
        """Let go of the branch's KV and wait until there is room again."""

    def fail(self, error: Exception) -> None:
        """End, for this reason."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Branches that grow by one token in each forward, as columns [N] int64 on the CPU.

    What `BranchPool.run` has taken in: while they run, the pool's books of them are kept by the meters.

    Attributes
    ----------
    kv : Tensor
        Their forest branches.
    tokens, positions : Tensor
        The token that each forwards, and where it stands.
    """

    kv: Tensor
    tokens: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What one forward got done.

    Attributes
    ----------
    outputs : Tensor
        [N + len(places), ...]: what the model gave for the N rows, then for the places.
    places : list of (Branch, int)
        A branch and a position in its path: branch after branch in the order they were asked for, the marked positions
        that were reached and, for those that are done, the last one.
    done : list of Branch
        Branches without pending tokens now, in the order they were asked for.
    """

    outputs: Tensor
    places: list[tuple[Branch, int]]
    done: list[Branch]


NO_ROWS: Final = Rows(*(torch.empty(0, dtype=torch.int64) for _ in range(3)))


class BranchPool:
    """Keeps the KV of as many branches as fit a pool; those used longest ago make room.

    Parameters
    ----------
    pool : KVPool
        Where the KV lives.
    max_tokens : int
        The most tokens of one forward; longer prompts are read in chunks.
    graphs : DecodeGraphs or None
        Runs the forwards that want logits of one new token of each branch.

    Attributes
    ----------
    workers : dict of Worker to None
        Those whose branches have work; nobody takes the KV of these.
    full : bool
        Set by who found no room; unset as soon as any KV is given back.
    prefix_cache : bool
        Whether KV that is released stays until its room is wanted, for whoever reads the same tokens again. Never of
        a decoder with a switch.
    """

    def __init__(self, pool: KVPool, max_tokens: int = MAX_FORWARD_TOKENS, graphs: DecodeGraphs | None = None) -> None:
        self.pool = pool
        self.max_tokens = max_tokens
        self.graphs = graphs
        self.workers: dict[Worker, None] = {}
        self.full = False
        self._switch = pool.shape.switch
        self._resident: dict[Branch, None] = {}
        self._guests: set[Branch] = set()  # released ones that are back so that descendants can be forked from them
        self._cache: PrefixCache | None = None
        self._clock = 0
        self._ticks = 0  # forwards with rows

    @property
    def prefix_cache(self) -> bool:
        """Whether KV that is released stays until its room is wanted."""
        return self._cache is not None

    @prefix_cache.setter
    def prefix_cache(self, wanted: bool) -> None:
        wanted = wanted and self._switch is None  # else equal tokens may have KV of two kinds
        if wanted == self.prefix_cache:
            return
        if self._cache is not None:
            self._make_free(self.pool.forest.stats().pages_total)
        self._cache = PrefixCache() if wanted else None

    def forward(
        self,
        branches: Sequence[Branch],
        model: Callable[[Batch, tk.KVCache, Tensor | None], Tensor],
        head: bool,
        rows: Rows = NO_ROWS,
        most: int | None = None,
    ) -> Forwarded:
        """Run one token of each row, and the pending tokens of as many branches as fit a forward, the first ones first.

        Parameters
        ----------
        branches : sequence of Branch
            Each once, with at least one pending token. A branch whose ancestors lack KV takes their tokens along.
        model : callable
            The decoder's ``hidden`` or ``logits``.
        head : bool
            Whether it is the latter.
        rows : Rows
            Branches that run.
        most : int or None
            The most tokens of this forward, if fewer than usual.

        Raises
        ------
        tts_kernels.OutOfPages
            If there is no room for them, and no idle branch left that could make some. Nothing has changed but that
            idle ones have lost their KV.
        """
        self._clock += 1
        for branch in branches if self._switch is not None else ():
            self._take_side(branch)
        if self._cache is not None:
            branches = self._sought(branches, self._cache)
        while True:
            takes = self._choose(branches, max(1, min(self.max_tokens, most or self.max_tokens) - len(rows.kv)))
            try:
                slots = self._place(takes, rows)
                break
            except tk.OutOfPages:
                pages = len(rows.kv) + sum(1 + take // self.pool.forest.page_size for take in takes.values())
                if not (self._make_free(pages) or self._evict(branches, takes)):
                    raise
        try:
            done = [branch for branch in branches if not branch.pending]
            places = [(branch, place) for branch in branches for place in _reached(branch, takes.get(branch, 0))]
            outputs = self._run(takes, slots, rows, places, model, self.graphs if head else None)
        except BaseException:
            for branch in takes:  # their slots were reserved but never written
                self._drop_kv(branch)
            for kv, position in zip(rows.kv.tolist(), rows.positions.tolist(), strict=True):
                self.pool.forest.truncate(kv, position)
            raise
        self._ticks += len(rows.kv) > 0
        self._count(takes, places if head else [])
        self._dismiss_guests([branch for branch in branches if branch.pending])
        for branch in done:
            if branch.given and branch.parent is None:
                self._share(branch)
        return Forwarded(outputs, places, done)

    def run(self, branches: Sequence[Branch]) -> list[int]:
        """Let branches with one pending token grow by a row's token in each forward from now on; their forest branches.

        Those that have no KV yet are forked from their parents. The tokens that they forward are the caller's affair
        until they `rest`.
        """
        born = [branch for branch in branches if branch.kv is None]
        for branch in born:
            if not self._has_source(branch):  # its parent's KV will do for now: it comes back when it passes the switch
                assert branch.parent is not None
                branch.far = branch.parent.far
        self._give_kv(born, [self._above(branch) for branch in born])
        for branch in branches:
            branch.meter.settle(self._ticks)
            branch.meter.running += 1
            branch.meter.running_cached += branch.cached
        return [_kv(branch) for branch in branches]

    def rest(self, branch: Branch, cached: int) -> None:
        """A branch that ran has its tokens now, ``cached`` of its path forwarded: its books are its own again."""
        meter = branch.meter
        meter.settle(self._ticks)
        meter.running -= 1
        meter.running_cached -= cached
        branch.cached, branch.held = cached, cached - branch.start
        branch.reached = max(branch.reached, cached)
        branch.used = self._clock

    def is_ready(self, branch: Branch) -> bool:
        """Whether a branch can `run` at once."""
        if branch.pending != 1 or not self._is_right(branch):
            return False
        return branch.kv is not None or (self._has_source(branch) and self._begin(branch) == branch.start)

    def release(self, branches: Iterable[Branch]) -> None:
        """Nobody asks for these branches any more; descendants keep what they read."""
        for branch in branches:
            branch.released = True
            if self._cache is None or branch.kv is None:
                self._drop_kv(branch)
            elif self._cache.put(branch.path()[: branch.cached], branch.kv):
                self._forget_kv(branch)
            else:
                self._drop_kv(branch)

    def leave(self, worker: Worker, *, keep: bool = True) -> None:
        """A worker is done, or gives its branch up; the KV stays unless somebody wants its room, or not at all."""
        del self.workers[worker]
        self.full = False
        if not keep:
            self._drop_kv(worker.branch)

    def make_room(self) -> None:
        """Have the youngest worker give up its branch, or, if it is the only one, fail.

        Of those that have no KV yet, because they all came at once, half do so: they would only be in the way.
        """
        workers = sorted(self.workers, key=lambda worker: worker.age)
        if len(workers) == 1:
            workers[0].fail(PoolTooSmallError(workers[0].branch, self.pool_tokens))
            return
        fresh = list(itertools.takewhile(lambda worker: worker.branch.kv is None, reversed(workers[1:])))
        for worker in fresh[: -(-len(fresh) // 2)] or workers[-1:]:
            worker.give_up()
        self.full = True

    def hold(self, branch: Branch) -> None:
        """Keep the parent's KV for a branch that has none of its own yet, whatever becomes of the parent."""
        if branch.kv is None and branch.parent is not None and self._has_source(branch):
            self._give_kv([branch], [self._above(branch)])

    @staticmethod
    def skip(branch: Branch) -> None:
        """Enter in the books that a branch is not read, because what that would give is known."""
        node: Branch | None = branch
        end = branch.length
        while node is not None and end > node.reached:
            node.meter.cached += end - node.reached
            node.reached = end
            end, node = node.start, node.parent

    def close(self, meter: Meter) -> None:
        """Release all branches of a problem."""
        self.release([branch for branch in self._resident if branch.meter is meter])

    def rewind(self, branch: Branch) -> None:
        """Make the last token pending if it is not, so that a forward gives its output once more."""
        self._truncate(branch, branch.length - 1)

    def trim(self, branch: Branch, count: int) -> None:
        """Keep the first ``count`` of a branch's own tokens."""
        del branch.tokens[count:]
        self._truncate(branch, branch.length)

    def _truncate(self, branch: Branch, length: int) -> None:
        branch.reached = min(branch.reached, length)
        if branch.kv is not None and branch.cached > length:
            self.pool.forest.truncate(branch.kv, length)
            self._resize(branch, self.pool.forest.length(branch.kv))
            self.full = False

    @property
    def pool_tokens(self) -> int:
        """Tokens that the pool has room for."""
        return self.pool.num_tokens

    def _is_right(self, branch: Branch) -> bool:
        """Whether a branch's KV is of the kind that its length says."""
        return self._switch is None or branch.far is (branch.length > self._switch)

    def _take_side(self, branch: Branch) -> None:
        """Let a branch's KV be of the kind that its length says: it gives back what it has of the other."""
        if not self._is_right(branch):
            self._drop_kv(branch)
            assert not branch.holders, "a branch that others are built on has grown"
            assert branch.twin is None, "a branch that others are built on has grown"
            branch.far = not branch.far

    def _above(self, node: Branch) -> Branch | None:
        """Whose KV a branch begins with: its parent's, or the parent's twin's, if the parent is of the other kind."""
        parent = node.parent
        if parent is None or parent.far is node.far:
            return parent
        if parent.twin is None:
            assert self._switch is not None
            tokens = parent.tokens if node.far else parent.tokens[: max(0, self._switch - parent.start)]
            twin = Branch(parent.meter, parent.parent, parent.start, tokens, parent.given, released=True, twin=parent)
            twin.far, twin.reached = node.far, parent.reached
            parent.twin = twin
        return parent.twin

    def _begin(self, node: Branch) -> int:
        """How many tokens of a branch's path have KV through it, or will have when it is forked."""
        if node.kv is not None:
            return node.cached
        above = self._above(node)
        return 0 if above is None else self.pool.kept(_kv(above), node.start)

    def _has_source(self, node: Branch) -> bool:
        """Whether a branch without KV can be forked now."""
        above = self._above(node)
        return above is None or (above.kv is not None and above.cached >= node.start)

    @property
    def taken_tokens(self) -> int:
        """Tokens that its pages have room for which are not free."""
        stats = self.pool.forest.stats()
        return (stats.pages_total - stats.pages_free) * self.pool.forest.page_size

    def _dismiss_guests(self, waiting: Sequence[Branch]) -> None:
        """Let go of released branches that are back, unless one of ``waiting`` is still to be forked from them."""
        if not self._guests:
            return
        needed = {node for branch in waiting for node in self._incomplete(branch)}
        needed |= {above for node in needed if node.kv is None and (above := self._above(node)) is not None}
        for guest in [guest for guest in self._guests if guest.holders and guest not in needed]:
            self._drop_kv(guest)

    def _choose(self, branches: Sequence[Branch], budget: int) -> dict[Branch, int]:
        """How many tokens each branch forwards now, ancestors before descendants, within a budget of tokens."""
        takes: dict[Branch, int] = {}
        for branch in branches:
            for node in self._incomplete(branch):
                if node not in takes and budget > 0 and not self._reads_unwritten(node, takes):
                    takes[node] = self._take(node, budget)
                    budget -= takes[node]
                if takes.get(node, 0) < node.pending:
                    break
            if budget <= 0:
                break
        return takes

    def _incomplete(self, branch: Branch) -> list[Branch]:
        """A branch and its ancestors, from the first one that lacks KV down."""
        nodes = [branch]
        while nodes[-1].kv is None and (above := self._above(nodes[-1])) is not None:
            if above.kv is None and above.holders:
                self._restore(above)
            if self._has_source(nodes[-1]):
                break
            nodes.append(above)
        return nodes[::-1]

    def _take(self, node: Branch, budget: int) -> int:
        """How many tokens a branch forwards now within a budget."""
        if self.pool.block is None:
            return min(node.pending, budget)
        begin = self._begin(node)
        return min(node.length - begin, budget, self.pool.block - begin % self.pool.block)

    def _reads_unwritten(self, node: Branch, takes: dict[Branch, int]) -> bool:
        """Whether a branch would copy a page, or read a block, that its parent is to write in this very forward."""
        if node.kv is not None or self._above(node) not in takes:
            return False
        return self.pool.block is not None or node.start % self.pool.forest.page_size != 0

    def _restore(self, node: Branch) -> None:
        """Take a released branch's KV back from a descendant that still reads it."""
        donor = node
        while donor.kv is None:
            donor = max(donor.holders, key=lambda child: child.start)
        self._give_kv([node], [donor], node.start + node.held)

    def _place(self, takes: dict[Branch, int], rows: Rows) -> Tensor:
        """Give each row and branch its slots [N + sum(takes)], branches in the order that ``takes`` has then.

        All or nothing: after `tts_kernels.OutOfPages` everything is as before.
        """
        born: list[Branch] = []
        grown: list[Branch] = []
        slots: list[Tensor] = []
        todo = list(takes)
        try:
            while todo:  # level by level of the tree: a branch is forked from a parent that has its slots
                ready = [node for node in todo if node.kv is not None or self._has_source(node)]
                new = [node for node in ready if node.kv is None]
                self._give_kv(new, [self._above(node) for node in new])
                born += new
                slots.append(self.pool.append([_kv(node) for node in ready], [takes[node] for node in ready]))
                for node in ready:
                    self._resize(node, node.cached + takes[node])
                grown += ready
                placed = set(ready)
                todo = [node for node in todo if node not in placed]
            if len(rows.kv):
                slots.insert(0, self.pool.append(rows.kv, torch.ones_like(rows.kv)))
        except tk.OutOfPages:
            for node in reversed(grown):
                self.pool.forest.truncate(_kv(node), node.cached - takes[node])
                self._resize(node, node.cached - takes[node])
            for node in reversed(born):
                self._drop_kv(node)
            raise
        for node in grown:
            takes[node] = takes.pop(node)
        return slots[0] if len(slots) == 1 else torch.cat(slots)

    def _run(
        self,
        takes: dict[Branch, int],
        slots: Tensor,
        rows: Rows,
        places: list[tuple[Branch, int]],
        model: Callable[[Batch, tk.KVCache, Tensor | None], Tensor],
        graphs: DecodeGraphs | None,
    ) -> Tensor:
        """Forward ``rows`` and ``takes``; the outputs of the rows and of ``places``."""
        branches, tokens, positions, counts = rows.kv, rows.tokens, rows.positions, None
        wanted = None
        far = None if self._switch is None else positions >= self._switch
        if takes:
            ids: list[int] = []
            at: list[int] = []
            offset: dict[Branch, int] = {}  # row of a branch's token, less the token's position
            for node, take in takes.items():
                begin = node.cached - take
                offset[node] = len(rows.kv) + len(ids) - begin
                if begin < node.start:
                    ids += node.path()[begin : node.cached]
                else:
                    ids += node.tokens[begin - node.start : node.cached - node.start]
                at += range(begin, node.cached)
            chosen = [*range(len(rows.kv)), *(offset[branch] + position for branch, position in places)]
            tokens, positions = torch.cat([tokens, torch.tensor(ids)]), torch.cat([positions, torch.tensor(at)])
            branches = torch.cat([branches, torch.tensor([_kv(node) for node in takes])])
            if far is not None:
                sides = torch.tensor([node.far for node in takes])
                far = torch.cat([far, sides.repeat_interleave(torch.tensor(list(takes.values())))])
            if len(tokens) > len(branches):
                counts = torch.cat([torch.ones_like(rows.kv), torch.tensor(list(takes.values()))])
            if chosen != list(range(len(tokens))):
                wanted = upload(torch.tensor(chosen, dtype=torch.int64), self.pool.device)
        if graphs is not None and wanted is None and counts is None:
            logits = graphs.logits(branches, tokens, positions, slots)
            if logits is not None:
                return logits
        return model(self.pool.batch(branches, counts, tokens, positions, slots, far=far), self.pool.kv, wanted)

    def _count(self, takes: dict[Branch, int], logit_rows: Sequence[tuple[Branch, int]]) -> None:
        """Enter a forward in the books; what the rows did is entered when their meters are settled."""
        for node, take in takes.items():
            node.meter.settle(self._ticks)
            meter, begin, end = node.meter, node.cached - take, node.cached
            again = max(0, min(end, node.reached) - begin)
            prompt = max(0, min(end, node.start + node.given) - begin - again)
            node.reached = max(node.reached, end)
            if node.twin is not None:
                node.twin.reached = max(node.twin.reached, node.reached)
            node.used = self._clock
            meter.recomputed += again
            meter.prompt += prompt
            meter.read += take - again - prompt
            meter.keys += take * begin + take * (take + 1) // 2
            meter.note_peaks()
        for node, _ in logit_rows:
            node.meter.logit_rows += 1

    def _evict(self, branches: Sequence[Branch], takes: dict[Branch, int]) -> bool:
        """Take the KV of an idle branch; False if there is none.

        First those that nobody builds on, the one used longest ago; then ancestors, whose KV descendants share but for
        pages that were not full.
        """
        busy = {*branches, *takes, *(self._above(node) for node in takes if node.kv is None)}
        busy |= {worker.branch for worker in self.workers}
        idle = [node for node in self._resident if node not in busy]
        if not idle:
            return False
        self._drop_kv(min(idle, key=lambda node: (bool(node.holders), node.used)))
        return True

    def _give_kv(self, nodes: Sequence[Branch], sources: Sequence[Branch | None], length: int | None = None) -> None:
        """Fork the KV of ``sources`` for ``nodes`` (a root for None), cut to ``length`` or to where a node starts."""
        forest = self.pool.forest
        forks = iter(forest.fork([_kv(source) for source in sources if source is not None]))
        for node, source in zip(nodes, sources, strict=True):
            node.kv = forest.add_root() if source is None else next(forks)
            size = node.start if length is None else length
            if source is not None and forest.length(node.kv) > size:  # the books of a source that runs are behind
                forest.truncate(node.kv, size)
            self._resident[node] = None
            if node.released:
                self._guests.add(node)
            if (above := self._above(node)) is not None:
                above.holders.add(node)
            self._resize(node, forest.length(node.kv))

    def _drop_kv(self, node: Branch) -> None:
        """Free a branch's KV; what descendants read stays."""
        if node.kv is not None:
            self.pool.forest.free([node.kv])
            self._forget_kv(node)

    def _forget_kv(self, node: Branch) -> None:
        """A branch's KV is not its own any more."""
        del self._resident[node]
        self._guests.discard(node)
        node.kv, node.sought = None, False
        self._resize(node, 0)
        self.full = False

    def _share(self, prompt: Branch) -> None:
        """Let others that begin as a prompt does find it while it is still in use."""
        if self._cache is not None and self._cache.find(prompt.tokens)[1] < prompt.length:
            self._cache.put(prompt.tokens, self.pool.forest.fork([_kv(prompt)])[0])

    def _make_free(self, pages: int) -> bool:
        """Take texts out of the prefix cache until so many pages are free: one at least. False if there is none."""
        if not self._cache:
            return False
        forest = self.pool.forest
        forest.free([self._cache.pop()])
        while self._cache and forest.stats().pages_free < pages:
            forest.free([self._cache.pop()])
        return True

    def _sought(self, branches: Sequence[Branch], cache: PrefixCache) -> list[Branch]:
        """Branches that begin with what the prefix cache holds, without those that will soon find more there.

        A prompt waits while an earlier one is being read that has half of what it would read itself. O(prompts squared)
        at worst, for prompts that nobody has begun to read.
        """
        ready: list[Branch] = []
        read: list[Branch] = []
        for branch in branches:
            if branch.parent is None and branch.kv is None and read and _shares_half(branch, read, cache):
                continue
            self._seek(branch, cache)
            ready.append(branch)
            if branch.parent is None and branch.given and branch.pending > 1:
                read.append(branch)
        return ready

    def _seek(self, branch: Branch, cache: PrefixCache) -> None:
        """Have a branch that lacks KV, or the nearest ancestor that can, begin with what the prefix cache holds.

        What lies behind a place whose output is wanted is read again.
        """
        node: Branch | None = branch
        while node is not None and node.kv is None and not node.sought:
            node.sought = True
            limit = min([node.length - 1, *node.marks])
            kv, found = cache.find(node.path()[: max(0, limit)])
            if found and (found := self.pool.kept(kv, found)) > node.start:
                self._adopt(node, kv, found)
                return
            node = None if self._has_source(node) else node.parent

    def _adopt(self, node: Branch, kv: int, length: int) -> None:
        """Give a branch a part of the KV of the prefix cache, which holds its ancestors' tokens, too."""
        (node.kv,) = self.pool.forest.fork([kv])
        if self.pool.forest.length(node.kv) > length:
            self.pool.forest.truncate(node.kv, length)
        self._resident[node] = None
        if node.released:
            self._guests.add(node)
        self._resize(node, length)
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

    def _resize(self, node: Branch, cached: int) -> None:
        """Set the tokens that have KV through ``node``, and what that changes in the books of its lineage."""
        node.meter.settle(self._ticks)
        node.meter.logical += cached - node.cached
        node.cached = cached
        lower: Branch | None = node
        while lower is not None:
            held = max(lower.cached, *(child.start for child in lower.holders), lower.start) - lower.start
            lower.meter.unique += held - lower.held
            lower.held = held
            if lower.kv is not None or lower.holders or (above := self._above(lower)) is None:
                return
            above.holders.discard(lower)
            lower = above if above.kv is None else None


def _shares_half(prompt: Branch, others: Sequence[Branch], cache: PrefixCache) -> bool:
    """Whether another prompt has half, or more, of what this one could find in the prefix cache and does not yet."""
    most = min([prompt.length - 1, *prompt.marks])
    half = (min(cache.find(prompt.tokens)[1], most) + most + 1) // 2
    begin = prompt.tokens[:half]
    return half < most and any(
        len(each.tokens) >= half and each.tokens[half - 1] == begin[-1] and each.tokens[:half] == begin
        for each in others
    )


def _reached(branch: Branch, take: int) -> list[int]:
    """The positions among a branch's last ``take`` ones whose outputs are wanted."""
    if take == 1 and not branch.marks:  # decode
        return [] if branch.pending else [branch.length - 1]
    begin, end, last = branch.cached - take, branch.cached, branch.length - 1
    return [position for position in sorted({*branch.marks, last}) if begin <= position < end]


def _kv(node: Branch) -> int:
    assert node.kv is not None, "a branch without KV was used as if it had some"
    return node.kv
