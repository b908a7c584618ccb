"""The tree of a search: its steps, their scores, and whether each was pruned, finished or left open."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from tts_search.terminal import sanitize

__all__ = ["SearchTree", "State", "TreeNode"]

State = Literal["expanded", "pruned", "finished", "open"]

_FORMAT = 1
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers
_MARKS = {"expanded": " ", "pruned": "x", "finished": "*", "open": "?"}


@dataclass(frozen=True, slots=True, eq=False)
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
    why : str
        Why it was pruned, or has no scores; empty otherwise.
    pruned_in : int or None
        The round that pruned it, which need not be the one that made it; None otherwise.
    """

    id: int
    parent: int | None
    round: int
    text: str
    scores: tuple[float, ...]
    score: float
    state: State
    num_tokens: int
    why: str = ""
    pruned_in: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeNode) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def _content(self) -> tuple[object, ...]:
        """The attributes, None for NaN: no score is equal to no score (to a dataclass it is not, since Python 3.13)."""
        values = (getattr(self, each.name) for each in fields(self))
        return tuple(None if value != value else value for value in values)


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
        """Return the tree as text for a terminal, one line per node: state, score, the beginning of its text.

        Leaves are marked ``*`` finished, ``x`` pruned, ``?`` open. About `max_nodes` are shown, those on the way to the
        best finished answers first; ``(+3 more)`` counts children that are not. Texts are sanitized.
        """
        shown = _shown(self.nodes, max_nodes)
        children: dict[int, list[TreeNode]] = {}
        for node in self.nodes[1:]:
            assert node.parent is not None
            children.setdefault(node.parent, []).append(node)
        lines: list[str] = []
        stack = [(self.nodes[0], "", "")]  # a node, what its line begins with, what its children's lines begin with
        while stack:
            node, head, indent = stack.pop()
            below = children.get(node.id, [])
            kept = [child for child in below if child.id in shown]
            more = f"  (+{len(below) - len(kept)} more)" if len(kept) < len(below) else ""
            lines.append(f"{head}{_describe(node)}"[: width - len(more)] + more)
            ends = [False] * (len(kept) - 1) + [True]
            for child, last in reversed(list(zip(kept, ends, strict=False))):
                stack.append((child, indent + ("└─" if last else "├─"), indent + ("  " if last else "│ ")))
        return "\n".join(lines)


def _describe(node: TreeNode) -> str:
    if node.parent is None:
        return "problem"
    score = "     " if math.isnan(node.score) else f"{node.score:5.3f}"
    return f"{_MARKS[node.state]} {score} {' '.join(sanitize(node.text).split())}"


def _shown(nodes: tuple[TreeNode, ...], max_nodes: int) -> set[int]:
    """Choose the nodes to show: paths to leaves, finished ones up to half of the room, then others, best scores first.

    Of sibling leaves that look the same, one is shown.
    """
    leaves = [node for node in nodes[1:] if node.state != "expanded"]
    leaves.sort(key=lambda node: (math.isnan(node.score), -node.score))
    leaves = list({(leaf.parent, leaf.text, leaf.state): leaf for leaf in reversed(leaves)}.values())[::-1]
    shown: set[int] = set()
    for wanted, room in ((True, (max_nodes + 1) // 2), (False, max_nodes)):
        for leaf in leaves:
            path = _path_to_shown(nodes, leaf, shown)
            if (leaf.state == "finished") == wanted and (len(shown) + len(path) <= room or (wanted and not shown)):
                shown |= path
    return shown


def _path_to_shown(nodes: tuple[TreeNode, ...], leaf: TreeNode, shown: set[int]) -> set[int]:
    path = set()
    node = leaf
    while node.parent is not None and node.id not in shown:
        path.add(node.id)
        node = nodes[node.parent]
    return path


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
