"""Attention of many branches over a tree of KV pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op
from ..plan import SEGMENT_INTS, TASK_INTS

if TYPE_CHECKING:
    from ..plan import AttentionPlan


@overload
def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> Tensor: ...


@overload
def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend each query row to the keys of its branch. A token that many branches share is read once for all of them.

    ``out[r, h] = softmax(cap(scale * q[r, h] @ K.T)) @ V`` over the keys that row r sees: those of its branch at
    positions up to its own, and after its own - window.

    Parameters
    ----------
    q
        [T, Hq, D] float: the packed query rows of the plan's branches. Rows and heads may be strided.
    k_cache, v_cache
        [P, page_size, Hkv, D], of q's dtype, or fp8 or quantised as in `append_kv_`: one layer's pages. May be strided
        views, last dimension contiguous. Slots that no row sees may hold anything, NaN included.
    plan
        A plan from `KVForest.plan` or `plan_attention`. One plan can be used for every layer.
    scale
        Factor of the scores; D**-0.5 by default.
    softcap
        s > 0: scores x become ``s * tanh(x / s)``; 0: scores stay unchanged.
    window
        w: a row at position i sees positions i - w + 1 to i; None: all up to i. At most the plan's, if that has one.
    sinks
        [Hq] float32: for each query head, a logit that is part of its softmax but has no value (GPT-OSS); None: none.
    return_lse
        Whether to return the log-sum-exp, too.
    k_scale, v_scale, k_zero, v_zero
        The scales and zeros of quantised caches: [P, page_size, Hkv] float16, contiguous. int8 caches have scales, int4
        caches also zeros, plain caches neither.

    Returns
    -------
    out : Tensor
        [T, Hq, D] of q's dtype; 0 for a row without keys.
    lse : Tensor
        [T, Hq] float32, natural log, after scale and softcap, including the sink; for a row without keys it is -inf, or
        the sink. Only with `return_lse`.

    Raises
    ------
    TypeError
        For a wrong dtype, or if scales or zeros do not match the caches' format.
    ValueError
        For a wrong shape, device or option, or a plan made for other sizes.
    IndexError
        For a page of the plan that the caches do not have.

    Notes
    -----
    With N unique and L logical tokens (counted once for each branch): reads 2 N Hkv D elements, and at most 63 tokens
    before each fork once more for each child; O(L Hq D) operations, one launch and one for merging. The tree is walked
    as in DeFT (arXiv 2404.00242) and FastTree (MLSys 2025); partial results merge as in "FlashInfer" (arXiv
    2501.01005). A row's result depends on its query, its position, the options and the keys and values that it sees,
    and on nothing else, to the bit within a backend and an instruction set: not on other rows, on who shares a key, on
    how q_lens cuts a text into forwards, on pages, on plans or on threads. Keys are summed up in blocks of 64 and
    chunks of 512 (256 on a GPU) at absolute positions, in ascending order.
    Quantised and fp8 heads become elements of q's dtype once for all rows that share them. fp8 is for GPUs.
    bfloat16 products are accumulated in float32; weights are rounded to bfloat16 before they meet the values where the
    processor multiplies pairs of bfloat16.

    Examples
    --------
    Two branches share a token and have one of their own each, in pages of one token:

    >>> import torch, tts_kernels as tk
    >>> plan = tk.plan_attention(torch.tensor([[0, 1], [0, 2]]), torch.tensor([2, 2]), page_size=1,
    ...                          num_q_heads=1, num_kv_heads=1, head_dim=2)
    >>> k = torch.zeros(3, 1, 1, 2)
    >>> v = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1).expand(3, 1, 1, 2).contiguous()
    >>> tk.tree_attention(torch.ones(2, 1, 2), k, v, plan)[:, 0, 0]
    tensor([1.5000, 2.5000])
    """
    if q.shape[1:] != (plan.num_q_heads, plan.head_dim):
        checks.tensor("q", q, shape=["T", plan.num_q_heads, plan.head_dim])  # as the plan was made for
    if scale is None:
        scale = float(q.shape[-1]) ** -0.5
    checks.number("scale", scale)
    checks.number("softcap", softcap, 0.0)
    if window is not None:
        checks.integer("window", window, 1)
    check_window(plan, "window", window or 0)
    out, lse = tree_attention_op(
        q,
        k_cache,
        v_cache,
        plan.rows,
        plan.positions,
        plan.pages,
        plan.segments,
        plan.tasks,
        plan.merge_indptr,
        plan.merge_slots,
        plan.sizes,
        plan.page_size,
        plan.num_kv_heads,
        plan.max_slots,
        float(scale),
        float(softcap),
        window or 0,
        sinks,
        k_scale,
        v_scale,
        k_zero,
        v_zero,
    )
    return (out, lse) if return_lse else out


def check_window(plan: AttentionPlan, name: str, window: int) -> None:
    """A window (0: none) that the plan serves. ValueError."""
    if plan.window and not 0 < window <= plan.window:
        got = window or "none"
        raise ValueError(f"{name}: expected at most {plan.window}, the window that the plan was made for, got {got}")


_INT32 = (torch.int32,)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    positions: Tensor,
    pages: Tensor,
    segments: Tensor,
    tasks: Tensor,
    merge_indptr: Tensor,
    merge_slots: Tensor,
    sizes: Tensor,
    page_size: int,
    num_kv_heads: int,
    max_slots: int,
    scale: float,
    softcap: float,
    window: int,  # noqa: ARG001
    sinks: Tensor | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> None:
    checks.tensor("q", q, shape=["T", "Hq", "D"])
    head_dim = q.shape[2]
    if head_dim < 1:
        raise ValueError(f"q: expected heads of at least one element, got {checks.describe(q)}")
    beside = {"k_scale": k_scale, "v_scale": v_scale, "k_zero": k_zero, "v_zero": v_zero}
    shape: list[int | str] = ["P", page_size, num_kv_heads, head_dim]
    checks.caches("k_cache", k_cache, "v_cache", v_cache, q.dtype, shape, q.device, beside)
    if num_kv_heads < 1 or q.shape[1] % num_kv_heads:
        raise ValueError(f"q: expected a multiple of {num_kv_heads} heads, got {q.shape[1]}")
    checks.number("scale", scale)
    checks.number("softcap", softcap, 0.0)
    if sinks is not None:
        checks.tensor("sinks", sinks, (torch.float32,), [q.shape[1]], q.device)
        if not sinks.is_contiguous():
            raise ValueError(f"sinks: expected a contiguous tensor, got strides {sinks.stride()}")
    num_rows = q.shape[0]
    checks.tensor("plan.rows", rows, _INT32, ["T"], q.device)
    if rows.shape[0] != num_rows:
        raise ValueError(f"q: expected {rows.shape[0]} rows, as the plan has, got {num_rows}")
    checks.tensor("plan.positions", positions, _INT32, [num_rows], q.device)
    checks.tensor("plan.pages", pages, _INT32, ["n"], q.device)
    checks.tensor("plan.segments", segments, _INT32, ["n", SEGMENT_INTS], q.device)
    checks.tensor("plan.tasks", tasks, _INT32, ["n", TASK_INTS], q.device)
    checks.tensor("plan.merge_indptr", merge_indptr, _INT32, [num_rows + 1], q.device)
    checks.tensor("plan.merge_slots", merge_slots, _INT32, ["n"], q.device)
    checks.tensor("plan.sizes", sizes, _INT32, [4])
    if checks.readable(rows, pages, segments, tasks, merge_indptr, merge_slots, sizes):
        _check_values(
            k_cache.shape[0], rows, pages, segments, tasks, merge_indptr, merge_slots, sizes, page_size, max_slots
        )


def _check_values(
    num_pages: int,
    rows: Tensor,
    pages: Tensor,
    segments: Tensor,
    tasks: Tensor,
    merge_indptr: Tensor,
    merge_slots: Tensor,
    sizes: Tensor,
    page_size: int,
    max_slots: int,
) -> None:
    """The plan's indices: pages by the caches, the rest by the plan itself."""
    num_rows = rows.shape[0]
    used_segments, used_tasks, used_slots, used_pages = sizes.tolist()
    capacity = (segments.shape[0], tasks.shape[0], max_slots, pages.shape[0])
    if any(not 0 <= n <= room for n, room in zip(sizes.tolist(), capacity, strict=True)):
        raise ValueError(f"plan.sizes: expected values in [0, {list(capacity)}], got {sizes.tolist()}")
    checks.index_range("plan.pages", pages[:used_pages], 0, num_pages)
    if not torch.equal(rows.sort().values, torch.arange(num_rows, dtype=torch.int32, device=rows.device)):
        raise ValueError(f"plan.rows: expected a permutation of 0..{num_rows - 1}, got another")
    total = int(merge_indptr[-1])
    if total > merge_slots.shape[0]:
        raise ValueError(f"plan.merge_indptr: expected offsets up to {merge_slots.shape[0]}, got {total}")
    checks.indptr("plan.merge_indptr", merge_indptr, total)
    checks.index_range("plan.merge_slots", merge_slots[:total], 0, 2 * used_slots)

    def is_slot(slot: int, count: int) -> bool:
        return slot >= 0 and slot + count <= used_slots

    for i, (begin, start, length, first, last, slot, _) in enumerate(segments[:used_segments].tolist()):
        fits = begin >= 0 and begin + -(-(start % page_size + length) // page_size) <= used_pages
        good = fits and start >= 0 and length > 0 and 0 <= first < last <= num_rows
        if not (good and (slot == -1 or is_slot(slot, last - first))):
            raise ValueError(
                f"plan.segments: expected pages, rows and slots of the plan, got {segments[i].tolist()} at index {i}"
            )
    for i, (begin, end, first, last, slot) in enumerate(tasks[:used_tasks].tolist()):
        if not (0 <= begin <= end <= used_segments and 0 <= first <= last <= num_rows):
            raise ValueError(
                f"plan.tasks: expected segments and rows of the plan, got {tasks[i].tolist()} at index {i}"
            )
        for *_, row_begin, row_end, own, _ in segments[begin:end].tolist():
            if not (row_begin >= first and row_end <= last):
                raise ValueError(
                    f"plan.tasks: expected rows that hold those of its segments, got {tasks[i].tolist()} at index {i}"
                )
            merged = own < 0 and int(merge_indptr[row_begin]) < int(merge_indptr[row_end])
            if merged and not is_slot(slot, last - first):
                raise ValueError(f"plan.tasks: expected slots of the plan, got {tasks[i].tolist()} at index {i}")


def _fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


tree_attention_op = Op(
    "tree_attention",
    reference=reference.tree_attention,
    check=_check,
    fake=_fake,
    no_cpp_for=lambda *args: checks.no_cpp_for(*args[1:3]),
)
