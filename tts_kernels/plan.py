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

# Numbers of ints in a segment and in a task (csrc/include/plan.h).
SEGMENT_INTS, TASK_INTS = _host.SEGMENT_INTS, _host.TASK_INTS


class _Source(NamedTuple):
    """The memory of a plan's tensors."""

    buffer: _host.PlanBuffer  # the planner writes here
    host: Tensor  # a tensor over the same memory
    flat: Tensor  # on the plan's device; `host` itself on a CPU


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """How `tree_attention` reads the KV cache; made by `KVForest.plan` and `plan_attention`.

    A plan can be used in every layer of a forward that has the same window or a narrower one. It is a pytree with its
    tensors as the leaves, so it can be passed into a compiled function. All tensors are int32 and lie in one
    allocation. A tensor may be longer than its used part.

    "Row" below means a position in ``rows``. These are the query rows in depth-first order of the tree. In this order,
    rows that read the same page are next to each other.

    Attributes
    ----------
    rows
        [T]: the row of q and out at each position; a permutation.
    positions
        [T]: the row's position in its branch. It sees the keys up to this position; -1: it sees none.
    pages
        [>= used]: page numbers.
    segments
        [>= used, 7]: a range of keys, and the rows that read it, each up to its position. page_begin (index in
        ``pages`` of the first token's page), start (position of the first token, which is token ``start % page_size``
        of that page), length (tokens), row_begin, row_end. slot (of row_begin), fresh: the state of row r over these
        keys is in slot + r - row_begin, and it begins here (1) or is continued (0). slot -1: the state stays in the
        task and is merged into the task's own state.
    tasks
        [>= used, 5]: seg_begin, seg_end, row_begin, row_end (hull of its segments' rows), slot (of row_begin). A task
        is the unit of work for one KV head; the most expensive tasks come first. If ``merge_slots`` has nothing for a
        row, the task's own state of the row is its result. Otherwise it goes to slot + row - row_begin.
    merge_indptr, merge_slots
        [T + 1], [>= used]: the partial states of row r are ``merge_slots[merge_indptr[r]:merge_indptr[r + 1]]``, in
        ascending order of position. An entry is ``2 * slot + c``; c = 1: it continues the chunk of the state before it.
        A row with position -1 has no keys: its output is 0 and its lse -inf.
    sizes
        [4]: the used numbers of segments, tasks, slots and pages.
    page_size, num_q_heads, num_kv_heads, head_dim, window
        The numbers that the plan was made for; window 0: none. It can be used with this window and narrower ones.
    max_slots
        Room for partial states: at least the used slots, a power of two.
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
        """A copy or a pickle has the same tensors and numbers, but not the planner's memory."""
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
    """Plan `tree_attention` over another framework's page table. Shared pages are found in the table.

    Two branches share a page if both have it in the same column, and all columns before are equal.

    Parameters
    ----------
    page_table
        [B, max] int32 or int64: pages of each branch in order. Entries after a branch's length are ignored. A table on
        another device is copied to the CPU, which waits for its device.
    kv_lens
        [B]: number of tokens of each branch.
    q_lens
        [B]: query rows of each branch. The last row is the branch's newest token, and the number is at most its length.
        None: one row each (the row of an empty branch has no keys).
    page_size
        Number of token slots in a page.
    num_q_heads, num_kv_heads, head_dim
        Hq, a multiple of Hkv; Hkv; D.
    window
        w: a row at position i sees positions i - w + 1 to i, and no other keys are planned. The plan can be used for
        attention with this window or a narrower one.
    device
        The device for the plan's tensors, for which the work is cut; by default torch's default device, or that of
        ``out``.
    out
        An earlier plan for the same numbers and the same number of rows, whose tensors are filled again.

    Returns
    -------
    AttentionPlan
        Can be used in every layer of a forward. If ``out`` was given, it is returned.

    Raises
    ------
    TypeError
        For anything but ints.
    ValueError
        If shapes, lengths or row counts do not fit together, or ``out`` does not fit (then nothing is written).
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
    """The sizes that a plan is made for."""

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
    """Make a plan with ``fill``.

    ``fill(None, gpu)`` returns a new buffer, ``fill(buffer, gpu)`` fills an old one again. gpu: whether the work is cut
    for the kernels of a GPU.
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
    """The tensor to copy to a device. For a GPU it is in pinned memory, so that the host can refill its own at once."""
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
    """The memory of ``out``, if a plan with these sizes may be written to it. TypeError, ValueError."""
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
    """A CPU tensor of ints [n] as a buffer for the host module. TypeError, ValueError."""
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
