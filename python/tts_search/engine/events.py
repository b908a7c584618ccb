"""The events of a search, reported as they happen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from tts_search.search.protocol import Usage
from tts_search.search.result import node_of
from tts_search.search.run import Run
from tts_search.search.tree import TreeNode

__all__ = ["EventKind", "SearchEvent", "SearchUsage", "Watch"]

EventKind = Literal["round", "expanded", "scored", "pruned", "finished"]


@dataclass(frozen=True, slots=True)
class SearchUsage:
    """The cost of a search at the time of an event. A count that a model reports only at the end is 0 until then.

    Attributes
    ----------
    policy_tokens, verifier_tokens : int
        Tokens sampled by the policy, and read by the verifier.
    unique_kv_tokens, logical_kv_tokens : int
        Slots of the policy's KV cache that the search uses now, and the number without sharing. Both are 0 after the
        search.
    peak_unique_kv_tokens, peak_logical_kv_tokens : int
        The largest values of these so far. At the last event, the peaks and the tokens are those of the result's
        `stats`.
    """

    policy_tokens: int = 0
    verifier_tokens: int = 0
    unique_kv_tokens: int = 0
    logical_kv_tokens: int = 0
    peak_unique_kv_tokens: int = 0
    peak_logical_kv_tokens: int = 0

    @classmethod
    def of(cls, policy: Usage, verifier: Usage) -> SearchUsage:
        """Combine the counts of both drivers."""
        return cls(
            policy.tokens,
            verifier.tokens + verifier.prefill_tokens,
            policy.unique_kv_tokens,
            policy.logical_kv_tokens,
            policy.peak_unique_kv_tokens,
            policy.peak_logical_kv_tokens,
        )


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
    usage : SearchUsage
        What the search has cost at this time.
    """

    kind: EventKind
    nodes: tuple[TreeNode, ...]
    round: int
    usage: SearchUsage


class Watch:
    """Reports to one listener how a search's nodes changed since the last report. The first report has all nodes.

    A listener with all events knows all nodes of the tree in their current state.
    """

    def __init__(self) -> None:
        self._seen: dict[int, TreeNode] = {}
        self._round = 0

    def look(self, run: Run, costs: Callable[[], tuple[Usage, Usage]]) -> Iterator[SearchEvent]:
        """Yield the changes, with the costs at this time. O(nodes of the tree)."""
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
        told: list[tuple[EventKind, list[TreeNode]]] = [(kind, changed) for kind, changed in kinds.items() if changed]
        if run.round != self._round:
            self._round = run.round
            told.append(("round", []))
        usage = SearchUsage.of(*costs()) if told else SearchUsage()
        yield from (SearchEvent(kind, tuple(changed), run.round, usage) for kind, changed in told)
