"""The tree that a search grew: what was tried, how it was scored, what became of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tts_search.terminal import sanitize

__all__ = ["SearchTree", "State", "TreeNode"]

State = Literal["expanded", "pruned", "finished", "open"]

_FORMAT = 1
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers
_MARKS = {"expanded": " ", "pruned": "x", "finished": "*", "open": "?"}


@dataclass(frozen=True, slots=True)
class TreeNode:
    """A node of a search tree.

    Attributes
    ----------
    id : int
        Its number; the root, the problem without any step, is 0. Numbers rise with the rounds.
    parent : int or None
        The parent's number; None at the root.
    round : int
        The round that made it; 0 at the root.
    text : str
        What it added to its parent's text, raw.
    scores : tuple of float
        The verifier's scores of the whole path when it last read it; empty if it never did.
    score : float
        Their aggregate; NaN if there is none.
    state : str
        ``"expanded"`` (has children), ``"pruned"`` (lost, or dropped as a duplicate), ``"finished"`` (a finished
        answer) or ``"open"`` (neither when the search ended).
    num_tokens : int
        Tokens sampled for `text`.
    """

    id: int
    parent: int | None
    round: int
    text: str
    scores: tuple[float, ...]
    score: float
    state: State
    num_tokens: int


@dataclass(frozen=True)
class SearchTree:
    """All nodes of a search, ordered by number: ``tree.nodes[i].id == i``, parents before children."""

    nodes: tuple[TreeNode, ...]

    def children(self, node: int) -> list[TreeNode]:
        """Return the children of a node in order. O(nodes)."""
        return [child for child in self.nodes if child.parent == node]

    def path(self, node: int) -> list[TreeNode]:
        """Return the nodes from the root's child down to `node`."""
        path = []
        at = self.nodes[node]
        while at.parent is not None:
            path.append(at)
            at = self.nodes[at.parent]
        return path[::-1]

    def to_json(self) -> str:
        """Return the tree as JSON; non-finite scores are the texts ``"nan"``, ``"inf"`` and ``"-inf"``."""
        nodes = [{name: _encode(value) for name, value in asdict(node).items()} for node in self.nodes]
        return json.dumps({"format": _FORMAT, "nodes": nodes}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SearchTree:
        """Return the tree that `to_json` wrote.

        Raises
        ------
        ValueError
            If the text is no such tree.
        """
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise ValueError(f"text: expected a tree in format {_FORMAT}, got format {data['format']!r}")
            nodes = tuple(_decode(node) for node in data["nodes"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"text: expected the JSON of a SearchTree, got {text[:80]!r}") from error
        if any(node.id != index or not _is_parent(node.parent, index) for index, node in enumerate(nodes)):
            raise ValueError("text: expected nodes in order of their id, parents before children")
        return cls(nodes)

    def render(self, *, width: int = 100, max_nodes: int = 60) -> str:
        """Return the tree as text for a terminal, one line a node: state, score, the beginning of its text.

        Leaves are marked ``*`` finished, ``x`` pruned, ``?`` open. Pruned siblings beyond the first few are counted,
        not shown, so that a tree has about `max_nodes` lines. Control sequences are stripped from the texts.
        """
        kept = _shown(self.nodes, max_nodes)
        by_parent: dict[int, list[TreeNode]] = {}
        for node in self.nodes[1:]:
            assert node.parent is not None
            by_parent.setdefault(node.parent, []).append(node)
        lines = ["problem"]
        stack = _entries(by_parent.get(0, ()), kept, "")
        while stack:
            entry, prefix, is_last = stack.pop()
            branch = prefix + ("└─" if is_last else "├─")
            if isinstance(entry, int):
                lines.append(f"{branch} ... {entry} more pruned")
                continue
            score = "     " if math.isnan(entry.score) else f"{entry.score:5.3f}"
            words = " ".join(sanitize(entry.text).split())
            lines.append(f"{branch}{_MARKS[entry.state]} {score} {words}"[:width])
            stack += _entries(by_parent.get(entry.id, ()), kept, prefix + ("  " if is_last else "│ "))
        return "\n".join(lines)


_Entry = tuple["TreeNode | int", str, bool]


def _entries(children: Iterable[TreeNode], kept: set[int], prefix: str) -> list[_Entry]:
    """Return the lines below a node as a stack (first one last): the children shown, and how many are not."""
    children = list(children)
    shown: list[TreeNode | int] = [child for child in children if child.id in kept]
    if len(shown) < len(children):
        shown.append(len(children) - len(shown))
    return [(entry, prefix, index == len(shown) - 1) for index, entry in enumerate(shown)][::-1]


def _shown(nodes: tuple[TreeNode, ...], max_nodes: int) -> set[int]:
    """Choose the nodes to show: all that are not pruned, then pruned ones, the best first, as far as there is room."""
    kept = [node for node in nodes if node.state != "pruned"]
    pruned = [node for node in nodes if node.state == "pruned"]
    pruned.sort(key=lambda node: (math.isnan(node.score), -node.score))
    return {node.id for node in kept + pruned[: max(0, max_nodes - len(kept))]}


def _is_parent(parent: int | None, index: int) -> bool:
    return parent is None if index == 0 else parent is not None and 0 <= parent < index


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float:
    return _NON_FINITE[value] if isinstance(value, str) else float(value)


def _decode(node: dict[str, Any]) -> TreeNode:
    if node["state"] not in _MARKS:
        raise ValueError(f"text: expected a state among {', '.join(_MARKS)}, got {node['state']!r}")
    scores = tuple(_number(score) for score in node["scores"])
    return TreeNode(**{**node, "scores": scores, "score": _number(node["score"])})
