"""tree_attention: attention of many branches over a tree of KV pages, each shared token read once for all of them.

    q [T, Hq, D], caches [P, page_size, Hkv, D], plan  ->  out [T, Hq, D], lse [T, Hq]

Two launches. A program of the first takes a task of the plan (csrc/host/planner.h) and a KV head, BLOCK_M of the
task's rows x query heads of the group at a time (a GPU's plan has one such tile a task); the grid has as many as the
plan's tables have room for, as how many are in use is known to the device only. It walks the keys of the task's
segments BLOCK_N at a time with an online softmax in units of log2: (max, sum, sum of weighted values), the empty
state being (-inf, 0, 0). A row that this task alone reads is finished here; else its state goes to the task's slots,
and the second launch merges each row's states in the plan's order. Nothing depends on which program runs when.

A key that a row must not see may hold anything. Its score is replaced by -inf; its value, though its weight is 0,
would turn an infinity or NaN into NaN, so blocks in which some row does not see some key multiply only finite values,
and add the others, if there are any, key by key to the rows that see them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import SEGMENT_INTS as _SEGMENT_INTS
from ..plan import TASK_INTS as _TASK_INTS
from .configs import config
from .numerics import LN2, LOG2E, dot, fused, narrow, tanh

SEGMENT_INTS, TASK_INTS = tl.constexpr(_SEGMENT_INTS), tl.constexpr(_TASK_INTS)

# Pieces of one buffer (a plan's tables, the partial states), which begin at any multiple of 4 bytes: a kernel compiled
# for each alignment of each piece would be compiled anew for nearly every plan.
PIECES = ("rows", "positions", "pages", "segments", "tasks", "merge_indptr", "merge_slots", "sizes", "part_sum")


@triton.jit(do_not_specialize=PIECES)
def task_kernel(
    q, k_cache, v_cache, rows, positions, pages, segments, tasks, merge_indptr, merge_slots, sizes,
    out, lse, part_out, part_max, part_sum,
    page_size, num_q_heads, group, scale, softcap, window,
    q_row, q_head, q_element, k_page, k_slot, k_head, v_page, v_slot, v_head,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    if task < tl.load(sizes + 1):
        seg_begin = tl.load(tasks + task * TASK_INTS)
        seg_end = tl.load(tasks + task * TASK_INTS + 1)
        row_begin = tl.load(tasks + task * TASK_INTS + 2)
        row_end = tl.load(tasks + task * TASK_INTS + 3)
        first_slot = tl.load(tasks + task * TASK_INTS + 4)
        states = (row_end - row_begin) * group
        for start in range(0, states, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            d = tl.arange(0, BLOCK_D)
            there = m < states
            r = row_begin + m // group
            row = tl.load(rows + r, mask=there, other=0).to(tl.int64)
            position = tl.load(positions + r, mask=there, other=-1)
            head = kv_head * group + m % group
            queries = tl.load(
                q + (row * q_row + head * q_head)[:, None] + (d.to(tl.int64) * q_element)[None, :],
                mask=there[:, None] & (d < DIM)[None, :],
                other=0.0,
            )
            first = row_begin + start // group  # rows of this tile: first to last
            last = row_begin + (tl.minimum(start + BLOCK_M, states) - 1) // group
            least = tl.min(tl.where(there, position, 2147483647), 0)
            most = tl.max(position, 0)

            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            factor = tl.full([BLOCK_M, 1], scale * LOG2E, tl.float32)
            for segment in range(seg_begin, seg_end):
                page_begin = tl.load(segments + segment * SEGMENT_INTS)
                token_begin = tl.load(segments + segment * SEGMENT_INTS + 1)
                length = tl.load(segments + segment * SEGMENT_INTS + 2)
                seg_first = tl.load(segments + segment * SEGMENT_INTS + 3)
                seg_last = tl.load(segments + segment * SEGMENT_INTS + 4) - 1
                if (seg_first <= last) & (first <= seg_last):
                    reads = there & (r >= seg_first) & (r <= seg_last)
                    all_rows = (seg_first <= first) & (last <= seg_last)
                    for n0 in range(0, tl.minimum(length, most - token_begin + 1), BLOCK_N):
                        n = n0 + tl.arange(0, BLOCK_N)
                        inside = n < length
                        page = tl.load(pages + page_begin + n // page_size, mask=inside, other=0).to(tl.int64)
                        slot = (n % page_size).to(tl.int64)
                        at = token_begin + n
                        sees = reads[:, None] & inside[None, :] & (at[None, :] <= position[:, None])
                        all_see = all_rows & (n0 + BLOCK_N <= length) & (token_begin + n0 + BLOCK_N - 1 <= least)
                        if WINDOW:
                            sees = sees & (at[None, :] > position[:, None] - window)
                            all_see = all_see & (token_begin + n0 > most - window)

                        keys = tl.load(
                            k_cache + (page * k_page + slot * k_slot + kv_head * k_head)[None, :] + d[:, None],
                            mask=inside[None, :] & (d < DIM)[:, None],
                            other=0.0,
                        )
                        raw = dot(queries, keys, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
                        x = softcap * tanh(raw * scale / softcap) * LOG2E if SOFTCAP else raw * factor
                        higher = tl.maximum(top, tl.max(tl.where(sees, x, float("-inf")), 1))
                        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf less itself would be NaN
                        # A large score rounded before the maximum is taken off would cost its weight that error.
                        below = x - base[:, None] if SOFTCAP else fused(raw, factor, -base[:, None])
                        weights = tl.where(sees, tl.exp2(below), 0.0)
                        shrink = tl.exp2(top - base)
                        total = total * shrink + tl.sum(weights, 1)
                        acc = acc * shrink[:, None]
                        top = higher

                        values = tl.load(
                            v_cache + (page * v_page + slot * v_slot + kv_head * v_head)[:, None] + d[None, :],
                            mask=inside[:, None] & (d < DIM)[None, :],
                            other=0.0,
                        )
                        weights = narrow(weights, v_cache.dtype.element_ty)
                        if not all_see:
                            wide = values.to(tl.float32)
                            finite = (wide - wide) == 0.0
                            if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
                                for j in range(BLOCK_N):
                                    mine = (tl.arange(0, BLOCK_N) == j)[None, :]
                                    weight = tl.sum(tl.where(mine & sees, weights.to(tl.float32), 0.0), 1)
                                    seen = tl.sum((mine & sees).to(tl.int32), 1) > 0
                                    column = (tl.arange(0, BLOCK_N) == j)[:, None] & (finite == 0)
                                    odd = tl.sum(tl.where(column, wide, 0.0), 0)
                                    acc += tl.where(
                                        seen[:, None] & ((odd - odd) != 0.0)[None, :],
                                        weight[:, None] * odd[None, :],
                                        0.0,
                                    )
                                values = tl.where(finite, values, tl.zeros_like(values))
                        acc = dot(weights, values, acc)

            begin = tl.load(merge_indptr + r, mask=there, other=0)
            parts = tl.load(merge_indptr + r + 1, mask=there, other=0) - begin
            part = first_slot + m // group
            only = (parts == 1) & (tl.load(merge_slots + begin, mask=there & (parts == 1), other=-1) == part)
            result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            final = (row * num_q_heads + head)[:, None] * DIM + d[None, :]
            tl.store(
                out + final, narrow(result, out.dtype.element_ty), mask=(there & only)[:, None] & (d < DIM)[None, :]
            )
            tl.store(lse + row * num_q_heads + head, (top + tl.log2(total)) * LN2, mask=there & only)
            state = part.to(tl.int64) * num_q_heads + head
            tl.store(
                part_out + state[:, None] * DIM + d[None, :], acc, mask=(there & ~only)[:, None] & (d < DIM)[None, :]
            )
            tl.store(part_max + state, top, mask=there & ~only)
            tl.store(part_sum + state, total, mask=there & ~only)


@triton.jit(do_not_specialize=PIECES)
def merge_kernel(
    rows, merge_indptr, merge_slots, out, lse, part_out, part_max, part_sum, num_q_heads,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    begin = tl.load(merge_indptr + r)
    end = tl.load(merge_indptr + r + 1)
    if end - begin != 1:
        row = tl.load(rows + r).to(tl.int64)
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        d = tl.arange(0, BLOCK_D)
        there = head < num_q_heads
        cells = there[:, None] & (d < DIM)[None, :]
        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        for i in range(begin, end):
            state = tl.load(merge_slots + i).to(tl.int64) * num_q_heads + head
            part_top = tl.load(part_max + state, mask=there, other=float("-inf"))
            higher = tl.maximum(top, part_top)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            ours = tl.exp2(top - base)
            theirs = tl.exp2(part_top - base)
            total = total * ours + tl.load(part_sum + state, mask=there, other=0.0) * theirs
            values = tl.load(part_out + state[:, None] * DIM + d[None, :], mask=cells, other=0.0)
            acc = acc * ours[:, None] + values * theirs[:, None]
            top = higher
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out + (row * num_q_heads + head)[:, None] * DIM + d[None, :], narrow(result, out.dtype.element_ty), cells
        )
        tl.store(lse + row * num_q_heads + head, (top + tl.log2(total)) * LN2, mask=there)


def tree_attention(
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
    window: int,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [T, Hq]."""
    if sinks is not None:
        raise NotImplementedError("sinks: expected None, as Triton's kernel knows none, got a tensor")
    num_rows, num_q_heads, dim = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    if q.numel() == 0:
        return out, lse.fill_(-torch.inf)
    plan = [t.contiguous() for t in (rows, positions, pages, segments, tasks, merge_indptr, merge_slots)]
    part_out = q.new_empty((max_slots, num_q_heads, dim), dtype=torch.float32)
    part_max, part_sum = q.new_empty((2, max_slots, num_q_heads), dtype=torch.float32)
    group, block_d = num_q_heads // num_kv_heads, max(16, triton.next_power_of_2(dim))
    wide = block_d > 128 or q.dtype == torch.float32
    options = config("tree_attention_wide" if wide else "tree_attention", q.device)
    block_m = 16 if num_rows * group <= 16 or block_d > 128 else 64 if num_rows * group > 32 else 32
    if tasks.shape[0]:
        task_kernel[(tasks.shape[0], num_kv_heads)](
            q, k_cache, v_cache, *plan, sizes, out, lse, part_out, part_max, part_sum,
            page_size, num_q_heads, group, scale, softcap, window,
            *q.stride(), *k_cache.stride()[:3], *v_cache.stride()[:3],
            SOFTCAP=softcap != 0, WINDOW=window > 0, DIM=dim, BLOCK_D=block_d, BLOCK_M=block_m, **options,
        )  # fmt: skip
    block_h = min(8, triton.next_power_of_2(num_q_heads))
    merge_kernel[(num_rows, triton.cdiv(num_q_heads, block_h))](
        plan[0], plan[5], plan[6], out, lse, part_out, part_max, part_sum, num_q_heads,
        DIM=dim, BLOCK_D=block_d, BLOCK_H=block_h, **config("rows", q.device),
    )  # fmt: skip
    return out, lse
