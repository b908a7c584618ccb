"""KVForest against a plain-Python model of a forest that stores every token."""

from __future__ import annotations

import array
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tts_kernels import ForestStats, KVForest, OutOfPages

CONTAINERS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array": lambda ints: array.array("q", ints),
    "array of C int": lambda ints: array.array("i", ints),
    "int64 tensor": lambda ints: torch.tensor(ints, dtype=torch.int64),
    "int32 tensor": lambda ints: torch.tensor(ints, dtype=torch.int32),
    "strided tensor": lambda ints: torch.tensor([[i, -1] for i in ints], dtype=torch.int64).reshape(-1, 2)[:, 0],
    "numpy": lambda ints: torch.tensor(ints, dtype=torch.int16).numpy(),
}


class Model:
    """Every branch's tokens and pages, told by what the forest returned; it predicts each copy and each fault."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.tokens: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}

    def columns(self, length: int) -> int:
        return -(-length // self.page_size)

    def held(self) -> set[int]:
        return {page for table in self.tables.values() for page in table}

    def add(self, branch: int, parent: int | None = None) -> None:
        assert branch not in self.tokens
        self.tokens[branch] = list(self.tokens[parent]) if parent is not None else []
        self.tables[branch] = list(self.tables[parent]) if parent is not None else []

    def copies(self, branches: Sequence[int], counts: Sequence[int]) -> list[int]:
        """The entries that must copy their last page: partly filled, and held by another when their turn comes."""
        holders: dict[int, int] = {}
        for table in self.tables.values():
            for page in table:
                holders[page] = holders.get(page, 0) + 1
        copying = []
        for i, (branch, count) in enumerate(zip(branches, counts, strict=True)):
            if count and len(self.tokens[branch]) % self.page_size and holders[self.tables[branch][-1]] > 1:
                holders[self.tables[branch][-1]] -= 1
                copying.append(i)
        return copying

    def needed(self, branches: Sequence[int], counts: Sequence[int]) -> int:
        grown = sum(
            self.columns(len(self.tokens[b]) + n) - len(self.tables[b]) for b, n in zip(branches, counts, strict=True)
        )
        return grown + len(self.copies(branches, counts))

    def stats(self) -> ForestStats:
        read = {
            (table[i // self.page_size], i % self.page_size)
            for branch, table in self.tables.items()
            for i in range(len(self.tokens[branch]))
        }
        return ForestStats(
            branches=len(self.tokens),
            pages_total=self.num_pages,
            pages_free=self.num_pages - len(self.held()),
            logical_tokens=sum(map(len, self.tokens.values())),
            unique_tokens=len(read),
        )


class ForestMachine(RuleBasedStateMachine):
    """Any sequence of operations, out-of-pages faults and other errors among them."""

    @initialize(num_pages=st.integers(1, 40), page_size=st.sampled_from([1, 2, 3, 4, 16]))
    def start(self, num_pages: int, page_size: int) -> None:
        self.forest = KVForest(num_pages, page_size)
        self.model = Model(num_pages, page_size)
        self.cache = torch.full((num_pages, page_size), -1, dtype=torch.int64)
        self.next_token = 0
        self.freed: set[int] = set()

    def some(self, data: st.DataObject, **options: Any) -> list[int]:
        live = sorted(self.model.tokens)
        return data.draw(st.lists(st.sampled_from(live), max_size=8, **options)) if live else []

    def wrapped(self, data: st.DataObject, ints: list[int]) -> Any:
        return CONTAINERS[data.draw(st.sampled_from(sorted(CONTAINERS)))](ints)

    @rule()
    def add_root(self) -> None:
        self.model.add(self.forest.add_root())

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parents = self.some(data)
        children = self.forest.fork(self.wrapped(data, parents))
        assert len(children) == len(parents)
        assert not self.freed & set(children)
        for child, parent in zip(children, parents, strict=True):
            self.model.add(child, parent)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        branches = self.some(data, unique=True)
        self.forest.free(self.wrapped(data, branches))
        self.freed.update(branches)
        for branch in branches:
            del self.model.tokens[branch], self.model.tables[branch]

    @precondition(lambda self: self.model.tokens)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        branch = data.draw(st.sampled_from(sorted(self.model.tokens)))
        length = data.draw(st.integers(0, len(self.model.tokens[branch])))
        self.forest.truncate(branch, length)
        del self.model.tokens[branch][length:]
        del self.model.tables[branch][self.model.columns(length) :]

    @rule(data=st.data(), most=st.sampled_from([1, 3, 20, 200]))
    def append(self, data: st.DataObject, most: int) -> None:
        branches = self.some(data, unique=True)
        counts = [data.draw(st.integers(0, most)) for _ in branches]
        needed, free = self.model.needed(branches, counts), self.model.stats().pages_free
        arguments = self.wrapped(data, branches), self.wrapped(data, counts)
        if needed > free:
            with pytest.raises(OutOfPages, match=f"{needed} needed, {free} free") as error:
                self.forest.append(*arguments)
            assert (error.value.needed, error.value.free) == (needed, free)
            return
        copying, held = self.model.copies(branches, counts), self.model.held()
        slots, copy_src, copy_dst = self.forest.append(*arguments)
        assert slots.dtype == copy_src.dtype == copy_dst.dtype == torch.int32

        # The copies are those that the model foresees, onto pages that nobody held.
        assert copy_src.tolist() == [self.model.tables[branches[i]][-1] for i in copying]
        assert not held & set(copy_dst.tolist())
        for i, page in zip(copying, copy_dst.tolist(), strict=True):
            self.model.tables[branches[i]][-1] = page

        # Slots continue each branch's last page, then go on in fresh ones. Replay on the cache.
        self.cache[copy_dst.long()] = self.cache[copy_src.long()]
        places = iter(slots.tolist())
        for branch, count in zip(branches, counts, strict=True):
            tokens, table = self.model.tokens[branch], self.model.tables[branch]
            for _ in range(count):
                page, offset = divmod(next(places), self.model.page_size)
                assert offset == len(tokens) % self.model.page_size
                if offset == 0:
                    assert page not in held | set(copy_dst.tolist())
                    table.append(page)
                assert table[-1] == page
                self.cache[page, offset] = self.next_token
                tokens.append(self.next_token)
                self.next_token += 1
        assert next(places, None) is None

    @rule(data=st.data())
    def errors(self, data: st.DataObject) -> None:
        live = sorted(self.model.tokens)
        dead = data.draw(st.sampled_from([-1, 10**6, 2**70, -(2**70), *sorted(self.freed)]))
        faults: list[tuple[type[Exception], str, Callable[[], object]]] = [
            (IndexError, "branches", lambda: self.forest.free([*live, dead])),
            (IndexError, "branches", lambda: self.forest.append([*live, dead], [1] * (len(live) + 1))),
            (IndexError, "parents", lambda: self.forest.fork([*live, dead])),
            (IndexError, "branches", lambda: self.forest.page_table([*live, dead])),
            (IndexError, "branch", lambda: self.forest.truncate(dead, 0)),
            (IndexError, "branch", lambda: self.forest.length(dead)),
            (ValueError, "counts", lambda: self.forest.append(live, [1] * (len(live) + 1))),
            (TypeError, "branches", lambda: self.forest.free([*live, 0.0])),
            (TypeError, "branches", lambda: self.forest.free([*live, False])),
            (TypeError, "counts", lambda: self.forest.append(live[:1], torch.ones(1))),
        ]
        if live:
            one, length = live[-1], len(self.model.tokens[live[-1]])
            faults += [
                (ValueError, "branches", lambda: self.forest.free([*live, one])),
                (ValueError, "branches", lambda: self.forest.append([*live, one], [1] * (len(live) + 1))),
                (ValueError, "counts", lambda: self.forest.append(live, [1] * (len(live) - 1) + [-1])),
                (ValueError, "length", lambda: self.forest.truncate(one, length + 1)),
                (ValueError, "length", lambda: self.forest.truncate(one, -1)),
                (OutOfPages, "needed", lambda: self.forest.append(live, [2**62] * len(live))),
            ]
        kind, argument, fault = data.draw(st.sampled_from(faults))
        with pytest.raises(kind, match=argument):
            fault()

    @invariant()
    def pages_lengths_and_tokens_are_the_models(self) -> None:
        if not hasattr(self, "forest"):
            return
        stats = self.forest.stats()
        assert stats == self.model.stats()  # free + used = total, and free is what no live table holds
        branches = sorted(self.model.tokens)
        table, kv_lens = self.forest.page_table(branches)
        assert table.dtype == kv_lens.dtype == torch.int32
        width = max((len(self.model.tables[b]) for b in branches), default=0)
        assert table.shape == (len(branches), width)
        for branch, row, length in zip(branches, table.tolist(), kv_lens.tolist(), strict=True):
            expected = self.model.tables[branch]
            assert row == expected + [-1] * (width - len(expected))
            assert length == self.forest.length(branch) == len(self.model.tokens[branch])
            gathered = self.cache[torch.tensor(expected, dtype=torch.int64)].reshape(-1)[:length]
            assert gathered.tolist() == self.model.tokens[branch]


TestForest = ForestMachine.TestCase
TestForest.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# ---- Semantics, one at a time ------------------------------------------------------------------------------


def test_a_fork_copies_no_token_and_parents_live_on() -> None:
    forest = KVForest(8, page_size=4)
    root = forest.add_root()
    forest.append([root], [6])
    children = forest.fork([root, root])
    assert forest.stats() == ForestStats(3, 8, 6, 18, 6)
    assert forest.length(root) == 6
    assert [forest.page_table([b])[0].tolist() for b in [root, *children]] == [[[0, 1]]] * 3


def test_the_last_holder_writes_in_place_and_earlier_entries_copy() -> None:
    forest = KVForest(8, page_size=4)
    root = forest.add_root()
    forest.append([root], [6])
    a, b = forest.fork([root, root])
    forest.free([root])
    slots, copy_src, copy_dst = forest.append([b, a], [1, 1])
    assert copy_src.tolist() == [1]
    assert copy_dst.tolist() == [2]
    assert slots.tolist() == [2 * 4 + 2, 1 * 4 + 2]
    assert forest.page_table([a, b])[0].tolist() == [[0, 1], [0, 2]]


def test_an_entry_of_count_zero_neither_copies_nor_leaves_a_page() -> None:
    forest = KVForest(8, page_size=4)
    root = forest.add_root()
    forest.append([root], [6])
    (child,) = forest.fork([root])
    slots, copy_src, _ = forest.append([root, child], [0, 1])
    assert copy_src.tolist() == [1]  # root still holds it
    assert slots.tolist() == [2 * 4 + 2]


def test_a_survivor_that_replaces_its_freed_parent_copies_nothing() -> None:
    forest = KVForest(4, page_size=4)
    branch = forest.add_root()
    forest.append([branch], [1])
    for length in range(2, 17):
        (child,) = forest.fork([branch])
        forest.free([branch])
        result = forest.append([child], [1])
        assert result.copy_src.numel() == 0
        assert result.slots.tolist() == [length - 1]
        branch = child
    assert forest.stats().pages_free == 0


def test_an_append_that_does_not_fit_says_how_many_pages_it_needs() -> None:
    forest = KVForest(4, page_size=4)
    a, b = forest.add_root(), forest.add_root()
    forest.append([a, b], [5, 3])
    with pytest.raises(OutOfPages, match="3 needed, 1 free") as error:
        forest.append([a, b], [4, 6])
    assert (error.value.needed, error.value.free) == (3, 1)
    assert isinstance(error.value, RuntimeError)
    assert forest.append([a, b], [3, 5]).slots.tolist() == [5, 6, 7, 11, 12, 13, 14, 15]


def test_truncating_inside_a_shared_stretch_leaves_the_others_alone() -> None:
    forest = KVForest(16, page_size=4)
    a = forest.add_root()
    forest.append([a], [14])
    (b,) = forest.fork([a])
    forest.truncate(b, 6)
    assert forest.stats() == ForestStats(2, 16, 12, 20, 14)
    slots, copy_src, copy_dst = forest.append([b], [3])
    assert (copy_src.tolist(), copy_dst.tolist()) == ([1], [4])
    assert slots.tolist() == [18, 19, 20]
    assert forest.page_table([a, b])[0].tolist() == [[0, 1, 2, 3], [0, 4, 5, -1]]
    forest.truncate(b, 0)
    assert forest.stats() == ForestStats(2, 16, 12, 14, 14)
    assert forest.append([b], [1]).copy_src.numel() == 0


def test_nothing_in_nothing_out() -> None:
    forest = KVForest(2)
    for empty in ([], (), range(0), torch.empty(0, dtype=torch.int64), array.array("i")):
        assert forest.fork(empty) == []
        assert [t.shape for t in forest.append(empty, empty)] == [(0,)] * 3
        forest.free(empty)
        table, kv_lens = forest.page_table(empty)
        assert (table.shape, kv_lens.shape, table.dtype) == ((0, 0), (0,), torch.int32)
    root = forest.add_root()
    assert [t.numel() for t in forest.append([root], [0])] == [0] * 3
    table, kv_lens = forest.page_table([root, root])
    assert table.shape == (2, 0)
    assert kv_lens.tolist() == [0, 0]
    assert forest.stats() == ForestStats(1, 2, 2, 0, 0)


def test_branch_numbers_are_never_used_again() -> None:
    forest = KVForest(1)
    seen = set()
    for _ in range(1000):
        branch = forest.add_root()
        assert branch not in seen
        seen.add(branch)
        forest.free([branch])
        with pytest.raises(IndexError, match=f"branch: expected a live branch, got {branch}, which was freed"):
            forest.length(branch)


def test_results_outlive_the_forest() -> None:
    forest = KVForest(4, page_size=2)
    root = forest.add_root()
    slots = forest.append([root], [5]).slots
    table, kv_lens = forest.page_table([root])
    del forest
    assert (slots.tolist(), table.tolist(), kv_lens.tolist()) == ([0, 1, 2, 3, 4], [[0, 1, 2]], [5])


def test_slots_up_to_the_end_of_int32() -> None:
    forest = KVForest(2047, page_size=2**20)
    roots = [forest.add_root() for _ in range(2047)]
    slots = forest.append(roots, [1] * 2047).slots
    assert slots.long().equal(torch.arange(2047) * 2**20)
    assert forest.stats().pages_free == 0


@pytest.mark.parametrize("step", [1, 4, 5])  # within, at and across the ends of pages
def test_a_long_chain_of_forks_is_planned_as_one_stretch(step: int) -> None:
    forest = KVForest(10_000, page_size=4)
    branch = forest.add_root()
    for _ in range(5000):
        (child,) = forest.fork([branch])
        forest.append([child], [step])
        forest.free([branch])
        branch = child
    assert forest.stats().unique_tokens == 5000 * step
    plan = forest.plan([branch], num_q_heads=1, num_kv_heads=1, head_dim=1)
    assert plan.segments[:, 3:5].unique(dim=0).tolist() == [[0, 0], [0, 1]]  # nothing, and the row
    assert plan.segments[: plan.sizes[0], 2].sum() == 5000 * step
    assert plan.pages[: plan.sizes[3]].tolist() == forest.page_table([branch])[0][0].tolist()


def test_ten_thousand_branches_of_32_000_tokens() -> None:
    branches = 10_000
    forest = KVForest(2 * branches + 4000)
    root = forest.add_root()
    forest.append([root], [31_990])
    children = forest.fork([root] * branches)
    forest.free([root])
    result = forest.append(children, [10] * branches)  # the trunk's last page is copied for all but the last
    assert result.copy_src.shape == (branches - 1,)
    assert result.slots.unique().shape == (10 * branches,)
    assert forest.stats() == ForestStats(branches, 24_000, 22_001 - branches, 32_000 * branches, 31_984 + 16 * branches)
    table, kv_lens = forest.page_table(children)
    assert table.shape == (branches, 2000)
    assert kv_lens.eq(32_000).all()
    assert table[:, :1999].eq(table[:1, :1999]).all()
    assert table[:, 1999].unique().shape == (branches,)
    forest.free(children)
    assert forest.stats() == ForestStats(0, 24_000, 24_000, 0, 0)


# ---- Errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([0, True], TypeError, r"branches\[1\]: expected an int, got bool"),
        ([0.0], TypeError, r"branches\[0\]: expected an int, got float"),
        (["0"], TypeError, r"branches\[0\]: expected an int, got str"),
        ([None], TypeError, r"branches\[0\]: expected an int, got NoneType"),
        ("0", TypeError, "branches: expected a sequence of int, got str"),
        (0, TypeError, "branches: expected a sequence of int, got int"),
        ({0}, TypeError, "branches: expected a sequence of int, got set"),
        (None, TypeError, "branches: expected a sequence of int, got NoneType"),
        (array.array("d", [0]), TypeError, "branches: expected ints"),
        (torch.zeros(1), TypeError, r"branches: expected ints, got a tensor \[1\] of torch.float32"),
        (torch.zeros(1, dtype=torch.bool), TypeError, "branches: expected ints"),
        (torch.zeros(1).numpy(), TypeError, "branches: expected ints"),
        (torch.zeros(1, 1, dtype=torch.int64), ValueError, "branches: expected one dimension"),
        (torch.zeros(1, 1, dtype=torch.int64).numpy(), ValueError, "branches: expected one dimension"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "branches: expected ints on the CPU"),
        ([-1], IndexError, r"branches\[0\]: expected a live branch, got -1, which never was one"),
        ([0, 2**80], IndexError, r"branches\[1\]: expected a live branch"),
        (torch.tensor([2**64 - 1], dtype=torch.uint64).numpy(), IndexError, r"branches\[0\]"),
        ([0, 1, 0], ValueError, r"branches\[2\]: expected each branch once, got 0 again"),
    ],
)
def test_bad_branches_are_named(values: Any, kind: type[Exception], message: str) -> None:
    forest = KVForest(2)
    forest.add_root()
    forest.add_root()
    with pytest.raises(kind, match=f"^{message}"):
        forest.free(values)
    assert forest.stats().branches == 2


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((0, 16), ValueError, "num_pages: expected at least 1, got 0"),
        ((1, 0), ValueError, "page_size: expected at least 1, got 0"),
        ((2**21, 2**10), ValueError, r"num_pages: expected num_pages \* page_size below 2\*\*31"),
        ((2**70, 16), ValueError, "num_pages"),
        ((1.0, 16), TypeError, "num_pages: expected an int, got float"),
        ((4, True), TypeError, "page_size: expected an int, got bool"),
    ],
)
def test_a_pool_must_have_slots_that_int32_can_name(arguments: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        KVForest(*arguments)


def test_items_that_stand_for_ints_are_taken_as_such() -> None:
    class Index:
        def __index__(self) -> int:
            return 1

    forest = KVForest(2)
    forest.add_root()
    forest.add_root()
    branches = torch.arange(2)
    assert len(forest.fork([Index(), branches[0], branches.numpy()[1]])) == 3


def test_a_list_that_shrinks_while_it_is_read() -> None:
    forest = KVForest(2)
    forest.add_root()

    class Shrinking:
        def __index__(self) -> int:
            branches.clear()
            return 0

    branches: list[Any] = [Shrinking(), 0, 0]
    assert len(forest.fork(branches)) == 1


def test_a_forest_may_change_while_a_plan_takes_its_arguments() -> None:
    """The planner reads the forest in place; an int that frees a branch must have done so before."""
    forest = KVForest(4096, page_size=1)
    root = forest.add_root()
    forest.append([root], [3000])

    class Freeing:
        def __index__(self) -> int:
            forest.free([root])
            return 1

    with pytest.raises(IndexError, match=r"^branches\[0\].*freed"):
        forest.plan([root], [Freeing()], num_q_heads=1, num_kv_heads=1, head_dim=8)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its address space")
def test_without_memory_an_append_changes_nothing() -> None:
    code = """
import resource, tts_kernels as tk
forest = tk.KVForest(2**27 - 1)
root = forest.add_root()
forest.append([root], [10])
before = forest.stats()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for spare in (1 << 28, 4_200_000_000):  # none for the slots; none for the pages beside them
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    try:
        forest.append([root], [1_000_000_003])
    except MemoryError:
        print("MemoryError")
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert forest.stats() == before, forest.stats()
assert forest.append([root], [1]).slots.tolist() == [10]
forest.free([root])
assert forest.stats().pages_free == 2**27 - 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "MemoryError\nMemoryError\n"), done.stderr
