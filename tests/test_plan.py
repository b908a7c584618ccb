"""Attention plans against brute force: each row reads each of its keys exactly once, in valid tasks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass, fields
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import threads
from torch import Tensor
from torch.utils import _pytree as pytree

from tts_kernels import AttentionPlan, KVForest, plan_attention

MAX_QUERY_ROWS = 512  # rows of a task times query heads of a group, on the CPU
CHUNK = 512  # positions whose keys are summed up before they join a row's result, on the CPU
BLOCK = 64  # positions whose keys are summed up before they join a chunk
NARROW = 8  # rows * group of a segment that is bound by reading its keys
FIELDS = ("rows", "positions", "pages", "segments", "tasks", "merge_indptr", "merge_slots", "sizes")
HEADS = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}


def used(plan: AttentionPlan) -> dict[str, np.ndarray]:
    """The part of each field that is in use."""
    segments, tasks, _, pages = plan.sizes.tolist()
    count = {"segments": segments, "tasks": tasks, "pages": pages, "merge_slots": int(plan.merge_indptr[-1])}
    return {name: getattr(plan, name).numpy()[: count.get(name)] for name in FIELDS}


def assert_equal_plans(a: AttentionPlan, b: AttentionPlan) -> None:
    for (name, x), y in zip(used(a).items(), used(b).values(), strict=True):
        assert np.array_equal(x, y), name


def assert_sound(plan: AttentionPlan) -> None:
    """What a kernel relies on, whatever was planned."""
    u = used(plan)
    num_segments, num_tasks, num_slots, num_pages = plan.sizes.tolist()
    num_rows, most = plan.num_rows, max(1, MAX_QUERY_ROWS // (plan.num_q_heads // plan.num_kv_heads))
    assert sorted(u["rows"]) == list(range(num_rows))
    assert num_slots <= plan.max_slots
    for name in ("pages", "segments", "tasks", "merge_slots"):
        assert not getattr(plan, name)[len(u[name]) :].any()  # zeros behind what is used
    for page_begin, start, length, row_begin, row_end, slot, fresh in u["segments"].tolist():
        assert length > 0
        assert start % BLOCK == 0
        assert start // CHUNK == (start + length - 1) // CHUNK
        assert 0 <= page_begin <= page_begin + (start % plan.page_size + length - 1) // plan.page_size < num_pages
        assert 0 <= row_begin < row_end <= num_rows
        assert slot == -1 or 0 <= slot <= num_slots - (row_end - row_begin)
        assert fresh in (0, 1)
        positions = u["positions"][row_begin:row_end]
        assert positions.max() >= start + length - 1  # no keys behind every row
        assert positions[0] >= start  # no row at either end that is before every key
        assert positions[-1] >= start

    next_segment = 0
    for seg_begin, seg_end, row_begin, row_end, slot in u["tasks"].tolist():
        assert seg_begin == next_segment < seg_end
        own = u["segments"][seg_begin:seg_end]
        assert (row_begin, row_end) == (own[:, 3].min(), own[:, 4].max())
        assert row_end - row_begin <= most
        assert slot == -1 or 0 <= slot <= num_slots - (row_end - row_begin)
        next_segment = seg_end
    assert next_segment == num_segments
    assert num_tasks > 0 or num_segments == 0
    assert u["merge_indptr"][0] == 0
    assert (np.diff(u["merge_indptr"]) >= 0).all()


Block: TypeAlias = "tuple[int, int]"  # positions [begin, end) that a row sees of a block
Chunk: TypeAlias = "list[Block]"


def assemble(plan: AttentionPlan) -> list[list[Chunk]]:
    """What a kernel would do, with the lists of what a state is made of in place of states: the chunks of each row."""
    u = used(plan)
    results: list[list[Chunk]] = [[] for _ in range(plan.num_rows)]
    entries = [
        u["merge_slots"][begin:end].tolist() for begin, end in pairwise(u["merge_indptr"].tolist())
    ]  # of each row
    slots: dict[int, list[Chunk]] = {}
    for seg_begin, seg_end, row_begin, _, own_slot in u["tasks"].tolist():
        own: dict[int, list[Chunk]] = {}
        for _, start, length, first, last, slot, fresh in u["segments"][seg_begin:seg_end].tolist():
            for row in range(first, last):
                at = slot + row - first
                if fresh and slot >= 0:
                    assert at not in slots
                state = own.setdefault(row, []) if slot < 0 else slots.setdefault(at, [])
                if fresh:
                    state.append([])
                state[-1].extend(blocks_seen(plan, row, start, length))
        for row, state in own.items():
            if entries[row]:
                slots[own_slot + row - row_begin] = state
            else:
                assert not results[row]
                results[row] = state
    used_slots = [entry // 2 for row in entries for entry in row]
    assert len(used_slots) == len(set(used_slots))
    assert set(used_slots) <= set(slots)
    for row, found in enumerate(entries):
        for entry in found:
            state = slots[entry // 2]
            if entry % 2:
                results[row][-1:] = [[*(results[row] or [[]])[-1], *state[0]], *state[1:]]
            else:
                results[row].extend(state)
    return [[chunk for chunk in row if chunk] for row in results]


def blocks_seen(plan: AttentionPlan, row: int, start: int, length: int) -> Chunk:
    """The blocks that a row sees of a stretch of keys, with the positions in each."""
    position = int(plan.positions[row])
    low, high = (max(0, position - plan.window + 1) if plan.window else 0), position + 1
    found = []
    for block in range(start // BLOCK, -(-(start + length) // BLOCK)):
        begin = max(block * BLOCK, start, low)
        end = min((block + 1) * BLOCK, start + length, high)
        if begin < end:
            found.append((begin, end))
    return found


def assert_one_way_of_summing(plan: AttentionPlan) -> None:
    """Whatever the cut, a row's result is its chunks in ascending order, of its whole blocks, in ascending order."""
    for row, chunks in enumerate(assemble(plan)):
        expected: dict[int, Chunk] = {}
        for begin, end in blocks_seen(plan, row, 0, int(plan.positions[row]) + 1):
            expected.setdefault(begin // CHUNK, []).append((begin, end))
        assert chunks == list(expected.values()), row


def assert_reads(plan: AttentionPlan, table: Tensor, kv_lens: Sequence[int], q_lens: Sequence[int] | None) -> None:
    """Row j of branch b reads the slots of its branch at positions up to kv_len - q_len + j, each once."""
    q_lens = [1] * len(kv_lens) if q_lens is None else q_lens
    owner = np.repeat(np.arange(len(kv_lens)), q_lens)
    last = np.concatenate([np.arange(kv - q, kv) for kv, q in zip(kv_lens, q_lens, strict=True)] or [np.empty(0, int)])
    rows, positions, pages = plan.rows.numpy(), plan.positions.numpy(), plan.pages.numpy()
    assert len(rows) == len(owner)
    assert np.array_equal(positions, last[rows])

    size, width = plan.page_size, max(kv_lens, default=0)
    times, slots = np.zeros((len(rows), width), int), np.full((len(rows), width), -1)
    for page_begin, start, length, row_begin, row_end, *_ in used(plan)["segments"].tolist():
        at = start % size + np.arange(length)
        times[row_begin:row_end, start : start + length] += 1
        slots[row_begin:row_end, start : start + length] = pages[page_begin + at // size] * size + at % size
    at = np.arange(width)
    seen = at <= positions[:, None]
    if plan.window:
        seen &= at > positions[:, None] - plan.window
    assert (times[seen] == 1).all()
    expected = (table.numpy()[:, at // size] * size + at % size)[owner[rows]] if width else slots
    assert np.array_equal(slots[seen], expected[seen])


def tokens_read(plan: AttentionPlan) -> int:
    return int(used(plan)["segments"][:, 2].sum())


def tokens_of_blocks(pages: Sequence[Sequence[int]], kv_lens: Sequence[int], page_size: int) -> int:
    """Tokens to read if branches share the blocks of keys in which they, and all that is before, agree."""
    ends: dict[tuple[int, ...], int] = {}
    for row, length in zip(pages, kv_lens, strict=True):
        for begin in range(0, length, BLOCK):
            end = min(begin + BLOCK, length)
            block = (begin, *row[: -(-end // page_size)])
            ends[block] = max(ends.get(block, 0), end)
    return sum(end - begin for (begin, *_), end in ends.items())


@dataclass
class Case:
    """A forest, branches of it (some twice, some not at all) and their query rows."""

    forest: KVForest
    live: list[int]
    branches: list[int]
    q_lens: list[int] | None
    heads: dict[str, int]

    def plan(self, **options: Any) -> AttentionPlan:
        return self.forest.plan(self.branches, self.q_lens, **self.heads, **options)

    def plan_table(self, **options: Any) -> AttentionPlan:
        table, kv_lens = self.forest.page_table(self.branches)
        page_size = self.forest.page_size
        return plan_attention(table, kv_lens, self.q_lens, page_size=page_size, **self.heads, **options)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Chains, stars and trees: each step gives a branch children and grows, or cuts, one of them."""
    forest = KVForest(60_000, page_size=draw(st.sampled_from([1, 3, 16, 64])))
    live = [forest.add_root()]
    growth = st.one_of(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2500))
    steps = st.tuples(st.integers(0), st.integers(0, 5), growth, st.integers(0, 5))
    for which, children, count, action in draw(st.lists(steps, max_size=12)):
        branch = live[-1 - which % len(live)]
        new = forest.fork([branch] * children)
        forest.append([branch, *new], [count // 3 * (action < 2), *(count // (i + 1) for i in range(children))])
        live += new
        if action == 2:
            forest.truncate(branch, forest.length(branch) // 2)
        elif action == 3:
            live.append(forest.add_root())
    branches = draw(st.lists(st.sampled_from(live), max_size=2 * len(live)))
    q_lens = None
    if draw(st.booleans()):
        wanted = st.one_of(st.integers(0, 2), st.integers(0, 100))
        q_lens = [min(forest.length(b), draw(wanted)) for b in branches]
    kv_heads, group = draw(st.sampled_from([1, 2, 3, 8, 40])), draw(st.sampled_from([1, 2, 4, 7, 16, 40, 600]))
    heads = {"num_q_heads": kv_heads * group, "num_kv_heads": kv_heads, "head_dim": 64}
    return Case(forest, live, branches, q_lens, heads)


@settings(max_examples=150, deadline=None)
@given(case=cases(), window=st.one_of(st.none(), st.integers(1, 1500)))
def test_plans_of_a_forest_read_every_key_once(case: Case, window: int | None) -> None:
    plan = case.plan(window=window)
    assert_sound(plan)
    table, kv_lens = case.forest.page_table(case.branches)
    assert_reads(plan, table, kv_lens.tolist(), case.q_lens)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_the_page_table_alone_gives_the_same_plan(case: Case) -> None:
    # The tree found in a table lacks the nodes that only unlisted branches tell apart; what is planned is the same.
    a, b = case.plan(), case.plan_table()
    assert_sound(b)
    assert_equal_plans(a, b)


@settings(max_examples=60, deadline=None)
@given(case=cases(), window=st.one_of(st.none(), st.integers(1, 1500)))
def test_how_the_work_is_cut_never_changes_how_a_row_is_summed(case: Case, window: int | None) -> None:
    assert_one_way_of_summing(case.plan(window=window))


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_a_shared_token_is_read_once(case: Case) -> None:
    """But for at most 63 before a fork: a block of keys within which branches part is read for each of them."""
    case.branches, case.q_lens, case.heads = case.live, None, {"num_q_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    table, kv_lens = case.forest.page_table(case.live)
    tokens = tokens_read(case.plan())
    assert tokens == tokens_of_blocks(table.tolist(), kv_lens.tolist(), case.forest.page_size)
    ends = len({tuple(row) for row in table.tolist()})
    unique = case.forest.stats().unique_tokens
    assert unique <= tokens <= unique + 63 * 2 * ends  # a tree with so many ends has fewer than twice as many pieces


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_a_plan_does_not_depend_on_threads(case: Case) -> None:
    plan = case.plan()
    with threads(5):
        assert_equal_plans(case.plan(), plan)


@st.composite
def foreign_tables(draw: st.DrawFn) -> tuple[Tensor, list[int], int]:
    """Tables in which branches agree in prefixes, and in single pages behind different prefixes."""
    page_size = draw(st.sampled_from([1, 4, 16, 64]))
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(0, 12))):
        prefix: list[int] = []
        if rows:
            source = draw(st.sampled_from(rows))
            prefix = source[: draw(st.integers(0, len(source)))]
        rows.append(prefix + draw(st.lists(st.integers(0, 3), max_size=80 // page_size + 3)))
    kv_lens = [draw(st.integers(max(0, len(r) - 1) * page_size + bool(r), len(r) * page_size)) for r in rows]
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    limits = torch.iinfo(dtype)
    width = max(map(len, rows), default=0) + draw(st.integers(0, 3))
    rubbish = st.sampled_from([-1, 0, 1, limits.min, limits.max])
    padded = [row + [draw(rubbish) for _ in range(width - len(row))] for row in rows]
    table = torch.tensor(padded, dtype=dtype).reshape(len(rows), width)
    layout = draw(st.sampled_from(["dense", "strided", "transposed"]))
    if layout == "strided":
        table = torch.stack([table, table - 1], dim=-1)[..., 0]
    elif layout == "transposed":
        table = table.t().contiguous().t()
    return table, kv_lens, page_size


@settings(max_examples=150, deadline=None)
@given(foreign=foreign_tables(), data=st.data())
def test_plans_of_a_foreign_table(foreign: tuple[Tensor, list[int], int], data: st.DataObject) -> None:
    table, kv_lens, page_size = foreign
    q_lens = [data.draw(st.integers(0, n)) for n in kv_lens] if data.draw(st.booleans()) else None
    heads = {"num_q_heads": data.draw(st.sampled_from([1, 8, 256])), "num_kv_heads": 1, "head_dim": 8}
    plan = plan_attention(table, kv_lens, q_lens, page_size=page_size, **heads)
    assert_sound(plan)
    assert_reads(plan, table, kv_lens, q_lens)
    assert_one_way_of_summing(plan)
    if q_lens is None and heads["num_q_heads"] == 1:  # one block of rows
        assert tokens_read(plan) == tokens_of_blocks(table.tolist(), kv_lens, page_size)


def star(trunk: int = 1000, own: int = 30, branches: int = 256) -> tuple[KVForest, list[int]]:
    forest = KVForest(40_000)
    root = forest.add_root()
    forest.append([root], [trunk])
    children = forest.fork([root] * branches)
    forest.free([root])
    forest.append(children, [own] * branches)
    return forest, children


def test_a_causal_block_does_not_read_keys_behind_it() -> None:
    forest = KVForest(100)
    root = forest.add_root()
    forest.append([root], [1000])
    plan = forest.plan([root], [1000], **HEADS)
    assert_sound(plan)
    # 8 blocks of 128 rows read 128 + 256 + ... + 896 + 1000 keys.
    assert tokens_read(plan) == 128 * 28 + 1000


@pytest.mark.parametrize("window", [1, 64, 100, 1024])
def test_a_window_bounds_the_work(window: int) -> None:
    forest = KVForest(16384 // 16 + 100)
    root = forest.add_root()
    forest.append([root], [16384])
    plan = forest.plan([root], [4096], **HEADS, window=window)
    assert_sound(plan)
    assert_reads(plan, forest.page_table([root])[0], [16384], [4096])
    assert tokens_read(plan) <= 32 * (window + 128 + 63)  # blocks of 128 rows
    branches = forest.fork([root] * 8)
    forest.append(branches, [40] * 8)
    decode = forest.plan(branches, **HEADS, window=window)
    assert tokens_read(decode) <= max(0, window - 40) + 63 + 8 * min(window + 63, 40)


def test_a_long_prefill_needs_no_slots() -> None:
    """A row that one task alone reads has no partial state."""
    forest = KVForest(32768 // 16)
    root = forest.add_root()
    forest.append([root], [32768])
    plan = forest.plan([root], [32768], **HEADS)
    assert int(plan.sizes[2]) == 0
    assert plan.max_slots <= 512  # room to grow


def test_a_chunk_can_start_behind_the_first_rows_of_its_block() -> None:
    forest = KVForest(200)
    root = forest.add_root()
    forest.append([root], [2000])
    plan = forest.plan([root], [1500], num_q_heads=1, num_kv_heads=1, head_dim=8)  # 512 rows per block
    assert_sound(plan)
    assert_reads(plan, forest.page_table([root])[0], [2000], [1500])
    assert (used(plan)["segments"][:, 3] % 512).any()
    assert_one_way_of_summing(plan)


def test_blocks_of_rows_end_where_trees_end() -> None:
    forest = KVForest(400)
    roots = [forest.add_root() for _ in range(5)]
    forest.append(roots, [640] * 5)
    branches = forest.fork([root for root in roots for _ in range(60)])  # 128 rows per block, 60 per tree
    assert tokens_read(forest.plan(branches, **HEADS)) == 5 * 640


def test_rows_are_in_depth_first_order_of_first_mention() -> None:
    forest = KVForest(100, page_size=4)
    a, b = forest.add_root(), forest.add_root()
    forest.append([a, b], [8, 8])
    a1, a2, b1, b2 = forest.fork([a, a, b, b])
    forest.append([a1, a2, b1, b2], [1] * 4)
    empty = forest.add_root()
    plan = forest.plan([b1, a1, b2, empty, a2], **HEADS)
    assert plan.rows.tolist() == [3, 0, 2, 1, 4]
    assert plan.positions.tolist() == [-1, 8, 8, 8, 8]
    assert plan.merge_indptr.tolist() == [0] * 6


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
def test_work_items_are_of_about_equal_cost(num_kv_heads: int) -> None:
    forest, branches = star(trunk=7936, own=256)
    plan = forest.plan(branches, num_q_heads=4 * num_kv_heads, num_kv_heads=num_kv_heads, head_dim=128)
    segments = used(plan)["segments"]
    rows = segments[:, 4] - segments[:, 3]
    cost = segments[:, 2] * np.maximum(4 * rows, 24)
    costs = []
    for begin, end, *_ in used(plan)["tasks"].tolist():
        narrow = 4 * rows[begin:end] <= NARROW
        assert narrow.all() or not narrow.any()  # tails, or the trunk
        whole = cost[begin:end].sum()  # one item for all heads together, or one for each
        costs += [whole * num_kv_heads] if narrow.all() else [whole] * num_kv_heads
    assert 24 <= len(costs) <= 48
    assert max(costs) < 4 * min(costs)  # a chunk is not cut


def test_little_work_is_cut_in_narrow_and_wide_only() -> None:
    forest, branches = star(trunk=200, own=10, branches=4)
    plan = forest.plan(branches, **HEADS)
    assert plan.sizes.tolist()[1:3] == [2, 8]
    assert sorted(used(plan)["segments"][:, 1].tolist()) == [0] + [192] * 4


def test_a_long_branch_is_cut_into_chunks() -> None:
    for page_size in (1, 16, 64, 1000):
        forest = KVForest(40_000, page_size=page_size)
        root = forest.add_root()
        forest.append([root], [32_000])
        plan = forest.plan([root], num_q_heads=8, num_kv_heads=2, head_dim=64)
        assert_sound(plan)
        assert int(plan.sizes[1]) >= 8
        assert (used(plan)["segments"][:, 1] % CHUNK == 0).all()
        assert_one_way_of_summing(plan)


# ---- Filling a plan again ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(case=cases(), counts=st.lists(st.integers(0, 60), min_size=80, max_size=80))
def test_a_refill_equals_a_fresh_plan_in_the_same_tensors(case: Case, counts: list[int]) -> None:
    out = case.plan()
    tensors = {name: getattr(out, name) for name in FIELDS}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    case.forest.append(case.live, counts[: len(case.live)] + [0] * (len(case.live) - 80))
    for plan in (case.plan, case.plan_table):
        assert plan(out=out) is out
        assert_sound(out)
        assert_equal_plans(out, case.plan())
        assert {name: getattr(out, name).data_ptr() for name in FIELDS} == addresses
        assert all(getattr(out, name) is tensors[name] for name in FIELDS)


def test_a_plan_has_room_for_a_round_of_search() -> None:
    forest, branches = star()
    out = forest.plan(branches, **HEADS)
    for _ in range(5):
        forest.append(branches, [100] * len(branches))
        assert_equal_plans(forest.plan(branches, **HEADS, out=out), forest.plan(branches, **HEADS))
    padding = forest.add_root()  # some branches finish; their rows are given to an empty branch
    rest = branches[:200] + [padding] * 56
    assert_equal_plans(forest.plan(rest, **HEADS, out=out), forest.plan(rest, **HEADS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_q_heads": 16}, "out: expected a plan for num_q_heads = 16, got one for 32"),
        ({"num_kv_heads": 4}, "out: expected a plan for num_kv_heads = 4, got one for 8"),
        ({"head_dim": 64}, "out: expected a plan for head_dim = 64, got one for 128"),
        ({"device": "meta"}, "out: expected a plan on meta, got one on cpu"),
        ({"branches": 255}, "out: expected a plan of 255 rows, got one of 256"),
        ({"grow": 900}, "out: expected room for [0-9]+ pages, got [0-9]+"),
    ],
)
def test_an_out_that_does_not_fit_is_not_written(change: dict[str, Any], message: str) -> None:
    forest, branches = star()
    out = forest.plan(branches, **HEADS)
    before = {name: getattr(out, name).clone() for name in FIELDS}
    forest.append(branches, [1 + change.get("grow", 0)] * len(branches))
    options = {**HEADS, **{k: v for k, v in change.items() if k not in ("branches", "grow")}}
    with pytest.raises(ValueError, match=f"^{message}$"):
        forest.plan(branches[: change.get("branches")], **options, out=out)
    assert all(getattr(out, name).equal(before[name]) for name in FIELDS)


def test_another_page_size_or_a_copy_of_a_plan_does_not_fit() -> None:
    forest, branches = star(branches=2)
    plan = forest.plan(branches, **HEADS)
    table, kv_lens = forest.page_table(branches)
    with pytest.raises(ValueError, match=r"^out: expected a plan for page_size = 32, got one for 16"):
        plan_attention(table, kv_lens, page_size=32, **HEADS, out=plan)
    with pytest.raises(ValueError, match="got a copy of one"):
        forest.plan(branches, **HEADS, out=pytree.tree_map(torch.clone, plan))
    with pytest.raises(TypeError, match=r"^out: expected an AttentionPlan, got int"):
        forest.plan(branches, **HEADS, out=3)


def test_another_device_gets_the_same_fields() -> None:
    forest, branches = star(branches=3)
    plan, far = forest.plan(branches, **HEADS), forest.plan(branches, **HEADS, device="meta")
    assert all(getattr(far, name).device.type == "meta" for name in FIELDS)
    assert all(getattr(far, name).shape == getattr(plan, name).shape for name in FIELDS)
    assert forest.plan(branches, **HEADS, out=far, device="meta") is far
    assert forest.plan(branches, **HEADS, out=far) is far


# ---- The plan as a value -----------------------------------------------------------------------------------


def test_a_plan_is_one_allocation_and_frozen() -> None:
    forest, branches = star(branches=3)
    plan = forest.plan(branches, **HEADS)
    assert plan.num_rows == 3
    assert len({getattr(plan, name).untyped_storage().data_ptr() for name in FIELDS}) == 1
    assert all(getattr(plan, name).dtype == torch.int32 for name in FIELDS)
    assert (plan.segments.shape[1], plan.tasks.shape[1]) == (7, 5)
    with pytest.raises(FrozenInstanceError):
        plan.page_size = 3  # type: ignore[misc]
    del forest, branches
    assert plan.positions.tolist() == [1029] * 3


def test_a_plan_is_a_pytree_of_its_tensors() -> None:
    forest, branches = star(branches=3)
    plan = forest.plan(branches, **HEADS)
    leaves, spec = pytree.tree_flatten(plan)
    assert [id(leaf) for leaf in leaves] == [id(getattr(plan, name)) for name in FIELDS]
    again = pytree.tree_unflatten(leaves, spec)
    public = [f.name for f in fields(AttentionPlan) if not f.name.startswith("_")]
    assert all(getattr(again, name) is getattr(plan, name) for name in public)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(plan)[0]]
    assert paths == [f".{name}" for name in FIELDS]
    assert_equal_plans(copy.copy(plan), plan)


def test_a_plan_can_be_copied_and_pickled() -> None:
    forest, branches = star(branches=3)
    plan = forest.plan(branches, **HEADS)
    for again in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert_equal_plans(again, plan)
        assert repr(again) == repr(plan)
        assert again.rows.data_ptr() != plan.rows.data_ptr()
        with pytest.raises(ValueError, match=r"^out: expected a plan from KVForest\.plan"):
            forest.plan(branches, **HEADS, out=again)


def test_room_for_partial_states_is_a_power_of_two() -> None:
    forest, branches = star(branches=3)
    for _ in range(5):
        assert forest.plan(branches, **HEADS).max_slots.bit_count() == 1
        forest.append(branches, [300] * 3)


def test_a_plan_goes_through_compile() -> None:
    def function(x: Tensor, plan: AttentionPlan) -> Tensor:
        return x[plan.rows.long()] * plan.page_size + plan.sizes[1] + plan.num_rows

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    forest, branches = star(branches=3)
    x = torch.arange(3.0)
    for _ in range(3):
        plan = forest.plan(branches, **HEADS)
        assert compiled(x, plan).equal(function(x, plan))
        forest.append(branches, [1] * 3)


# ---- Arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"num_q_heads": 6}, ValueError, "num_q_heads: expected a multiple of num_kv_heads = 4, got 6"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads: expected at least 1"),
        ({"head_dim": 0}, ValueError, "head_dim: expected at least 1"),
        ({"num_q_heads": 8.0}, TypeError, "num_q_heads: expected an int"),
        ({"num_q_heads": 2**31}, ValueError, "num_q_heads: expected below 2147483648"),
        ({"page_size": 0}, ValueError, "page_size: expected at least 1"),
        ({"page_table": [[0]]}, TypeError, "page_table: expected a tensor"),
        ({"page_table": torch.zeros(2, 2)}, TypeError, "page_table: expected torch.int32 or torch.int64"),
        ({"page_table": torch.zeros(2, dtype=torch.int32)}, ValueError, r"page_table: expected shape \[B, max\]"),
        ({"page_table": torch.tensor([[0, 1], [-1, 0]])}, IndexError, r"page_table\[1, 0\]: expected a page"),
        ({"page_table": torch.tensor([[0, 2**31], [1, 0]])}, IndexError, r"page_table\[0, 1\]: expected a page"),
        ({"kv_lens": [4]}, ValueError, "kv_lens: expected one for each row of page_table, 2, got 1"),
        ({"kv_lens": [4, 9]}, ValueError, r"kv_lens\[1\]: expected 0 to 8"),
        ({"kv_lens": [-1, 4]}, ValueError, r"kv_lens\[0\]: expected 0 to 8"),
        ({"kv_lens": [4.0, 4]}, TypeError, r"kv_lens\[0\]: expected an int, got float"),
        ({"kv_lens": torch.ones(2)}, TypeError, "kv_lens: expected ints"),
        ({"q_lens": [1]}, ValueError, "q_lens: expected one for each branch, 2, got 1"),
        ({"q_lens": [1, 5]}, ValueError, r"q_lens\[1\]: expected 0 to 4, the branch's length, got 5"),
        ({"q_lens": [-1, 1]}, ValueError, r"q_lens\[0\]: expected 0 to 8"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good = {
        "page_table": torch.tensor([[0, 1], [0, 2]]),
        "kv_lens": [8, 4],
        "q_lens": None,
        "page_size": 4,
        "num_q_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
    }
    assert_sound(plan_attention(**good))
    with pytest.raises(kind, match=f"^{message}"):
        plan_attention(**{**good, **change})


def test_bad_branches_of_a_forest_are_named() -> None:
    forest, branches = star(branches=2)
    with pytest.raises(IndexError, match=r"^branches\[2\]: expected a live branch, got 0, which was freed"):
        forest.plan([*branches, 0], **HEADS)
    with pytest.raises(ValueError, match=r"^q_lens\[0\]: expected 0 to 1030"):
        forest.plan(branches, [1031, 1], **HEADS)
    with pytest.raises(ValueError, match=r"^q_lens\[0\]: expected 0 to 0"):
        forest.plan([forest.add_root()], [1], **HEADS)


def test_nothing_to_plan() -> None:
    forest = KVForest(1)
    for plan in (
        forest.plan([], **HEADS),
        plan_attention(torch.empty(0, 0, dtype=torch.int32), [], page_size=16, **HEADS),
    ):
        assert_sound(plan)
        assert (plan.num_rows, plan.sizes.tolist()) == (0, [0] * 4)
    plan = forest.plan([forest.add_root()], **HEADS)
    assert plan.positions.tolist() == [-1]
    assert plan.merge_indptr.tolist() == [0, 0]
