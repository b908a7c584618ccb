"""The result of a search as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tts_search.search.result import SearchResult
from tts_search.search.tree import SearchTree, TreeNode

__all__ = ["best_node", "finite", "node_as_dict", "result_as_dict"]


def result_as_dict(result: SearchResult, vote: str, *, tree: bool) -> dict[str, Any]:
    """Return a result; numbers that are not finite are null."""
    data = {
        "problem": result.problem,
        "answer": result.answer(vote),
        "vote": vote,
        "best": asdict(result.best),
        "completions": [asdict(completion) for completion in result.completions],
        "stats": asdict(result.stats),
        "config": result.config.as_dict(),
    }
    if tree:
        data["tree"] = json.loads(result.tree.to_json())
    whole: dict[str, Any] = finite(data)
    return whole


def node_as_dict(node: TreeNode) -> dict[str, Any]:
    """Return a node of a tree; a score that is not finite is null."""
    plain: dict[str, Any] = finite(asdict(node))
    return plain


def best_node(result: SearchResult) -> int | None:
    """Return the number of the node where the best completion ends; None if the tree does not have it."""
    return _ends(result.tree).get((result.best.text, result.best.step_scores))


def _ends(tree: SearchTree) -> dict[tuple[str, tuple[float, ...]], int]:
    """The first leaf for each pair of text and scores. Texts are those of the whole path."""
    texts = {0: ""}
    ends: dict[tuple[str, tuple[float, ...]], int] = {}
    for node in tree.nodes[1:]:
        assert node.parent is not None
        texts[node.id] = texts[node.parent] + node.text
        if node.state != "expanded":
            ends.setdefault((texts[node.id], node.scores), node.id)
    return ends


def finite(value: Any) -> Any:
    """Return a JSON value with null instead of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
