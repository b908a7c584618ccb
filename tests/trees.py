"""Trees of KV pages for tests, and a brute-force planner that shares no code with the tested one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass
class Tree:
    """Branches as lists of pages, with the number of tokens in each."""

    page_size: int
    pages: list[list[int]]
    kv_lens: list[int]
    num_pages: int

    @property
    def page_table(self) -> Tensor:
        width = max((len(p) for p in self.pages), default=0)
        return torch.tensor([p + [-1] * (width - len(p)) for p in self.pages], dtype=torch.int32).reshape(-1, width)


def grow(page_size: int, parents: Sequence[int], lengths: Sequence[int], seed: int = 0, spare: int = 3) -> Tree:
    """A branch at every node without children (parent -1: a root), `lengths` tokens per node; a node that others
    continue is filled up to whole pages. Page ids are shuffled."""
    rng = random.Random(seed)
    sizes = [-(-n // page_size) for n in lengths]
    ids = list(range(sum(sizes) + spare))
    rng.shuffle(ids)
    inner = set(parents)
    own: list[list[int]] = []
    for size in sizes:
        own.append([ids.pop() for _ in range(size)])
    pages, kv_lens = [], []
    for node in range(len(parents)):
        if node in inner:
            continue
        path = []
        at = node
        while at != -1:
            path.append(at)
            at = parents[at]
        pages.append([p for n in reversed(path) for p in own[n]])
        kv_lens.append(sum(sizes[n] * page_size for n in path[1:]) + lengths[node])
    return Tree(page_size, pages, kv_lens, sum(sizes) + spare)


def with_short_branches(tree: Tree, lengths: Sequence[int]) -> Tree:
    """More branches: prefixes of the first one, ending anywhere in pages that it goes on to fill."""
    cut = [min(n, tree.kv_lens[0]) for n in lengths]
    pages = [tree.pages[0][: -(-n // tree.page_size)] for n in cut]
    return Tree(tree.page_size, tree.pages + pages, tree.kv_lens + cut, tree.num_pages)


@dataclass(frozen=True)
class Plan:
    rows: Tensor
    positions: Tensor
    pages: Tensor
    segments: Tensor
    tasks: Tensor
    merge_indptr: Tensor
    merge_slots: Tensor
    sizes: Tensor
    page_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    max_slots: int


def brute_plan(
    tree: Tree,
    q_lens: Sequence[int],
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    seed: int = 0,
    cuts: bool = True,
) -> Plan:
    """A valid plan, cut at random."""
    rng = random.Random(seed)
    order = sorted(range(len(tree.pages)), key=lambda b: tree.pages[b])
    first_row, rows, positions = {}, [], []
    starts = [sum(q_lens[:b]) for b in range(len(q_lens))]
    for b in order:
        first_row[b] = len(rows)
        rows += range(starts[b], starts[b] + q_lens[b])
        positions += [tree.kv_lens[b] - q_lens[b] + j if tree.kv_lens[b] else -1 for j in range(q_lens[b])]
    pages: list[int] = []
    segments = []
    for begin, end, column, stop in _stretches(tree, order):
        length = min(stop * tree.page_size, max(tree.kv_lens[b] for b in order[begin:end])) - column * tree.page_size
        first, last = first_row[order[begin]], first_row[order[end - 1]] + q_lens[order[end - 1]]
        for r0, r1 in _pieces(rng, first, last, cuts):
            for c0, c1 in _pieces(rng, 0, -(-length // tree.page_size), cuts):
                tokens = min(length, c1 * tree.page_size) - c0 * tree.page_size
                segments.append([len(pages), (column + c0) * tree.page_size, tokens, r0, r1])
                pages += tree.pages[order[begin]][column + c0 : column + c1]
    tasks, states, slots = [], [], 0
    partials: list[list[int]] = [[] for _ in rows]
    owners: list[dict[int, int]] = [{} for _ in rows]  # task -> slot of its own state, for each row
    for s0, s1 in _pieces(rng, 0, len(segments), cuts):
        low, high = min(s[3] for s in segments[s0:s1]), max(s[4] for s in segments[s0:s1])
        begun: set[int] = set()
        for _, _, _, first, last in segments[s0:s1]:
            readers = range(first, last)
            if rng.random() < 0.5:
                states.append([-1, int(not begun.issuperset(readers) or rng.random() < 0.5)])
                begun.update(readers)
                continue
            states.append([slots, 1])
            for r in readers:
                partials[r].append(2 * (slots + r - first) + rng.randint(0, 1))
            slots += last - first
        tasks.append([s0, s1, low, high, slots])
        for r in begun:
            owners[r][len(tasks) - 1] = slots + r - low
        slots += high - low
    for own, partial in zip(owners, partials, strict=True):
        if partial or len(own) > 1:
            partial += [2 * slot for slot in own.values()]
            rng.shuffle(partial)
    segments = [segment + state for segment, state in zip(segments, states, strict=True)]
    indptr = [0]
    for p in partials:
        indptr.append(indptr[-1] + len(p))
    return Plan(
        rows=_int32(rows),
        positions=_int32(positions),
        pages=_int32([*pages, -7]),
        segments=_int32(segments + [[-7] * 7] * 2),  # buffers may be larger than what is used
        tasks=_int32(tasks + [[-7] * 5] * 2),
        merge_indptr=_int32(indptr),
        merge_slots=_int32([s for p in partials for s in p] + [-7]),
        sizes=_int32([len(segments), len(tasks), slots, len(pages)]),
        page_size=tree.page_size,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        window=0,
        max_slots=slots + 1,
    )


def _stretches(tree: Tree, order: list[int]) -> list[tuple[int, int, int, int]]:
    """(begin, end, column, stop): order[begin:end] have the pages of columns [column, stop) in common, and no other."""
    found = []
    todo = [(0, len(order), 0)]
    while todo:
        begin, end, column = todo.pop()
        while begin < end and len(tree.pages[order[begin]]) <= column:  # ended: they sort first
            begin += 1
        if begin == end:
            continue
        head = tree.pages[order[begin]][column]
        same = begin
        while same < end and tree.pages[order[same]][column] == head:
            same += 1
        todo.append((same, end, column))
        stop = column
        while all(
            tree.pages[b][stop : stop + 1] == tree.pages[order[begin]][stop : stop + 1] != [] for b in order[begin:same]
        ):
            stop += 1
        found.append((begin, same, column, stop))
        todo.append((begin, same, stop))
    return found


def _pieces(rng: random.Random, begin: int, end: int, cuts: bool) -> list[tuple[int, int]]:
    """[begin, end) in random pieces (none if empty)."""
    inner = [i for i in range(begin + 1, end) if cuts and rng.random() < 2 / (end - begin)]
    bounds = [begin, *inner, end]
    return [(a, b) for a, b in pairwise(bounds) if a < b]


def _int32(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def caches(tree: Tree, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (tree.num_pages, tree.page_size, num_kv_heads, head_dim)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def dense_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tree: Tree,
    q_lens: Sequence[int],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Branch by branch from the page table, every product in q's dtype: (out, lse)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k_cache.shape[2]
    out, lse = (
        torch.zeros_like(q),
        torch.full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)),
    )
    if sinks is not None:
        lse[:] = sinks
    at = 0
    for pages, length, rows in zip(tree.pages, tree.kv_lens, q_lens, strict=True):
        if length and rows:
            k, v = (c[pages].flatten(0, 1)[:length].repeat_interleave(group, 1) for c in (k_cache, v_cache))
            scores = torch.einsum("rhd,nhd->rhn", q[at : at + rows], k) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            position = torch.arange(length - rows, length)[:, None, None]
            key = torch.arange(length)
            hidden = key > position
            if window:
                hidden |= key <= position - window
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:  # one more key, without a value
                scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None].expand(rows, -1, 1)], -1)
            lse[at : at + rows] = scores.to(lse.dtype).logsumexp(-1)
            weights = scores.softmax(-1)[..., :length]
            for r in range(rows):  # hidden values are not even multiplied by 0
                seen = ~hidden[r, 0]
                out[at + r] = torch.einsum("hn,nhd->hd", weights[r][:, seen], v[seen])
        at += rows
    return out, lse


def poison(tree: Tree, cache: Tensor) -> Tensor:
    """The cache with NaN and infinities in every slot that no branch owns."""
    used = torch.zeros(tree.num_pages, tree.page_size, dtype=torch.bool)
    for pages, length in zip(tree.pages, tree.kv_lens, strict=True):
        for i in range(length):
            used[pages[i // tree.page_size], i % tree.page_size] = True
    bad = (
        torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(cache.numel() // 3 + 1)[: cache.numel()].view_as(cache)
    )
    return torch.where(used[..., None, None], cache, bad.to(cache.dtype))


__all__ = ["Plan", "Tree", "brute_plan", "caches", "dense_attention", "grow", "poison", "with_short_branches"]
