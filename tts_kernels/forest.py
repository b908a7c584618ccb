"""The KV forest: search trees over a paged KV cache, forked without copying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import _host
from ._host import OutOfPages as OutOfPages
from .plan import AttentionPlan, PlanShape, host_ints, make_plan

Ints: TypeAlias = "Sequence[int] | Tensor"


class Append(NamedTuple):
    """Where the tokens of a `KVForest.append` go. All int32, on the CPU.

    Attributes
    ----------
    slots
        [sum(counts)]: ``page * page_size + offset`` of each new token, entry by entry; for `append_kv_`.
    copy_src, copy_dst
        [copies]: pages to copy before any slot is written; for `copy_pages_`.
    """

    slots: Tensor
    copy_src: Tensor
    copy_dst: Tensor


class ForestStats(NamedTuple):
    """The size of a forest.

    Attributes
    ----------
    branches
        Live branches.
    pages_total, pages_free
        Pages in the pool, and pages that no branch uses.
    logical_tokens
        Sum of the branches' lengths: the number of tokens in a cache without sharing.
    unique_tokens
        Slots that some live branch reads.
    """

    branches: int
    pages_total: int
    pages_free: int
    logical_tokens: int
    unique_tokens: int


class KVForest:
    """All search trees in flight, as page tables over one pool of KV pages.

    A branch is a sequence of tokens. Its KV lies in pages of ``page_size`` token slots. Branches that were forked from
    each other share the pages of their common prefix. A partly filled last page is copied only when a branch writes to
    it while another branch still uses it. The forest only knows page numbers. The cache itself is a `KVCache` or any
    other tensors [num_pages, page_size, Hkv, D].

    Branches are ints that count up from 0 and are never reused. An operation that raises an error has changed nothing.
    There is one exception: if memory runs out for one of the many short lists of an `append`, the forest may break;
    then every later operation raises a RuntimeError. Arguments named ``branches``, ``counts`` and the like take a list,
    tuple, range, array or one-dimensional CPU tensor of int. A forest is not thread-safe.

    Parameters
    ----------
    num_pages
        Number of pages in the pool.
    page_size
        Number of token slots in a page. The pool must have fewer than 2**31 slots.

    Raises
    ------
    TypeError
        For anything but ints.
    ValueError
        For numbers below 1, or too many slots.

    Notes
    -----
    Paged KV is from vLLM (arXiv 2309.06180). Here the pages form a tree of runs, and references are counted for runs,
    so that a fork costs O(children) and never O(tokens).

    Examples
    --------
    >>> import tts_kernels as tk
    >>> forest = tk.KVForest(num_pages=8, page_size=4)
    >>> root = forest.add_root()
    >>> forest.append([root], [6]).slots.tolist()
    [0, 1, 2, 3, 4, 5]
    >>> a, b = forest.fork([root, root])
    >>> forest.free([root])
    >>> slots, copy_src, copy_dst = forest.append([a, b], [1, 1])
    >>> slots.tolist(), copy_src.tolist(), copy_dst.tolist()
    ([10, 6], [1], [2])
    >>> forest.page_table([a, b])[0].tolist()
    [[0, 2], [0, 1]]
    """

    def __init__(self, num_pages: int, page_size: int = 16) -> None:
        self._forest = _host.Forest(num_pages, page_size)
        self.num_pages = int(num_pages)
        self.page_size = int(page_size)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={value}" for name, value in self.stats()._asdict().items())
        return f"KVForest(page_size={self.page_size}, {numbers})"

    def add_root(self) -> int:
        """Add an empty branch: the root of a new tree."""
        return self._forest.add_root()

    def append(self, branches: Ints, counts: Ints) -> Append:
        """Reserve room for more tokens in branches.

        Entries are served in order. If several branches share a partly filled last page, each gets a copy, except for
        the last entry if no other branch uses the page.

        Parameters
        ----------
        branches
            [B]: different live branches.
        counts
            [B]: number of new tokens of each; may be 0.

        Returns
        -------
        Append
            The slots of the new tokens, and the pages to copy first.

        Raises
        ------
        TypeError
            For anything but ints.
        ValueError
            If a branch is named twice, for a negative count, or if there are not as many counts as branches.
        IndexError
            If a branch does not exist.
        OutOfPages
            If there are too few pages; the error has ``needed`` and ``free``.

        Notes
        -----
        O(B + tokens).
        """
        slots, copy_src, copy_dst = self._forest.append(_ints("branches", branches), _ints("counts", counts))
        return Append(_tensor(slots), _tensor(copy_src), _tensor(copy_dst))

    def fork(self, parents: Ints) -> list[int]:
        """Fork one child for each entry, equal to its parent. Parents stay, and no token is copied. O(children).

        Raises
        ------
        TypeError
            For anything but ints.
        IndexError
            If a parent does not exist.
        """
        return self._forest.fork(_ints("parents", parents))

    def free(self, branches: Ints) -> None:
        """Remove branches. Pages that no other branch uses become free. O(branches + pages that become free).

        Raises
        ------
        TypeError
            For anything but ints.
        ValueError
            If a branch is named twice.
        IndexError
            If a branch does not exist.
        """
        self._forest.free(_ints("branches", branches))

    def truncate(self, branch: int, length: int) -> None:
        """Keep only the first ``length`` tokens of a branch. O(pages after the cut), even if many branches share them.

        Raises
        ------
        TypeError
            For anything but ints.
        ValueError
            For a negative length, or more than the branch has.
        IndexError
            If the branch does not exist.
        """
        self._forest.truncate(branch, length)

    def length(self, branch: int) -> int:
        """The number of tokens of a branch. O(1).

        Raises
        ------
        TypeError
            For anything but an int.
        IndexError
            If the branch does not exist.
        """
        return self._forest.length(branch)

    def page_table(self, branches: Ints) -> tuple[Tensor, Tensor]:
        """The pages of branches in the form that other paged attention kernels use.

        Parameters
        ----------
        branches
            [B]: live branches; one may be named more than once.

        Returns
        -------
        page_table
            [B, max] int32: row b has the pages of branch b in order, then -1.
        kv_lens
            [B] int32: lengths.

        Raises
        ------
        TypeError
            For anything but ints.
        IndexError
            If a branch does not exist.

        Notes
        -----
        O(B max).
        """
        pages, lengths, width = self._forest.page_table(_ints("branches", branches))
        return _tensor(pages).view(-1, width) if width else _tensor(pages).view(len(lengths), 0), _tensor(lengths)

    def plan(
        self,
        branches: Ints,
        q_lens: Ints | None = None,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        device: torch.device | str | None = None,
        out: AttentionPlan | None = None,
    ) -> AttentionPlan:
        """Plan `tree_attention` of these branches: which keys are read once for several branches, and in which pieces.

        Parameters
        ----------
        branches
            [B]: live branches; branch b owns the next ``q_lens[b]`` rows of q.
        q_lens
            [B]: query rows of each branch. The last row is the branch's newest token, and the number is at most its
            length. None: one row each (the row of an empty branch has no keys).
        num_q_heads, num_kv_heads, head_dim
            Hq, a multiple of Hkv; Hkv; D.
        window
            w: a row at position i sees positions i - w + 1 to i, and no other keys are planned. The plan can be used
            for attention with this window or a narrower one.
        device
            The device for the plan's tensors, for which the work is cut; by default torch's default device, or that of
            ``out``.
        out
            An earlier plan for the same numbers and the same number of rows, whose tensors are filled again. It has
            room for a few hundred more tokens in each branch.

        Returns
        -------
        AttentionPlan
            Can be used in every layer of a forward. If ``out`` was given, it is returned.

        Raises
        ------
        TypeError
            For anything but ints.
        ValueError
            For row counts outside [0, length], head numbers or a window that do not fit, or an ``out`` that does not
            fit (nothing is written then).
        IndexError
            If a branch does not exist.

        Notes
        -----
        O(B + rows + pages read); the pages are read at the speed of a memory copy.

        Examples
        --------
        >>> import tts_kernels as tk
        >>> forest = tk.KVForest(num_pages=64)
        >>> root = forest.add_root()
        >>> _ = forest.append([root], [100])
        >>> plan = forest.plan(forest.fork([root] * 4), num_q_heads=8, num_kv_heads=2, head_dim=64)
        >>> plan.segments[: plan.sizes[0], 1:5].tolist()  # start, length, row_begin, row_end
        [[0, 100, 0, 4]]
        """
        shape = PlanShape.checked(self.page_size, num_q_heads, num_kv_heads, head_dim, window)
        host_branches = _ints("branches", branches)
        host_q_lens = None if q_lens is None else _ints("q_lens", q_lens)

        def fill(buffer: _host.PlanBuffer | None, gpu: bool) -> _host.PlanBuffer:
            return self._forest.plan(host_branches, host_q_lens, num_q_heads, num_kv_heads, shape.window, gpu, buffer)

        return make_plan(fill, shape, device, out)

    def stats(self) -> ForestStats:
        """Count branches, pages and tokens. O(branches)."""
        return ForestStats(*self._forest.stats())


def _ints(name: str, values: Ints) -> Any:
    """The argument for the host module: a tensor as a buffer, anything else unchanged."""
    if not isinstance(values, Tensor):
        return values
    if values.device.type != "cpu":
        raise ValueError(f"{name}: expected ints on the CPU, got a tensor on {values.device}")
    return host_ints(name, values)


def _tensor(buffer: _host.IntBuffer) -> Tensor:
    """An int32 tensor over a host buffer, uncopied."""
    return (
        torch.frombuffer(buffer, dtype=torch.int32) if len(buffer) else torch.empty(0, dtype=torch.int32, device="cpu")
    )
