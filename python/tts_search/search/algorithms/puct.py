"""Tree search by PUCT: each round grows the leaves with the best scores or the fewest visits, at whatever depth."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tts_search.search.algorithms.branches import check_growth, has_grown, in_order, mark_pruned
from tts_search.search.moves import Moves, expand, release, score
from tts_search.search.run import Branch, Run

__all__ = ["puct"]

BASE = 19652  # of the growth of the exploration term: Silver et al., Science 362 (2018), and OpenR


def puct(run: Run) -> Moves[list[Branch]]:
    """Search until n branches have ended, or for `max_steps` rounds of up to n children.

    A round descends ``n // expand`` times (or `keep`) from the root to a leaf that can grow, and gives each leaf so
    found `expand` children (the root, in the first round, n). The verifier's score of a child is its value, and counts
    for all nodes above it. A descent goes to the child with the greatest ::

        mean value + exploration * log-growth * sqrt(visits of the parent) / (1 + visits) / (number of siblings)

    the earlier one on ties; a leaf is visited at most once in each round, and until its children are scored the visit
    counts as one of value 0. Siblings are samples of the policy, so each has the same prior.

    Raises
    ------
    SearchError
        If the policy returns nothing, or it or the verifier something else than was asked for.
    """
    config = run.config
    tree = _Tree(run)
    ended: list[Branch] = []
    for last in run.rounds():
        if run.round == 1:
            turns = [run.root] * config.n
        else:
            leaves = tree.select(max(1, config.keep or config.n // config.expand))
            turns = [leaf for leaf in leaves for _ in range(config.expand)]
        children = yield from expand(run, turns, last=last)
        candidates = [child for child in children if has_grown(child)]
        mark_pruned(run, children, candidates, "empty")
        if not ended and not tree.has_leaves:
            check_growth(run, children)
        yield from score(run, candidates, last=last)
        tree.add(turns, candidates)
        ended += [branch for branch in candidates if branch.ended]
        if len(ended) >= config.n or not tree.has_leaves or run.is_done(ended):
            break
        yield from release(run, tree.leaves())
    return in_order(run, ended or list(tree.leaves()))


class _Tree:
    """Visits and values of the nodes, and how many leaves that can grow are below each."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.visits = {0: 0}
        self.values = {0: 0.0}
        self.open = {0: 0}
        self.children: dict[int, list[Branch]] = {}

    @property
    def has_leaves(self) -> bool:
        """Whether any leaf can grow."""
        return self.open[0] > 0

    def leaves(self) -> Iterator[Branch]:
        """Yield the leaves that can grow, by number."""
        return (
            branch
            for branch in self.run.branches
            if self.open.get(branch.id, 0) and branch.id not in self.children and branch.parent is not None
        )

    def select(self, count: int) -> list[Branch]:
        """Descend to up to `count` different leaves."""
        leaves: list[Branch] = []
        while len(leaves) < count and self.has_leaves:
            node = self.run.root
            while node.id in self.children:
                node = max(
                    (child for child in self.children[node.id] if self.open[child.id]),
                    key=lambda child, parent=node: self._promise(parent, child),  # type: ignore[misc]
                )
            leaves.append(node)
            self._back_up(node, visits=1, value=0.0, leaves=-1)
        return leaves

    def add(self, turns: list[Branch], children: list[Branch]) -> None:
        """Add scored children; the visits that `select` counted ahead are taken back."""
        for leaf in dict.fromkeys(turns):
            self.children[leaf.id] = []
            if leaf is not self.run.root:
                self._back_up(leaf, visits=-1, value=0.0, leaves=0)
        for child in children:
            assert child.parent is not None
            self.children[child.parent.id].append(child)
            self.visits[child.id], self.values[child.id], self.open[child.id] = 0, 0.0, 0
            value = 0.0 if child.score == -math.inf else child.score
            self._back_up(child, visits=1, value=value, leaves=0 if child.ended else 1)

    def _promise(self, parent: Branch, child: Branch) -> float:
        visits, above = self.visits[child.id], self.visits[parent.id]
        growth = self.run.config.exploration + math.log((above + BASE + 1) / BASE)
        if not self.run.config.exploration:
            growth = 0.0
        prior = 1 / len(self.children[parent.id])
        return self.values[child.id] / max(1, visits) + growth * prior * math.sqrt(above) / (1 + visits)

    def _back_up(self, node: Branch | None, *, visits: int, value: float, leaves: int) -> None:
        while node is not None:
            self.visits[node.id] += visits
            self.values[node.id] += value
            self.open[node.id] += leaves
            node = node.parent
