"""The tree of a search: its steps, their scores, and whether each was pruned, finished or left open."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

__all__ = ["SearchTree", "State", "TreeNode"]

State = Literal["expanded", "pruned", "finished", "open"]

_FORMAT = 1
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers


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


def _is_parent(parent: int | None, index: int) -> bool:
    return parent is None if index == 0 else parent is not None and 0 <= parent < index


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float:
    return _NON_FINITE[value] if isinstance(value, str) else float(value)


def _decode(node: dict[str, Any]) -> TreeNode:
    if node["state"] not in get_args(State):
        raise ValueError(f"text: expected a state among {', '.join(get_args(State))}, got {node['state']!r}")
    scores = tuple(_number(score) for score in node["scores"])
    return TreeNode(**{**node, "scores": scores, "score": _number(node["score"])})
