"""Branches of search trees as tokens, and the input and output of a forward over them.

A `TokenBranch` is the tokens that it adds to a part of its parent's path. Its KV may be released at any time. It comes
back by processing those tokens again, together with tokens that its ancestors lack, in the same packed forward. So a
search that does not fit the pool does its work in smaller parts, and returns the same result.

If a decoder has a switch (`DecoderShape.switch`), keys of short texts and keys of long texts are of two kinds. The
length of a branch decides its kind. A branch has a twin of the other kind as soon as a descendant needs it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from tts_search.models.meter import Meter

__all__ = ["NO_ROWS", "Forwarded", "Rows", "TokenBranch", "kv_of"]


@dataclass(slots=True, eq=False)
class TokenBranch:
    """The first ``start`` tokens of the parent's path, then ``tokens``.

    Attributes
    ----------
    meter : Meter
        Where its cost is counted.
    parent : TokenBranch or None
    start : int
        0 without a parent, and else at least the parent's own start.
    tokens : list of int
        Its own tokens; it grows at this end.
    given : int
        How many of `tokens` were not sampled but read (a prompt): they count as prefill.
    marks : list of int
        Positions in the path whose outputs are wanted, besides that of the last token.
    kv, cached : int
        Its forest branch while it has one, and how many tokens of the path have KV through it.
    reached : int
        The most tokens of the path that ever had KV; what is forwarded below that is forwarded again.
    held : int
        How many of `tokens` have KV that this branch or a descendant reads.
    holders : set of TokenBranch
        The children that have KV or have such children: they read this branch's.
    released : bool
        Nobody asks for it any more; its descendants may.
    used : int
        When it was last forwarded.
    far : bool
        Whether its KV is that of a text beyond the decoder's switch.
    twin : TokenBranch or None
        The same tokens with KV of the other kind, for descendants of that kind.
    sought : bool
        The prefix cache was asked for it since it has no KV.
    """

    meter: Meter
    parent: TokenBranch | None = field(default=None, repr=False)
    start: int = 0
    tokens: list[int] = field(default_factory=list)
    given: int = 0
    marks: list[int] = field(default_factory=list)
    kv: int | None = None
    cached: int = 0
    reached: int = 0
    held: int = 0
    holders: set[TokenBranch] = field(default_factory=set, repr=False)
    released: bool = False
    used: int = 0
    far: bool = False
    twin: TokenBranch | None = field(default=None, repr=False)
    sought: bool = False

    def __post_init__(self) -> None:
        self.reached = self.start
        self.far = self.parent is not None and self.parent.far

    @property
    def length(self) -> int:
        """Tokens of its path."""
        return self.start + len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens of its own that have no KV; with the end of the parent's, if its KV was cut in front of it."""
        have = self.start if self.kv is None else self.cached
        return self.start + len(self.tokens) - have

    def path(self) -> list[int]:
        """All tokens from the root on."""
        parts: list[list[int]] = []
        node: TokenBranch | None = self
        end = self.length
        while node is not None:
            parts.append(node.tokens[: end - node.start])
            end = node.start
            node = node.parent
        return list(itertools.chain.from_iterable(reversed(parts)))


@dataclass(frozen=True, slots=True)
class Rows:
    """Branches that grow by one token in each forward, as columns [N] int64 on the CPU.

    What `BranchPool.run` has taken in: while they run, the pool's books of them are kept by the meters.

    Attributes
    ----------
    kv : Tensor
        Their forest branches.
    tokens, positions : Tensor
        The token that each forwards, and where it stands.
    """

    kv: Tensor
    tokens: Tensor
    positions: Tensor


NO_ROWS: Final = Rows(*(torch.empty(0, dtype=torch.int64) for _ in range(3)))


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What one forward got done.

    Attributes
    ----------
    outputs : Tensor
        [N + len(places), ...]: what the model gave for the N rows, then for the places.
    places : list of (TokenBranch, int)
        A branch and a position in its path: branch after branch in the order they were asked for, the marked positions
        that were reached and, for those that are done, the last one.
    done : list of TokenBranch
        Branches without pending tokens now, in the order they were asked for.
    """

    outputs: Tensor
    places: list[tuple[TokenBranch, int]]
    done: list[TokenBranch]


def kv_of(node: TokenBranch) -> int:
    """The forest branch of one that has KV."""
    assert node.kv is not None, "a branch without KV was used as if it had some"
    return node.kv
