"""The attention plan: for the rows of q, the keys that they read, and the pieces in which they read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _host, checks

Ints: TypeAlias = "Sequence[int] | Tensor"

# Ints of a segment and of a task (csrc/include/plan.h).
SEGMENT_INTS, TASK_INTS = _host.SEGMENT_INTS, _host.TASK_INTS


class _Source(NamedTuple):
    """The memory behind a plan's tensors."""

    buffer: _host.PlanBuffer  # where the planner writes
    host: Tensor  # over the same memory
    flat: Tensor  # on the plan's device; `host` itself on a CPU


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """How `tree_attention` reads the KV cache; made by `KVForest.plan` and `plan_attention`.

    A plan serves every layer of a forward that has the same window or a narrower one. It is a pytree: its tensors are
    the leaves, so it passes into a compiled function. All tensors are int32 and lie in one allocation; a tensor may be
    longer than what is used of it.

    "Row" below means a position in ``rows``: query rows in depth-first order of the tree, in which the rows that read
    any one page are next to each other.

    Attributes
    ----------
    rows
        [T]: row of q and out that each row stands for; a permutation.
    positions
        [T]: the row's position in its branch; it sees the keys at positions up to its own. -1: it sees none.
    pages
        [>= used]: page numbers.
    segments
        [>= used, 7]: page_begin (in ``pages``: the page of the first token), start (position of the first token, which
        is token ``start % page_size`` of that page), length (tokens), row_begin, row_end: these keys are read by these
        rows, each up to its position; slot (of row_begin), fresh: row r's state over these keys is in slot + r -
        row_begin, begun here (1) or continued (0); slot -1: it stays in the task and joins the state of the task's own.
    tasks
        [>= used, 5]: seg_begin, seg_end, row_begin, row_end (hull of its segments' rows), slot (of row_begin). The unit
        of work, for one KV head, dearest first. The task's own state of a row is its result if ``merge_slots`` has
        nothing for the row, else it goes to slot + row - row_begin.
    merge_indptr, merge_slots
        [T + 1], [>= used]: row r's partial states are ``merge_slots[merge_indptr[r]:merge_indptr[r + 1]]``, in
        ascending order of position: ``2 * slot + c``; c = 1: it continues the chunk of the state before it. A row with
        position -1 has no keys: its output is 0 and its lse -inf.
    sizes
        [4]: segments, tasks, slots and pages in use.
    page_size, num_q_heads, num_kv_heads, head_dim, window
        What the plan was made for; window 0: none. It serves that window and narrower ones.
    max_slots
        Room for partial states: at least the slots in use, a power of two.
    """

    rows: Tensor
    positions: Tensor
    pages: Tensor
    segments: Tensor
    tasks: Tensor
    merge_indptr: Tensor
    merge_slots: Tensor
    sizes: Tensor
    page_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    max_slots: int
    _source: _Source | None = field(default=None, init=False, repr=False)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={getattr(self, name)}" for name in _NUMBERS)
        return f"AttentionPlan(num_rows={self.num_rows}, {numbers}, device={self.rows.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle has the same tensors and numbers, but no planner's memory behind them."""
        tensors, numbers = _flatten(self)
        return AttentionPlan, (*tensors, *numbers)

    @property
    def num_rows(self) -> int:
        """T: rows of q and out."""
        return int(self.rows.shape[0])


_TENSORS = ("rows", "positions", "pages", "segments", "tasks", "merge_indptr", "merge_slots", "sizes")
_NUMBERS = ("page_size", "num_q_heads", "num_kv_heads", "head_dim", "window", "max_slots")


def _flatten(plan: AttentionPlan) -> tuple[list[Tensor], tuple[int, ...]]:
    return [getattr(plan, name) for name in _TENSORS], tuple(getattr(plan, name) for name in _NUMBERS)


def _flatten_with_keys(plan: AttentionPlan) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], tuple[int, ...]]:
    tensors, numbers = _flatten(plan)
    return [(pytree.GetAttrKey(name), tensor) for name, tensor in zip(_TENSORS, tensors, strict=True)], numbers


def _unflatten(tensors: Any, numbers: Any) -> AttentionPlan:
    return AttentionPlan(*tensors, *numbers)


pytree.register_pytree_node(
    AttentionPlan,
    _flatten,
    _unflatten,
    serialized_type_name="tts_kernels.AttentionPlan",
    flatten_with_keys_fn=_flatten_with_keys,
)


def plan_attention(
    page_table: Tensor,
    kv_lens: Ints,
    q_lens: Ints | None = None,
    *,
    page_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None = None,
    device: torch.device | str | None = None,
    out: AttentionPlan | None = None,
) -> AttentionPlan:
    """Plan `tree_attention` over another framework's page table; the sharing of pages is found in it.

    Two branches share a page if both have it in the same column and agree in all columns before.

    Parameters
    ----------
    page_table
        [B, max] int32 or int64: pages of each branch in order. Entries behind a branch's length may be anything. A
        table that is not on the CPU is copied there, which waits for its device.
    kv_lens
        [B]: tokens of each branch.
    q_lens
        [B]: query rows of each, the last of which is the branch's newest token; at most its length. None: one each (an
        empty branch's row has no keys).
    page_size
        Token slots of a page.
    num_q_heads, num_kv_heads, head_dim
        Hq, a multiple of Hkv; Hkv; D.
    window
        w: a row at position i sees positions i - w + 1 to i; no other keys are planned. The plan serves attention with
        that window or a narrower one.
    device
        Where the plan's tensors go, and for which the work is cut; by default torch's default
        device, or that of ``out``.
    out
        An earlier plan for the same numbers and as many rows, whose tensors are filled again.

    Returns
    -------
    AttentionPlan
        Serves every layer of a forward; ``out`` itself if it was given.

    Raises
    ------
    TypeError
        For anything but ints.
    ValueError
        For shapes, lengths or row counts that do not fit each other, or an ``out`` that does not fit (nothing is
        written then).
    IndexError
        For a negative page within a branch's length.

    Notes
    -----
    O(B + rows + used entries of the table): a radix tree over its rows.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> table = torch.tensor([[7, 3], [7, 4], [2, 0]])
    >>> plan = tk.plan_attention(table, [110, 100, 20], page_size=64, num_q_heads=8, num_kv_heads=8, head_dim=64)
    >>> plan.segments[: plan.sizes[0], 1:5].tolist()  # start, length, row_begin, row_end
    [[0, 64, 0, 2], [64, 46, 0, 1], [64, 36, 1, 2], [0, 20, 2, 3]]
    """
    checks.tensor("page_table", page_table, checks.INDEX, ["B", "max"])
    shape = PlanShape.checked(page_size, num_q_heads, num_kv_heads, head_dim, window)
    table = page_table.cpu()
    host_kv_lens = _to_host("kv_lens", kv_lens)
    host_q_lens = None if q_lens is None else _to_host("q_lens", q_lens)

    def fill(buffer: _host.PlanBuffer | None, gpu: bool) -> _host.PlanBuffer:
        return _host.plan_table(
            table.data_ptr(),
            table.element_size(),
            (table.shape[0], table.shape[1]),
            (table.stride(0), table.stride(1)),
            host_kv_lens,
            host_q_lens,
            page_size,
            num_q_heads,
            num_kv_heads,
            shape.window,
            gpu,
            buffer,
        )

    return make_plan(fill, shape, device, out)


class PlanShape(NamedTuple):
    """The numbers that a plan is made for."""

    page_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    window: int  # 0: none

    @staticmethod
    def checked(page_size: int, num_q_heads: int, num_kv_heads: int, head_dim: int, window: int | None) -> PlanShape:
        """TypeError, ValueError."""
        if window is not None:
            checks.integer("window", window, 1)
        shape = PlanShape(page_size, num_q_heads, num_kv_heads, head_dim, window or 0)
        for name, value in zip(shape._fields[:-1], shape[:-1], strict=True):
            checks.integer(name, value, 1, 2**31)
        if num_q_heads % num_kv_heads:
            raise ValueError(f"num_q_heads: expected a multiple of num_kv_heads = {num_kv_heads}, got {num_q_heads}")
        return shape


def make_plan(
    fill: Callable[[_host.PlanBuffer | None, bool], _host.PlanBuffer],
    shape: PlanShape,
    device: torch.device | str | None,
    out: AttentionPlan | None,
) -> AttentionPlan:
    """The plan that ``fill`` makes.

    ``fill(None, gpu)`` returns a new buffer, ``fill(buffer, gpu)`` writes an old one again; gpu says whose kernels the
    work is cut for.
    """
    if out is None:
        device = torch.get_default_device() if device is None else torch.device(device)
        return _wrap(fill(None, _is_gpu(device)), shape, device)
    source = _reusable(out, shape, device)
    fill(source.buffer, _is_gpu(source.flat.device))
    if source.flat is not source.host:
        source.flat.copy_(_staged(source.host, source.flat.device), non_blocking=True)
    return out


def _is_gpu(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta")


def _staged(host: Tensor, device: torch.device) -> Tensor:
    """What to copy to a device: for a GPU pinned memory, so that the host goes on and may refill its own meanwhile."""
    return host.pin_memory() if _is_gpu(device) else host


def _wrap(buffer: _host.PlanBuffer, shape: PlanShape, device: torch.device) -> AttentionPlan:
    host = torch.frombuffer(buffer, dtype=torch.int32)
    flat = _staged(host, device).to(device, non_blocking=True)
    fields: tuple[Tensor, ...] = torch.split_with_sizes(flat, buffer.lengths)
    sizes, rows, positions, merge_indptr, tasks, segments, merge_slots, pages = fields
    plan = AttentionPlan(
        rows=rows,
        positions=positions,
        pages=pages,
        segments=segments.view(-1, SEGMENT_INTS),
        tasks=tasks.view(-1, TASK_INTS),
        merge_indptr=merge_indptr,
        merge_slots=merge_slots,
        sizes=sizes,
        **shape._asdict(),
        max_slots=buffer.max_slots,
    )
    object.__setattr__(plan, "_source", _Source(buffer, host, flat))
    return plan


def _reusable(out: AttentionPlan, shape: PlanShape, device: torch.device | str | None) -> _Source:
    """The memory of ``out``, if a plan of this shape may be written to it. TypeError, ValueError."""
    if not isinstance(out, AttentionPlan):
        raise TypeError(f"out: expected an AttentionPlan, got {type(out).__name__}")
    for name, value in shape._asdict().items():
        if getattr(out, name) != value:
            raise ValueError(f"out: expected a plan for {name} = {value}, got one for {getattr(out, name)}")
    if device is not None:
        device = torch.device(device)
        here = out.rows.device
        if device.type != here.type or device.index not in (None, here.index):
            raise ValueError(f"out: expected a plan on {device}, got one on {here}")
    if out._source is None:
        raise ValueError("out: expected a plan from KVForest.plan or plan_attention, got a copy of one")
    return out._source


def host_ints(name: str, values: Tensor) -> Any:
    """A CPU tensor of ints [n] as the host module takes it, a buffer. TypeError, ValueError."""
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name}: expected ints, got {checks.describe(values)}")
    if values.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got {checks.describe(values)}")
    try:
        return values.numpy()
    except RuntimeError:  # torch runs without NumPy
        return values.tolist()


def _to_host(name: str, values: Ints) -> Any:
    return host_ints(name, values.cpu()) if isinstance(values, Tensor) else values
