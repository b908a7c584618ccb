"""KV of texts that nobody asks for any more, but that is still in the pool: it is found again by its first tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["PrefixCache"]


@dataclass(slots=True, eq=False)
class _Node:
    """A node in the tree of texts. ``tokens`` lead to it from its parent; ``kv`` is the KV of the text up to it."""

    parent: _Node | None
    tokens: tuple[int, ...]
    kv: int | None = None
    children: dict[int, _Node] = field(default_factory=dict)


class PrefixCache:
    """A radix tree over texts, each with a forest branch that holds its KV.

    Texts may share a prefix that ends at any token. A text that is found or put in counts as used. So do all texts that
    are prefixes of it, but as slightly more recent. So the least recently used text is never a prefix of another one,
    whose pages would stay in use anyway.
    """

    def __init__(self) -> None:
        self._root = _Node(None, ())
        self._by_use: OrderedDict[_Node, None] = OrderedDict()  # nodes with KV, least recently used first

    def __len__(self) -> int:
        return len(self._by_use)

    def put(self, tokens: Sequence[int], kv: int) -> bool:
        """Store the KV of a text; False if it is stored already, and this KV is to be freed. O(tokens)."""
        node, rest = self._walk(tuple(tokens))
        if rest:
            node.children[rest[0]] = node = _Node(node, rest)
        new = node.kv is None
        if new:
            node.kv = kv
        self._use(node)
        return new

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The KV of a text with the longest common prefix, and the length of this prefix. O(tokens)."""
        node, at = self._root, 0
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            node = child
            same = _common(child.tokens, tokens, at)
            at += same
            if same < len(child.tokens):
                break
        if not at:
            return -1, 0
        while node.kv is None:  # any text below will do; there is one, since nodes without one are cut
            node = next(iter(node.children.values()))
        self._use(node)
        return node.kv, at

    def pop(self) -> int:
        """Forget the least recently used text; return its KV, which is to be freed."""
        node, _ = self._by_use.popitem(last=False)
        kv, node.kv = node.kv, None
        assert kv is not None
        at: _Node | None = node
        while at is not None and at.parent is not None and at.kv is None and not at.children:
            del at.parent.children[at.tokens[0]]
            at = at.parent
        return kv

    def _use(self, node: _Node) -> None:
        at: _Node | None = node
        while at is not None:
            if at.kv is not None:
                self._by_use[at] = None
                self._by_use.move_to_end(at)
            at = at.parent

    def _walk(self, tokens: tuple[int, ...]) -> tuple[_Node, tuple[int, ...]]:
        """The node where a text leaves the tree (made here if it lies within an edge), and the rest of the text."""
        node, at = self._root, 0
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            same = _common(child.tokens, tokens, at)
            if same < len(child.tokens):
                middle = _Node(node, child.tokens[:same], children={child.tokens[same]: child})
                node.children[tokens[at]] = middle
                child.parent, child.tokens = middle, child.tokens[same:]
                child = middle
            node, at = child, at + same
        return node, tokens[at:]


def _common(edge: tuple[int, ...], tokens: Sequence[int], begin: int) -> int:
    """How many tokens of an edge are equal to those of a text from ``begin`` on."""
    part = tuple(tokens[begin : begin + len(edge)])
    if part == edge:
        return len(edge)
    return next((i for i, (mine, other) in enumerate(zip(edge, part, strict=False)) if mine != other), len(part))
