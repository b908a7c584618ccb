"""A search tree as text, for a terminal: one line for each node."""

from __future__ import annotations

import math
from typing import Final

from tts_search.search.tree import SearchTree, State, TreeNode
from tts_search.terminal import sanitize

__all__ = ["outline"]

_MARKS: Final[dict[State, str]] = {"expanded": " ", "pruned": "x", "finished": "*", "open": "?"}


def outline(tree: SearchTree, *, width: int = 100, max_nodes: int = 60) -> str:
    """Return a tree as text for a terminal, one line per node: state, score, the beginning of its text.

    Leaves are marked ``*`` finished, ``x`` pruned, ``?`` open. About `max_nodes` are shown, those on the way to the
    best finished answers first; ``(+3 more)`` counts children that are not. Texts are sanitized.
    """
    shown = _shown(tree.nodes, max_nodes)
    children: dict[int, list[TreeNode]] = {}
    for node in tree.nodes[1:]:
        assert node.parent is not None
        children.setdefault(node.parent, []).append(node)
    lines: list[str] = []
    stack = [(tree.nodes[0], "", "")]  # a node, what its line begins with, what its children's lines begin with
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
