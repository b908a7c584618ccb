"""tree_attention: attention of many branches over a tree of KV pages, each shared token read once for all of them.

    q [T, Hq, D], caches [P, page_size, Hkv, D], plan  ->  out [T, Hq, D], lse [T, Hq]

Two launches. A program of the first launch takes a task of the plan (csrc/host/planner.h) and a KV head, and BLOCK_M of
the task's rows x query heads of the group at a time. The grid is as large as the plan's tables, because only the device
knows how many of their entries are in use. csrc/include/plan.h defines the order of all sums. A state is (max in units
of log2, sum, sum of weighted values), and the empty state is (-inf, 0, 0). Each block of 64 keys becomes a state,
BLOCK_N keys at a time. It is merged into the state of its chunk, and this one joins the task's own state or goes to a
slot. If only this task reads a row, the row is finished here. The second launch merges the states of each other row in
the plan's order. Tiles have one size whatever the plan, so a row's sums do not depend on other rows. Nothing depends on
which program runs when.

A key that a row must not see may hold anything. Its score is replaced by -inf, but its value, though its weight is 0,
would turn an infinity or NaN into NaN. So if some row does not see some key of a block, the block's product uses only
finite values. Values that are not finite are then added, key by key, to the rows that see them.

Bytes of an fp8 cache, and codes of a quantised one, become elements of q's type when a block is loaded, once for all
rows of the tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import SEGMENT_INTS, TASK_INTS
from .append_kv import BITS, FP8
from .configs import config
from .numerics import LN2, LOG2E, dot, fused, narrow, of_e4m3, tanh

SEGMENT = tl.constexpr(SEGMENT_INTS)
TASK = tl.constexpr(TASK_INTS)
KEY_BLOCK = tl.constexpr(64)  # kKeyBlock of csrc/include/plan.h
# Targets for the state of a row's chunk that are not slots.
NOWHERE = tl.constexpr(-2)
OWN = tl.constexpr(-1)

# How the elements of caches are stored.
PLAIN, E4M3, INT8, INT4 = (tl.constexpr(i) for i in range(4))

# Several tensors may be pieces of one buffer (a plan's tables, the partial states), and begin at any multiple of 4
# bytes. A kernel that is specialised on each piece's alignment would be compiled again for nearly every plan.
PIECES = ("rows", "positions", "pages", "segments", "tasks", "merge_indptr", "merge_slots", "sizes", "part_sum")


@triton.jit
def merged(top_a, total_a, acc_a, top_b, total_b, acc_b):
    """Merge two states of each row, a before b. Merging with the empty state changes no bit."""
    top = tl.maximum(top_a, top_b)
    base = tl.where(top == float("-inf"), 0.0, top)  # -inf minus itself would be NaN
    a = tl.exp2(top_a - base)
    b = tl.exp2(top_b - base)
    empty_a = (top_a == float("-inf")) & (total_a == 0.0)
    empty_b = (top_b == float("-inf")) & (total_b == 0.0)
    total = tl.where(empty_b, total_a, tl.where(empty_a, total_b, fused(b, total_b, a * total_a)))
    acc = fused(tl.broadcast_to(b[:, None], acc_b.shape), acc_b, a[:, None] * acc_a)
    acc = tl.where(empty_b[:, None], acc_a, tl.where(empty_a[:, None], acc_b, acc))
    return tl.where(empty_b, top_a, tl.where(empty_a, top_b, top)), total, acc


@triton.jit
def finish(row, head, top, total, acc, mask, d, out, lse, sinks, num_q_heads, DIM: tl.constexpr, SINKS: tl.constexpr):
    """Write the results of complete rows. The sink of a head is a weight without a value."""
    kept = tl.full(top.shape, 1.0, tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, mask=mask, other=0.0) * LOG2E
        nothing = tl.zeros(acc.shape, tl.float32)
        higher, weights, _ = merged(top, total, nothing, sink, tl.full(top.shape, 1.0, tl.float32), nothing)
        kept = tl.where(top == float("-inf"), 0.0, tl.exp2(top - higher))
        total = weights
        top = higher
    # A zero is stored as +0: in acc its sign, which comes only from signs of zeros, may be that of hidden keys' values.
    result = acc * kept[:, None] / tl.where(total == 0.0, 1.0, total)[:, None] + 0.0
    final = (row * num_q_heads + head)[:, None] * DIM + d[None, :]
    tl.store(out + final, narrow(result, out.dtype.element_ty), mask=mask[:, None] & (d < DIM)[None, :])
    tl.store(lse + row * num_q_heads + head, (top + tl.log2(total)) * LN2, mask=mask)


@triton.jit
def put(slot, head, top, total, acc, mask, d, part_out, part_max, part_sum, num_q_heads, DIM: tl.constexpr):
    """Write states to their slots."""
    state = slot.to(tl.int64) * num_q_heads + head
    tl.store(part_out + state[:, None] * DIM + d[None, :], acc, mask=mask[:, None] & (d < DIM)[None, :])
    tl.store(part_max + state, top, mask=mask)
    tl.store(part_sum + state, total, mask=mask)


@triton.jit
def elements(cache, at, d, mask, number, inside, some, scale, zero, dtype: tl.constexpr, FORMAT: tl.constexpr,
             HALF: tl.constexpr):  # fmt: skip
    """Elements d of heads that begin at ``cache + at``. Their scales and zeros are at ``number``.

    ``some`` is always true, but Triton must not know. It lays factors that come from bytes out for the tensor cores in
    another way, so that sums have another order than over a plain cache. It does not trace factors through an `if`.
    """
    if FORMAT == PLAIN:
        x = tl.load(cache + at + d, mask=mask, other=0.0)
    else:
        x = tl.zeros(mask.shape, dtype)
        if some:
            if FORMAT == E4M3:
                wide = of_e4m3(tl.load(cache + at + d, mask=mask, other=0))
            else:
                factor = tl.load(scale + number, mask=inside, other=0.0).to(tl.float32)
                if FORMAT == INT4:
                    pair = tl.load(cache + at + d % HALF, mask=mask, other=0).to(tl.int32)
                    code = (tl.where(d >= HALF, pair >> 4, pair) & 15).to(tl.float32)
                    offset = tl.load(zero + number, mask=inside, other=0.0).to(tl.float32)
                    wide = code * factor + offset  # the product is exact
                else:
                    wide = tl.load(cache + at + d, mask=mask, other=0).to(tl.float32) * factor
                wide = tl.where(mask, wide, 0.0)
            x = narrow(wide, dtype)
    return x


@triton.jit(do_not_specialize=PIECES)
def task_kernel(
    q, k_cache, v_cache, rows, positions, pages, segments, tasks, merge_indptr, sizes, sinks,
    out, lse, part_out, part_max, part_sum,
    page_size, num_q_heads, group, scale, softcap, window,
    q_row, q_head, q_element, k_page, k_slot, k_head, v_page, v_slot, v_head, k_scale, v_scale, k_zero, v_zero,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = q.dtype.element_ty
    task = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    if task < tl.load(sizes + 1):
        seg_begin = tl.load(tasks + task * TASK)
        seg_end = tl.load(tasks + task * TASK + 1)
        row_begin = tl.load(tasks + task * TASK + 2)
        row_end = tl.load(tasks + task * TASK + 3)
        first_slot = tl.load(tasks + task * TASK + 4)
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
            first = row_begin + start // group  # first and last row of this tile
            last = row_begin + (tl.minimum(start + BLOCK_M, states) - 1) // group
            least = tl.min(tl.where(there, position, 2147483647), 0)
            most = tl.max(position, 0)

            own_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            own_total = tl.zeros([BLOCK_M], tl.float32)
            own_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of the chunk
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            target = tl.full([BLOCK_M], NOWHERE, tl.int32)
            has_own = there & (target == OWN)  # none yet
            factor = tl.full([BLOCK_M, 1], scale * LOG2E, tl.float32)
            for segment in range(seg_begin, seg_end):
                page_begin = tl.load(segments + segment * SEGMENT)
                token_begin = tl.load(segments + segment * SEGMENT + 1)
                length = tl.load(segments + segment * SEGMENT + 2)
                seg_first = tl.load(segments + segment * SEGMENT + 3)
                seg_last = tl.load(segments + segment * SEGMENT + 4) - 1
                seg_slot = tl.load(segments + segment * SEGMENT + 5)
                fresh = tl.load(segments + segment * SEGMENT + 6)
                if (seg_first <= last) & (first <= seg_last):
                    reads = there & (r >= seg_first) & (r <= seg_last)
                    if fresh != 0:
                        put(target, head, top, total, acc, reads & (target >= 0), d, part_out, part_max, part_sum,
                            num_q_heads, DIM)  # fmt: skip
                        joins = reads & (target == OWN)
                        both_top, both_total, both_acc = merged(own_top, own_total, own_acc, top, total, acc)
                        own_top = tl.where(joins, both_top, own_top)
                        own_total = tl.where(joins, both_total, own_total)
                        own_acc = tl.where(joins[:, None], both_acc, own_acc)
                        top = tl.where(reads, float("-inf"), top)
                        total = tl.where(reads, 0.0, total)
                        acc = tl.where(reads[:, None], 0.0, acc)
                        target = tl.where(reads, tl.where(seg_slot < 0, OWN, seg_slot + r - seg_first), target)
                        has_own = has_own | (reads & (seg_slot < 0))
                    all_rows = (seg_first <= first) & (last <= seg_last)
                    first_page = token_begin // page_size
                    for b0 in range(0, tl.minimum(length, most - token_begin + 1), KEY_BLOCK):
                        block_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
                        block_total = tl.zeros([BLOCK_M], tl.float32)
                        block_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                        for n0 in range(b0, tl.minimum(length, b0 + KEY_BLOCK), BLOCK_N):
                            n = n0 + tl.arange(0, BLOCK_N)
                            inside = n < length
                            at = token_begin + n
                            page = tl.load(pages + page_begin + at // page_size - first_page, mask=inside, other=0)
                            page = page.to(tl.int64)
                            slot = (at % page_size).to(tl.int64)
                            sees = reads[:, None] & inside[None, :] & (at[None, :] <= position[:, None])
                            all_see = all_rows & (n0 + BLOCK_N <= length) & (token_begin + n0 + BLOCK_N - 1 <= least)
                            if WINDOW:
                                sees = sees & (at[None, :] > position[:, None] - window)
                                all_see = all_see & (token_begin + n0 > most - window)

                            number = (page * page_size + slot) * tl.num_programs(1) + kv_head
                            keys = elements(
                                k_cache, (page * k_page + slot * k_slot + kv_head * k_head)[None, :], d[:, None],
                                inside[None, :] & (d < DIM)[:, None], number[None, :], inside[None, :], n0 < length,
                                k_scale, k_zero, dtype, FORMAT, DIM // 2,
                            )  # fmt: skip
                            raw = dot(queries, keys, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
                            x = softcap * tanh(raw * scale / softcap) * LOG2E if SOFTCAP else raw * factor
                            part_top = tl.max(tl.where(sees, x, float("-inf")), 1)
                            base = tl.where(part_top == float("-inf"), 0.0, part_top)
                            # Fused: rounding a large score before the maximum is subtracted would change its weight.
                            below = x - base[:, None] if SOFTCAP else fused(raw, factor, -base[:, None])
                            weights = tl.where(sees, tl.exp2(below), 0.0)
                            part_total = tl.sum(weights, 1)
                            part_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

                            values = elements(
                                v_cache, (page * v_page + slot * v_slot + kv_head * v_head)[:, None], d[None, :],
                                inside[:, None] & (d < DIM)[None, :], number[:, None], inside[:, None], n0 < length,
                                v_scale, v_zero, dtype, FORMAT, DIM // 2,
                            )  # fmt: skip
                            weights = narrow(weights, dtype)
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
                                        part_acc += tl.where(
                                            seen[:, None] & ((odd - odd) != 0.0)[None, :],
                                            weight[:, None] * odd[None, :],
                                            0.0,
                                        )
                                    values = tl.where(finite, values, tl.zeros_like(values))
                            part_acc = dot(weights, values, part_acc)
                            block_top, block_total, block_acc = merged(
                                block_top, block_total, block_acc, part_top, part_total, part_acc
                            )
                        top, total, acc = merged(top, total, acc, block_top, block_total, block_acc)

            put(target, head, top, total, acc, there & (target >= 0), d, part_out, part_max, part_sum, num_q_heads, DIM)
            joins = target == OWN
            both_top, both_total, both_acc = merged(own_top, own_total, own_acc, top, total, acc)
            own_top = tl.where(joins, both_top, own_top)
            own_total = tl.where(joins, both_total, own_total)
            own_acc = tl.where(joins[:, None], both_acc, own_acc)
            begin = tl.load(merge_indptr + r, mask=there, other=0)
            later = tl.load(merge_indptr + r + 1, mask=there, other=0) > begin
            put(first_slot + r - row_begin, head, own_top, own_total, own_acc, has_own & later, d,
                part_out, part_max, part_sum, num_q_heads, DIM)  # fmt: skip
            finish(row, head, own_top, own_total, own_acc, has_own & (later == 0), d, out, lse, sinks, num_q_heads,
                   DIM, SINKS)  # fmt: skip


@triton.jit(do_not_specialize=PIECES)
def merge_kernel(
    rows, positions, merge_indptr, merge_slots, sinks, out, lse, part_out, part_max, part_sum, num_q_heads,
    SINKS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    begin = tl.load(merge_indptr + r)
    end = tl.load(merge_indptr + r + 1)
    if (end > begin) | (tl.load(positions + r) < 0):  # otherwise its task has finished it
        row = tl.load(rows + r).to(tl.int64)
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        d = tl.arange(0, BLOCK_D)
        there = head < num_q_heads
        cells = there[:, None] & (d < DIM)[None, :]
        own_top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        own_total = tl.zeros([BLOCK_H], tl.float32)
        own_acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_H], float("-inf"), tl.float32)  # of the chunk
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        for i in range(begin, end):
            entry = tl.load(merge_slots + i)  # 2 slot + whether it continues the chunk
            if entry % 2 == 0:
                own_top, own_total, own_acc = merged(own_top, own_total, own_acc, top, total, acc)
                top = tl.full([BLOCK_H], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK_H], tl.float32)
                acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
            state = (entry // 2).to(tl.int64) * num_q_heads + head
            part_top = tl.load(part_max + state, mask=there, other=float("-inf"))
            part_total = tl.load(part_sum + state, mask=there, other=0.0)
            part_acc = tl.load(part_out + state[:, None] * DIM + d[None, :], mask=cells, other=0.0)
            top, total, acc = merged(top, total, acc, part_top, part_total, part_acc)
        own_top, own_total, own_acc = merged(own_top, own_total, own_acc, top, total, acc)
        finish(row, head, own_top, own_total, own_acc, there, d, out, lse, sinks, num_q_heads, DIM, SINKS)


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [T, Hq]."""
    num_rows, num_q_heads, dim = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    if q.numel() == 0:
        return out, lse.fill_(-torch.inf)
    rows, positions, pages, segments, tasks, merge_indptr, merge_slots = (
        t.contiguous() for t in (rows, positions, pages, segments, tasks, merge_indptr, merge_slots)
    )
    part_out = q.new_empty((max_slots, num_q_heads, dim), dtype=torch.float32)
    part_max, part_sum = q.new_empty((2, max_slots, num_q_heads), dtype=torch.float32)
    group, block_d = num_q_heads // num_kv_heads, max(16, triton.next_power_of_2(dim))
    wide = block_d > 128 or q.dtype == torch.float32
    # The same tiles for every plan and format: other sizes might sum in another order.
    options = config("tree_attention_wide" if wide else "tree_attention", q.device)
    logits = lse if sinks is None else sinks
    form = PLAIN
    if k_cache.dtype == FP8:
        form, k_cache, v_cache = E4M3, k_cache.view(BITS[1]), v_cache.view(BITS[1])
    elif k_scale is not None:
        form = INT8 if k_zero is None else INT4
    if tasks.shape[0]:
        task_kernel[(tasks.shape[0], num_kv_heads)](
            q, k_cache, v_cache, rows, positions, pages, segments, tasks, merge_indptr, sizes, logits,
            out, lse, part_out, part_max, part_sum,
            page_size, num_q_heads, group, scale, softcap, window,
            *q.stride(), *k_cache.stride()[:3], *v_cache.stride()[:3], k_scale, v_scale, k_zero, v_zero,
            SOFTCAP=softcap != 0, WINDOW=window > 0, SINKS=sinks is not None, DIM=dim, BLOCK_D=block_d,
            FORMAT=form.value, **options,
        )  # fmt: skip
    block_h = min(8, triton.next_power_of_2(num_q_heads))
    merge_kernel[(num_rows, triton.cdiv(num_q_heads, block_h))](
        rows, positions, merge_indptr, merge_slots, logits, out, lse, part_out, part_max, part_sum, num_q_heads,
        SINKS=sinks is not None, DIM=dim, BLOCK_D=block_d, BLOCK_H=block_h, **config("rows", q.device),
    )  # fmt: skip
    return out, lse
