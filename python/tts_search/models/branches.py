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
    """A branch: the first ``start`` tokens of its parent's path, then its own ``tokens``.

    Attributes
    ----------
    meter : Meter
        The meter that counts its cost.
    parent : TokenBranch or None
    start : int
        0 without a parent, and else at least the parent's own start.
    tokens : list of int
        Its own tokens. The branch grows at the end of this list.
    given : int
        How many of `tokens` were read and not sampled (a prompt). They count as prefill.
    marks : list of int
        Positions in the path whose outputs are needed, besides that of the last token.
    kv, cached : int
        Its forest branch while it has one, and how many tokens of the path have KV in it.
    reached : int
        The largest number of tokens of the path that ever had KV. Tokens below it that are forwarded count as
        recomputed.
    held : int
        How many of `tokens` have KV that this branch or a descendant reads.
    holders : set of TokenBranch
        The children that have KV, or have such children themselves: they read this branch's KV.
    released : bool
        The branch itself is no longer needed; its descendants may be.
    used : int
        When it was last forwarded.
    far : bool
        Whether its KV is that of a text longer than the decoder's switch.
    twin : TokenBranch or None
        A branch with the same tokens and the other kind of KV, for descendants of that kind.
    sought : bool
        Whether the prefix cache was searched for it since it lost its KV.
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
        """Number of tokens in its path."""
        return self.start + len(self.tokens)

    @property
    def pending(self) -> int:
        """Number of own tokens without KV. If the KV was cut before them, the parent's last tokens count, too."""
        have = self.start if self.kv is None else self.cached
        return self.start + len(self.tokens) - have

    def path(self) -> list[int]:
        """All tokens from the root to the end of the branch."""
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
    """Branches that grow by one token in each forward. Columns are [N] int64 on the CPU.

    `BranchPool.run` has taken them in. While they run, their meters count for the pool.

    Attributes
    ----------
    kv : Tensor
        Their forest branches.
    tokens, positions : Tensor
        The token that each branch forwards, and its position.
    """

    kv: Tensor
    tokens: Tensor
    positions: Tensor


NO_ROWS: Final = Rows(*(torch.empty(0, dtype=torch.int64) for _ in range(3)))


@dataclass(frozen=True, slots=True)
class Forwarded:
    """The results of one forward.

    Attributes
    ----------
    outputs : Tensor
        [N + len(places), ...]: the model's outputs for the N rows, then for the places.
    places : list of (TokenBranch, int)
        Pairs of a branch and a position in its path, branch after branch as they were given: the marked positions that
        this forward reached, and the last position of branches that are done.
    done : list of TokenBranch
        Branches without pending tokens after this forward, as they were given.
    """

    outputs: Tensor
    places: list[tuple[TokenBranch, int]]
    done: list[TokenBranch]


def kv_of(node: TokenBranch) -> int:
    """The forest branch of a branch that has KV."""
    assert node.kv is not None, "a branch without KV was used as if it had some"
    return node.kv
