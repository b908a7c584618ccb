"""The events of a search, reported as they happen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tts_search.search.result import node_of
from tts_search.search.run import Run
from tts_search.search.tree import TreeNode

__all__ = ["EventKind", "SearchEvent", "Watch"]

EventKind = Literal["round", "expanded", "scored", "pruned", "finished"]


@dataclass(frozen=True, slots=True)
class SearchEvent:
    """Something that happened to a search tree.

    Attributes
    ----------
    kind : str
        ``"expanded"``: these nodes are new. ``"scored"``: they have scores for the first time, or changed scores.
        ``"pruned"``: they will not be continued. ``"finished"``: their answers are complete. ``"round"``: a round
        begins.
    nodes : tuple of TreeNode
        The nodes after the event, by their numbers; none for a round.
    round : int
        The round of the search at this time.
    """

    kind: EventKind
    nodes: tuple[TreeNode, ...]
    round: int


class Watch:
    """Reports to one listener how a search's nodes changed since the last report. The first report has all nodes.

    A listener with all events knows all nodes of the tree in their current state.
    """

    def __init__(self) -> None:
        self._seen: dict[int, TreeNode] = {}
        self._round = 0

    def look(self, run: Run) -> Iterator[SearchEvent]:
        """Yield the changes. O(nodes of the tree)."""
        nodes = [node_of(branch) for branch in run.branches if branch.is_grown]
        before = {node.id: self._seen.get(node.id) for node in nodes}
        kinds: dict[EventKind, list[TreeNode]] = {"expanded": [], "scored": [], "pruned": [], "finished": []}
        for node in nodes:
            old = before[node.id]
            if old is None:
                kinds["expanded"].append(node)
            if node.scores != (() if old is None else old.scores):
                kinds["scored"].append(node)
            if node.state in ("pruned", "finished") and (old is None or old.state != node.state):
                kinds[node.state].append(node)
            self._seen[node.id] = node
        yield from (SearchEvent(kind, tuple(told), run.round) for kind, told in kinds.items() if told)
        if run.round != self._round:
            self._round = run.round
            yield SearchEvent("round", (), run.round)
