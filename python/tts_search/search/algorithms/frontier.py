"""REBASE and KV-aware pruning: the children of a round are dealt in proportion to what the verifier expects.

All branches that have not ended are one frontier, at whatever depth. A branch that has ended leaves the frontier, and n
becomes smaller by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from tts_search.search.algorithms.branches import check_growth, distinct, has_grown, in_order, mark_pruned
from tts_search.search.moves import Moves, expand, release, score
from tts_search.search.run import Branch, Run

__all__ = ["ets", "proportional", "rebase", "worth_their_kv"]

Allocate = Callable[[Sequence[Branch], int], list[int]]


def rebase(run: Run) -> Moves[list[Branch]]:
    """Search with reward-balanced allocation (REBASE; Wu et al., arXiv 2408.00724).

    A branch of score s gets a share exp(s / reward_temperature) of a round's children.

    Raises
    ------
    SearchError
        If the policy returns nothing, or it or the verifier something else than was asked for.
    """

    def allocate(branches: Sequence[Branch], width: int) -> list[int]:
        return proportional([branch.score for branch in branches], width, run.config.reward_temperature)

    return _search(run, allocate)


def ets(run: Run) -> Moves[list[Branch]]:
    """Search as REBASE does among those branches that are worth their KV cache (after ETS; Hooper et al., 2025).

    ETS solves an integer program over the children that REBASE would give, the nodes kept and clusters of embeddings.
    Here the same trade of children against unique KV is made greedily, without embeddings: :func:`worth_their_kv`.

    Raises
    ------
    SearchError
        As :func:`rebase` does.
    """
    config = run.config

    def allocate(branches: Sequence[Branch], width: int) -> list[int]:
        scores = [branch.score for branch in branches]
        shares = proportional(scores, width, config.reward_temperature)
        kept = worth_their_kv(branches, shares, config.kv_weight)
        children = proportional([scores[index] for index in kept], width, config.reward_temperature)
        counts = dict(zip(kept, children, strict=True))
        return [counts.get(index, 0) for index in range(len(branches))]

    return _search(run, allocate)


def proportional(scores: Sequence[float], width: int, temperature: float) -> list[int]:
    """Deal `width` children in proportion to exp(score / temperature).

    Best first (the earlier on ties), a branch gets its share of what is left, rounded up; so the shares add up to
    `width`, and the last ones may get none. O(C log C).

    Examples
    --------
    >>> proportional([0.1, 0.9, 0.5], 8, temperature=0.2)
    [0, 7, 1]
    """
    top = max(scores)
    weights = [1.0 if one == top else math.exp((one - top) / temperature) for one in scores]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    remainders = list(accumulate(weights[index] for index in reversed(order)))[::-1]
    counts = [0] * len(scores)
    for index, remainder in zip(order, remainders, strict=True):
        if width == 0:  # from here on, weights may have vanished
            break
        counts[index] = min(width, math.ceil(width * weights[index] / remainder - 1e-9))
        width -= counts[index]
    return counts


def worth_their_kv(branches: Sequence[Branch], shares: Sequence[int], weight: float) -> list[int]:
    """Choose branches whose share of the children outweighs the KV cache that only they need.

    Starting from none, the branch with the greatest gain ::

        shares[i] / sum(shares) - weight * (tokens of its path that no chosen branch has) / (tokens of all paths)

    is added while that is positive, the first one always; ties go to the earlier. A branch that shares much with
    chosen ones costs little. Tokens count once however many paths they are on; a node without a count weighs 1.
    O(C * (C + depth)) for C branches.

    Returns
    -------
    list of int
        Indices of the chosen branches, rising.
    """
    paths = [_path(branch) for branch in branches]
    sizes = {node.id: max(1, node.num_tokens) for path in paths for node in path}
    readers: dict[int, list[int]] = {}
    for index, path in enumerate(paths):
        for node in path:
            readers.setdefault(node.id, []).append(index)
    total, children = sum(sizes.values()), max(1, sum(shares))
    cost = [sum(sizes[node.id] for node in path) for path in paths]  # of what is not yet chosen
    left = set(range(len(branches)))
    chosen: list[int] = []
    while left:
        best = max(sorted(left), key=lambda index: shares[index] / children - weight * cost[index] / total)
        if chosen and shares[best] / children <= weight * cost[best] / total:
            break
        left.remove(best)
        chosen.append(best)
        for node in paths[best]:
            for index in readers.pop(node.id, ()):
                cost[index] -= sizes[node.id]
    return sorted(chosen)


def _path(branch: Branch) -> list[Branch]:
    path = []
    node: Branch | None = branch
    while node is not None and node.parent is not None:
        path.append(node)
        node = node.parent
    return path


def _search(run: Run, allocate: Allocate) -> Moves[list[Branch]]:
    """Rounds of `n` candidates, less one for each branch that has ended; `allocate` deals the children."""
    config = run.config
    turns = [run.root] * config.n
    ended: list[Branch] = []
    for last in run.rounds():
        children = yield from expand(run, turns, last=last)
        grown = [child for child in children if has_grown(child)]
        candidates = distinct(grown) if config.dedupe else grown
        mark_pruned(run, children, candidates, "empty, or repeats another")
        if not ended:
            check_growth(run, children)
        yield from score(run, candidates, last=last)
        ended += [branch for branch in candidates if branch.ended]
        frontier = [branch for branch in candidates if not branch.ended]
        width = config.n - len(ended)
        if not frontier or width <= 0 or run.is_done(ended):
            ended += frontier  # reported as unfinished
            break
        counts = allocate(frontier, width)
        turns = [branch for branch, count in zip(frontier, counts, strict=True) for _ in range(count)]
        mark_pruned(run, frontier, turns, "number {rank} of {count} by score: it gets none of the next children")
        yield from release(run, turns)
    return in_order(run, ended)
