"""One KV pool for the branches of many search trees: it runs forwards, makes room, and counts costs.

Work that does not fit the pool is done in parts: the youngest branches give up their KV, and get it back later (see
`TokenBranch`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.block_cache import BlockPool
from tts_search.models.branch_kv import BranchKV
from tts_search.models.branches import NO_ROWS, Forwarded, Rows, TokenBranch, kv_of
from tts_search.models.decoder import Batch, KVPool
from tts_search.models.device import upload
from tts_search.models.meter import Meter
from tts_search.models.prefix import PrefixCache
from tts_search.search.protocol import Usage

if TYPE_CHECKING:
    from tts_search.models.graphs import DecodeGraphs

MAX_FORWARD_TOKENS: Final = 2048


class PoolTooSmallError(RuntimeError):
    """The pool cannot hold ``branch``, even if everything else is released."""

    def __init__(self, branch: TokenBranch, pool_tokens: int) -> None:
        super().__init__(
            f"kv_memory: the KV pool of {pool_tokens} tokens is too small for one branch of {branch.length} tokens"
        )
        self.branch = branch


class Worker(Protocol):
    """Does work on a branch, whose KV is then not idle.

    ``age`` counts up. If there is no room for all workers, the youngest gives way.
    """

    @property
    def branch(self) -> TokenBranch:
        """The branch that it works on."""

    @property
    def age(self) -> int:
        """Its place in the order of workers, oldest first."""

    def give_up(self) -> None:
        """Free the branch's KV and wait until there is room again."""

    def fail(self, error: Exception) -> None:
        """End with this error."""


class BranchPool:
    """Keeps the KV of as many branches as fit in a pool. If room is needed, the least recently used KV is freed.

    Parameters
    ----------
    pool : KVPool
        The pool that holds the KV.
    max_tokens : int
        The largest number of tokens in one forward; longer prompts are read in chunks.
    graphs : DecodeGraphs or None
        Runs the forwards that need logits of one new token of each branch.

    Attributes
    ----------
    workers : dict of Worker to None
        Workers that have work. The KV of their branches is never taken.
    full : bool
        Whether a caller found no room, and no KV was freed since.
    prefix_cache : bool
        Whether released KV is kept until its room is needed, for other texts that begin with the same tokens. Never
        with a decoder that has a switch.
    """

    def __init__(self, pool: KVPool, max_tokens: int = MAX_FORWARD_TOKENS, graphs: DecodeGraphs | None = None) -> None:
        self.pool = pool
        self.max_tokens = max_tokens
        self.graphs = graphs
        self.workers: dict[Worker, None] = {}
        self._kv = BranchKV(pool)
        self._cache: PrefixCache | None = None
        self._clock = 0

    @property
    def full(self) -> bool:
        """Whether a caller found no room, and no KV was freed since."""
        return self._kv.full

    @property
    def prefix_cache(self) -> bool:
        """Whether released KV is kept until its room is needed."""
        return self._cache is not None

    @prefix_cache.setter
    def prefix_cache(self, wanted: bool) -> None:
        wanted = wanted and self._kv.switch is None  # else the same tokens may have two kinds of KV
        if wanted == self.prefix_cache:
            return
        if self._cache is not None:
            self._make_free(self.pool.forest.stats().pages_total)
        self._cache = PrefixCache() if wanted else None

    def forward(
        self,
        branches: Sequence[TokenBranch],
        model: Callable[[Batch, tk.KVCache, Tensor | None], Tensor],
        head: bool,
        rows: Rows = NO_ROWS,
        most: int | None = None,
    ) -> Forwarded:
        """Run one token of each row, and pending tokens of as many branches as fit in a forward, in order.

        Parameters
        ----------
        branches : sequence of TokenBranch
            Each once, with at least one pending token. If ancestors of a branch lack KV, their tokens are forwarded,
            too.
        model : callable
            The decoder's ``hidden`` or ``logits``.
        head : bool
            Whether ``model`` gives logits.
        rows : Rows
            Running branches.
        most : int or None
            The largest number of tokens in this forward, if it is smaller than usual.

        Raises
        ------
        tts_kernels.OutOfPages
            If there is no room for them, and no idle branch is left whose KV could be freed. Nothing has changed except
            that idle branches have lost their KV.
        """
        self._clock += 1
        for branch in branches if self._kv.switch is not None else ():
            self._kv.take_side(branch)
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
        if isinstance(self.pool, BlockPool):
            self._note_bytes(self.pool)
        try:
            done = [branch for branch in branches if not branch.pending]
            places = [(branch, place) for branch in branches for place in _reached(branch, takes.get(branch, 0))]
            outputs = self._run(takes, slots, rows, places, model, self.graphs if head else None)
        except BaseException:
            for branch in takes:  # their slots were reserved but never written
                self._kv.drop(branch)
            for kv, position in zip(rows.kv.tolist(), rows.positions.tolist(), strict=True):
                self.pool.forest.truncate(kv, position)
            raise
        self._kv.ticks += len(rows.kv) > 0
        self._count(takes, places if head else [])
        self._kv.dismiss_guests([branch for branch in branches if branch.pending])
        for branch in done:
            if branch.given and branch.parent is None:
                self._share(branch)
        return Forwarded(outputs, places, done)

    def run(self, branches: Sequence[TokenBranch]) -> list[int]:
        """Let branches grow by a row's token in each forward from now on; return their forest branches.

        Each branch has one pending token. A branch without KV is forked from its parent. Until they `rest`, the caller
        keeps the tokens that they forward.
        """
        born = [branch for branch in branches if branch.kv is None]
        for branch in born:
            if not self._kv.has_source(branch):  # its parent's KV is right until it passes the switch
                assert branch.parent is not None
                branch.far = branch.parent.far
        self._kv.give(born, [self._kv.above(branch) for branch in born])
        for branch in branches:
            branch.meter.settle(self._kv.ticks)
            branch.meter.running += 1
            branch.meter.running_cached += branch.cached
        return [kv_of(branch) for branch in branches]

    def rest(self, branch: TokenBranch, cached: int) -> None:
        """End the run of a branch that has its new tokens. ``cached`` tokens of its path were forwarded."""
        meter = branch.meter
        meter.settle(self._kv.ticks)
        meter.running -= 1
        meter.running_cached -= cached
        branch.cached, branch.held = cached, cached - branch.start
        branch.reached = max(branch.reached, cached)
        branch.used = self._clock

    def is_ready(self, branch: TokenBranch) -> bool:
        """Whether a branch can `run` immediately."""
        if branch.pending != 1 or not self._kv.is_right(branch):
            return False
        return branch.kv is not None or (self._kv.has_source(branch) and self._kv.begin(branch) == branch.start)

    def release(self, branches: Iterable[TokenBranch]) -> None:
        """Release branches that are no longer needed. Their descendants keep the KV that they read."""
        for branch in branches:
            branch.released = True
            if self._cache is None or branch.kv is None:
                self._kv.drop(branch)
            elif self._cache.put(branch.path()[: branch.cached], branch.kv):
                self._kv.forget(branch)
            else:
                self._kv.drop(branch)

    def leave(self, worker: Worker, *, keep: bool = True) -> None:
        """A worker is done, or gives up its branch. With `keep`, the KV stays until its room is needed."""
        del self.workers[worker]
        self._kv.full = False
        if not keep:
            self._kv.drop(worker.branch)

    def make_room(self) -> None:
        """Let the youngest worker give up its branch. If there is only one worker, it fails.

        If many workers have no KV yet because they came at the same time, half of them give up: they would only
        compete.
        """
        workers = sorted(self.workers, key=lambda worker: worker.age)
        if len(workers) == 1:
            workers[0].fail(PoolTooSmallError(workers[0].branch, self.pool_tokens))
            return
        fresh = list(itertools.takewhile(lambda worker: worker.branch.kv is None, reversed(workers[1:])))
        for worker in fresh[: -(-len(fresh) // 2)] or workers[-1:]:
            worker.give_up()
        self._kv.full = True

    def hold(self, branch: TokenBranch) -> None:
        """Keep the parent's KV for a branch without KV, even if the parent is released."""
        if branch.kv is None and branch.parent is not None and self._kv.has_source(branch):
            self._kv.give([branch], [self._kv.above(branch)])

    @staticmethod
    def skip(branch: TokenBranch) -> None:
        """Record that a branch is not read, because its outputs are known already."""
        node: TokenBranch | None = branch
        end = branch.length
        while node is not None and end > node.reached:
            node.meter.cached += end - node.reached
            node.reached = end
            end, node = node.start, node.parent

    def close(self, meter: Meter) -> None:
        """Release all branches of a problem."""
        self.release([branch for branch in self._kv.resident if branch.meter is meter])

    def usage(self, meter: Meter, tokens: int | None = None) -> Usage:
        """Return the cost of a problem so far; by default, ``tokens`` are those read."""
        meter.settle(self._kv.ticks)
        return meter.usage(self.pool, tokens)

    def rewind(self, branch: TokenBranch) -> None:
        """Make the last token pending if it is not, so that a forward computes its output again."""
        self._kv.truncate(branch, branch.length - 1)

    def trim(self, branch: TokenBranch, count: int) -> None:
        """Keep the first ``count`` of a branch's own tokens."""
        del branch.tokens[count:]
        self._kv.truncate(branch, branch.length)

    @property
    def pool_tokens(self) -> int:
        """How many tokens the pool has room for."""
        return self.pool.num_tokens

    @property
    def taken_tokens(self) -> int:
        """How many tokens its used pages have room for."""
        stats = self.pool.forest.stats()
        return (stats.pages_total - stats.pages_free) * self.pool.forest.page_size

    def _choose(self, branches: Sequence[TokenBranch], budget: int) -> dict[TokenBranch, int]:
        """How many tokens each branch forwards now, ancestors before descendants, within a budget of tokens."""
        takes: dict[TokenBranch, int] = {}
        for branch in branches:
            for node in self._kv.incomplete(branch):
                if node not in takes and budget > 0 and not self._reads_unwritten(node, takes):
                    takes[node] = self._take(node, budget)
                    budget -= takes[node]
                if takes.get(node, 0) < node.pending:
                    break
            if budget <= 0:
                break
        return takes

    def _take(self, node: TokenBranch, budget: int) -> int:
        """How many tokens a branch forwards now, within a budget."""
        if self.pool.block is None:
            return min(node.pending, budget)
        begin = self._kv.begin(node)
        return min(node.length - begin, budget, self.pool.block - begin % self.pool.block)

    def _reads_unwritten(self, node: TokenBranch, takes: dict[TokenBranch, int]) -> bool:
        """Whether a branch would copy a page, or read a block, that its parent writes only in this forward."""
        if node.kv is not None or self._kv.above(node) not in takes:
            return False
        return self.pool.block is not None or node.start % self.pool.forest.page_size != 0

    def _place(self, takes: dict[TokenBranch, int], rows: Rows) -> Tensor:
        """Give each row and branch its slots [N + sum(takes)], in the order that ``takes`` has after this call.

        If it raises `tts_kernels.OutOfPages`, nothing has changed.
        """
        born: list[TokenBranch] = []
        grown: list[TokenBranch] = []
        slots: list[Tensor] = []
        todo = list(takes)
        try:
            while todo:  # level by level: a parent has its slots before its children are forked
                ready = [node for node in todo if node.kv is not None or self._kv.has_source(node)]
                new = [node for node in ready if node.kv is None]
                self._kv.give(new, [self._kv.above(node) for node in new])
                born += new
                slots.append(self.pool.append([kv_of(node) for node in ready], [takes[node] for node in ready]))
                for node in ready:
                    self._kv.resize(node, node.cached + takes[node])
                grown += ready
                placed = set(ready)
                todo = [node for node in todo if node not in placed]
            if len(rows.kv):
                slots.insert(0, self.pool.append(rows.kv, torch.ones_like(rows.kv)))
        except tk.OutOfPages:
            for node in reversed(grown):
                self.pool.forest.truncate(kv_of(node), node.cached - takes[node])
                self._kv.resize(node, node.cached - takes[node])
            for node in reversed(born):
                self._kv.drop(node)
            raise
        for node in grown:
            takes[node] = takes.pop(node)
        return slots[0] if len(slots) == 1 else torch.cat(slots)

    def _run(
        self,
        takes: dict[TokenBranch, int],
        slots: Tensor,
        rows: Rows,
        places: list[tuple[TokenBranch, int]],
        model: Callable[[Batch, tk.KVCache, Tensor | None], Tensor],
        graphs: DecodeGraphs | None,
    ) -> Tensor:
        """Forward ``rows`` and ``takes``; return the outputs of the rows and of ``places``."""
        branches, tokens, positions, counts = rows.kv, rows.tokens, rows.positions, None
        wanted = None
        far = None if self._kv.switch is None else positions >= self._kv.switch
        if takes:
            ids: list[int] = []
            at: list[int] = []
            offset: dict[TokenBranch, int] = {}  # row of a branch's token minus the token's position
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
            branches = torch.cat([branches, torch.tensor([kv_of(node) for node in takes])])
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

    def _count(self, takes: dict[TokenBranch, int], logit_rows: Sequence[tuple[TokenBranch, int]]) -> None:
        """Count a forward. What the rows did is counted when their meters are settled."""
        for node, take in takes.items():
            node.meter.settle(self._kv.ticks)
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

    def _note_bytes(self, pool: BlockPool) -> None:
        """Update each problem's peak of bytes. A forward holds the most: a block that becomes full, and its window."""
        held: dict[Meter, list[int]] = {}
        for node in self._kv.resident:
            held.setdefault(node.meter, []).append(kv_of(node))
        for meter, branches in held.items():
            meter.peak_bytes = max(meter.peak_bytes, pool.held_bytes(branches))

    def _evict(self, branches: Sequence[TokenBranch], takes: dict[TokenBranch, int]) -> bool:
        """Free the KV of an idle branch; False if there is none.

        Branches without children that read them go first, the least recently used before others. Then come ancestors:
        their descendants share their KV, except for pages that were not full.
        """
        busy = {*branches, *takes, *(self._kv.above(node) for node in takes if node.kv is None)}
        busy |= {worker.branch for worker in self.workers}
        idle = [node for node in self._kv.resident if node not in busy]
        if not idle:
            return False
        self._kv.drop(min(idle, key=lambda node: (bool(node.holders), node.used)))
        return True

    def _share(self, prompt: TokenBranch) -> None:
        """Put a prompt into the prefix cache while it is still in use, so that others can find it."""
        if self._cache is not None and self._cache.find(prompt.tokens)[1] < prompt.length:
            self._cache.put(prompt.tokens, self.pool.forest.fork([kv_of(prompt)])[0])

    def _make_free(self, pages: int) -> bool:
        """Remove texts from the prefix cache, at least one, until this many pages are free. False if it is empty."""
        if not self._cache:
            return False
        forest = self.pool.forest
        forest.free([self._cache.pop()])
        while self._cache and forest.stats().pages_free < pages:
            forest.free([self._cache.pop()])
        return True

    def _sought(self, branches: Sequence[TokenBranch], cache: PrefixCache) -> list[TokenBranch]:
        """Give branches what the prefix cache holds of their beginnings; return those that should not wait for more.

        A prompt waits while another prompt is being read that shares at least half of the tokens that this one would
        read. O(prompts squared) at worst, if no prompt has been started.
        """
        ready: list[TokenBranch] = []
        read: list[TokenBranch] = []
        for branch in branches:
            if branch.parent is None and branch.kv is None and read and _shares_half(branch, read, cache):
                continue
            self._seek(branch, cache)
            ready.append(branch)
            if branch.parent is None and branch.given and branch.pending > 1:
                read.append(branch)
        return ready

    def _seek(self, branch: TokenBranch, cache: PrefixCache) -> None:
        """Let a branch without KV, or the nearest ancestor that can, begin with KV of the prefix cache.

        Tokens after a place whose output is needed are read again.
        """
        node: TokenBranch | None = branch
        while node is not None and node.kv is None and not node.sought:
            node.sought = True
            limit = min([node.length - 1, *node.marks])
            kv, found = cache.find(node.path()[: max(0, limit)])
            if found and (found := self.pool.kept(kv, found)) > node.start:
                self._kv.adopt(node, kv, found)
                return
            node = None if self._kv.has_source(node) else node.parent


def _shares_half(prompt: TokenBranch, others: Sequence[TokenBranch], cache: PrefixCache) -> bool:
    """Whether another prompt shares at least half of what this one could find in the prefix cache but does not yet."""
    most = min([prompt.length - 1, *prompt.marks])
    half = (min(cache.find(prompt.tokens)[1], most) + most + 1) // 2
    begin = prompt.tokens[:half]
    return half < most and any(
        len(each.tokens) >= half and each.tokens[half - 1] == begin[-1] and each.tokens[:half] == begin
        for each in others
    )


def _reached(branch: TokenBranch, take: int) -> list[int]:
    """The positions among a branch's last ``take`` tokens whose outputs are needed."""
    if take == 1 and not branch.marks:  # decode
        return [] if branch.pending else [branch.length - 1]
    begin, end, last = branch.cached - take, branch.cached, branch.length - 1
    return [position for position in sorted({*branch.marks, last}) if begin <= position < end]
