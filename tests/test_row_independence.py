"""A row's result depends on the row and what it reads, to the bit: not on its neighbours, on who shares what with whom,
on the forwards that a text was cut into, on pages, on plans or on threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rules import DTYPES, threads
from torch import Tensor

import tts_kernels as tk


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bits: a NaN is itself, and -0.0 is not 0.0."""
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(ints), b.contiguous().view(ints))


# ---- Attention -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What the tokens of all texts have in common."""

    q_heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    stored: str | None = None  # how the cache has them, if quantised


@dataclass(frozen=True, repr=False)
class Text:
    """Keys, values [n, Hkv, D] and queries [n, Hq, D] of a text's tokens."""

    k: Tensor
    v: Tensor
    q: Tensor

    @staticmethod
    def draw(shape: Shape, tokens: int, large: float = 1.0) -> Text:
        k, v = (torch.randn(tokens, shape.kv_heads, shape.dim).mul(large).to(shape.dtype) for _ in range(2))
        return Text(k, v, torch.randn(tokens, shape.q_heads, shape.dim).mul(large).to(shape.dtype))

    def __len__(self) -> int:
        return len(self.k)

    def __getitem__(self, part: slice) -> Text:
        return Text(self.k[part], self.v[part], self.q[part])

    def __add__(self, other: Text) -> Text:
        return Text(*(torch.cat([getattr(self, n), getattr(other, n)]) for n in ("k", "v", "q")))


@dataclass(repr=False)
class World:
    """A forest whose branches hold texts, in caches whose other slots are NaN."""

    shape: Shape
    page_size: int
    pages: int
    texts: dict[int, Text] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.forest = tk.KVForest(self.pages, self.page_size)
        shape = self.shape
        self.cache = tk.KVCache(
            1, self.pages, shape.kv_heads, shape.dim, self.page_size, dtype=shape.stored or shape.dtype
        )
        for t in self.cache.tensors():
            t.fill_(torch.nan if t.is_floating_point() else 77)

    def root(self) -> int:
        branch = self.forest.add_root()
        self.texts[branch] = Text.draw(self.shape, 0)
        return branch

    def fork(self, branch: int) -> int:
        (child,) = self.forest.fork([branch])
        self.texts[child] = self.texts[branch]
        return child

    def append(self, branch: int, text: Text) -> None:
        new = self.forest.append([branch], [len(text)])
        self.cache.copy_pages(new.copy_src, new.copy_dst)
        self.cache.append(0, text.k, text.v, new.slots)
        self.texts[branch] += text

    def attend(self, branches: Sequence[int], q_lens: Sequence[int], table: bool, **options: Any) -> list[Tensor]:
        """Out and lse, flat, of each branch's last ``q_lens`` rows."""
        heads = {"num_q_heads": self.shape.q_heads, "num_kv_heads": self.shape.kv_heads, "head_dim": self.shape.dim}
        if options.pop("plan_window", False):
            heads["window"] = options.get("window")
        if table:
            pages, kv_lens = self.forest.page_table(branches)
            plan = tk.plan_attention(pages, kv_lens, q_lens, page_size=self.page_size, **heads)
        else:
            plan = self.forest.plan(branches, q_lens, **heads)
        q = torch.cat([self.texts[b].q[len(self.texts[b]) - n :] for b, n in zip(branches, q_lens, strict=True)])
        options |= self.cache.beside(0)
        out, lse = tk.tree_attention(q, self.cache.k[0], self.cache.v[0], plan, return_lse=True, **options)
        both = torch.cat([out.float(), lse[..., None]], dim=-1)  # float32 holds every bfloat16 and float16
        return list(both.split(list(q_lens)))


def alone(shape: Shape, text: Text, **options: Any) -> Tensor:
    """Every row of a text, by one forward of that text alone."""
    world = World(shape, 16, len(text) // 16 + 1)
    root = world.root()
    world.append(root, text)
    return world.attend([root], [len(text)], False, **options)[0]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 3, 4, 16]))
    return Shape(kv_heads * group, kv_heads, draw(st.sampled_from([8, 20, 64])), draw(st.sampled_from(DTYPES)))


@st.composite
def option_sets(draw: st.DrawFn, shape: Shape) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if draw(st.integers(0, 2)) == 0:
        options["window"] = draw(st.one_of(st.integers(1, 100), st.integers(1, 1500)))
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([0.7, 20.0]))
    if draw(st.integers(0, 3)) == 0:
        options["scale"] = draw(st.sampled_from([1.0, -0.2, 0.05]))
    if draw(st.integers(0, 3)) == 0:
        options["sinks"] = torch.randn(shape.q_heads)
    return options


lengths = st.one_of(st.integers(1, 200), st.integers(1, 200), st.integers(400, 1300))


@st.composite
def worlds(draw: st.DrawFn, shape: Shape, text: Text) -> tuple[World, int, list[int]]:
    """A world in which some branch has the text, and the others, which share any part of it, or nothing."""
    company, page_size = draw(st.integers(0, 14)), draw(st.sampled_from([1, 3, 16, 64, 100]))
    world = World(shape, page_size, (len(text) + 700 * company) // page_size + 4 * company + 20)
    live = [world.root() for _ in range(draw(st.integers(1, 3)))]
    target = live[0]
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        world.append(target, text[begin:end])
        for _ in range(draw(st.integers(0, 3)) if company else 0):
            company -= 1
            parent = draw(st.sampled_from([target, target, *live]))
            child = world.fork(parent)
            own = draw(st.one_of(st.integers(0, 80), st.integers(0, 600)))
            world.append(child, Text.draw(shape, own, draw(st.sampled_from([1.0, 1.0, 8.0]))))
            live.append(child)
            if company <= 0:
                break
        if draw(st.integers(0, 5)) == 0:  # the text goes on in a child, and its parent may go
            parent, target = target, world.fork(target)
            live.append(target)
            if draw(st.booleans()):
                world.forest.free([parent])
                live.remove(parent)
    return world, target, [b for b in live if b != target]


ATTENTION = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@ATTENTION
@given(shape=shapes(), tokens=lengths, seed=st.integers(0, 2**31), data=st.data())
def test_attention_in_any_company(shape: Shape, tokens: int, seed: int, data: st.DataObject) -> None:
    check_company(shape, tokens, seed, data)


@ATTENTION
@given(
    shape=shapes(),
    stored=st.sampled_from(["int8", "int4"]),
    tokens=lengths,
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_attention_of_a_quantised_cache_in_any_company(
    shape: Shape, stored: str, tokens: int, seed: int, data: st.DataObject
) -> None:
    check_company(replace(shape, stored=stored), tokens, seed, data)


def check_company(shape: Shape, tokens: int, seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    text = Text.draw(shape, tokens)
    options = data.draw(option_sets(shape))
    expected = alone(shape, text, **options)
    world, target, others = data.draw(worlds(shape, text))
    company = data.draw(st.lists(st.sampled_from(others), max_size=12) if others else st.just([]))
    branches = data.draw(st.permutations([target, *company]))
    q_lens = [
        min(world.forest.length(b), data.draw(st.sampled_from([0, 1, 1, 1, 2, 7, 40, 500])))
        if b != target
        else min(tokens, data.draw(st.sampled_from([1, 1, 2, 7, 64, 5000])))
        for b in branches
    ]
    with threads(data.draw(st.sampled_from([1, 2]))):
        got = world.attend(branches, q_lens, data.draw(st.booleans()), plan_window=data.draw(st.booleans()), **options)
    at = branches.index(target)
    assert same_bits(got[at], expected[tokens - q_lens[at] :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "stored"),
    [({}, None), ({"window": 300}, None), ({"softcap": 5.0}, None), ({}, "int8"), ({"window": 300}, "int4")],
    ids=["plain", "window", "softcap", "quantised_cache-int8", "quantised_cache-int4"],
)
def test_attention_in_any_number_of_forwards(options: dict[str, Any], stored: str | None, dtype: torch.dtype) -> None:
    """At once, in chunks of 1, 7, 64 and 600 rows, and beside 40 branches that share all of it."""
    shape = Shape(8, 2, 64, dtype, stored)
    text = Text.draw(shape, 700)
    expected = alone(shape, text, **options)
    for rows in (1, 7, 64, 600):
        world = World(shape, 16, 60)
        root = world.root()
        for begin in range(0, len(text), rows):
            part = text[begin : begin + rows]
            world.append(root, part)
            if rows > 1 or begin % 50 == 0:
                (got,) = world.attend([root], [len(part)], False, **options)
                assert same_bits(got, expected[begin : begin + rows]), (rows, begin)
    world = World(shape, 16, 400)
    root = world.root()
    world.append(root, text[:650])
    branches = [world.fork(root) for _ in range(40)]
    for i, branch in enumerate(branches):
        world.append(branch, text[650:] if i == 17 else Text.draw(shape, 3 * i))
    got = world.attend(branches, [1] * 40, False, **options)
    assert same_bits(got[17], expected[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 16])
def test_zeros_have_one_sign_in_any_company(group: int, dtype: torch.dtype) -> None:
    """Where weight * value underflows below 0, a row becomes -0.0; keys that others see must not make it 0.0."""
    shape = Shape(2 * group, 2, 64, dtype)
    text = vanishing(shape, 1300)
    expected = alone(shape, text)
    for at in (100, 600, 1087, 1100, 1151, 1152):
        world = World(shape, 16, at // 16 + 1)
        root = world.root()
        world.append(root, text[: at + 1])
        (got,) = world.attend([root], [1], False)
        assert same_bits(got[0], expected[at]), at


def vanishing(shape: Shape, tokens: int) -> Text:
    """Tokens 0 and 1024 have all the weight and zeros as values; beside them each other weight * value underflows."""
    k, v = (torch.zeros(tokens, shape.kv_heads, shape.dim, dtype=shape.dtype) for _ in range(2))
    heavy = torch.arange(0, tokens, 1024)
    k[heavy], v[:] = 10.0, -(2.0**-24) if shape.dtype == torch.float16 else -(2.0**-100)
    v[heavy] = 0.0
    return Text(k, v, torch.ones(tokens, shape.q_heads, shape.dim, dtype=shape.dtype))


# ---- The other operators -------------------------------------------------------------------------------------


def rows_of(count: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, width).to(dtype)


def linear_of(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(50, x.shape[1], generator=generator).to(x.dtype)
    return tk.linear(x, tk.pack_linear(weight))


def rope_append_of(x: Tensor, seed: int) -> Tensor:  # noqa: ARG001
    rows = len(x)
    caches = [torch.zeros(rows, 1, 1, 16, dtype=x.dtype) for _ in range(2)]
    angles = torch.linspace(0, 3, 8)
    cos_sin = torch.cat([angles.cos(), angles.sin()]).repeat(1, 1)
    positions, slots = torch.zeros(rows, dtype=torch.int64), torch.arange(rows)
    q = tk.rope_append_(x, *caches, positions, cos_sin, slots, num_q_heads=2, num_kv_heads=1)
    return torch.cat([q.flatten(1), *(c.flatten(1) for c in caches)], dim=1)


def logprob_of(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1500, x.shape[1], generator=generator).to(x.dtype)
    return tk.linear_logprob(x, weight, torch.full((len(x),), seed % 1500), temperature=0.7)


def sample_of(x: Tensor, seed: int) -> Tensor:
    seeds = torch.full((len(x),), seed, dtype=torch.int64)
    tokens, logprobs = tk.sample(x, temperature=0.9, top_k=30, top_p=0.9, seeds=seeds, offsets=seeds)
    return torch.stack([tokens.float(), logprobs], dim=1)


def step_scores_of(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    good, bad = (torch.randn(x.shape[1], generator=generator).to(x.dtype) for _ in range(2))
    return tk.step_scores(x, torch.arange(len(x)), tk.ScoreHead.label_pair(good, bad))


def hidden_scores_of(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w1, b1, w2, b2 = (
        torch.randn(*s, generator=generator).to(x.dtype) for s in ((24, x.shape[1]), (24,), (2, 24), (2,))
    )
    return tk.step_scores(x, torch.arange(len(x)), tk.ScoreHead.mlp(w1, b1, w2, b2))


ROW_WISE: dict[str, tuple[int, Callable[[Tensor, int], Tensor]]] = {  # width of a row, the operator
    "linear": (70, linear_of),
    "rms_norm": (70, lambda x, _: tk.rms_norm(x, torch.linspace(0.5, 2, 70).to(x.dtype), 1e-6)[0]),
    "rope_append_": (64, rope_append_of),
    "swiglu": (64, lambda x, _: tk.swiglu(x)),
    "quantize_rows": (64, lambda x, _: tk.quantize_rows(x, 3, 32)),
    "linear_logprob": (70, logprob_of),
    "sample": (3000, sample_of),
    "step_scores": (70, step_scores_of),
    "step_scores, hidden layer": (70, hidden_scores_of),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROW_WISE)
@settings(max_examples=25, deadline=None)
@given(count=st.one_of(st.integers(1, 40), st.integers(1, 300)), seed=st.integers(0, 2**31), data=st.data())
def test_rows_do_not_meet(name: str, dtype: torch.dtype, count: int, seed: int, data: st.DataObject) -> None:
    """A row among 1 to 300 others, wherever it stands, is what it is alone."""
    torch.manual_seed(seed)
    width, operator = ROW_WISE[name]
    row, at = rows_of(1, width, dtype), data.draw(st.integers(0, count - 1))
    batch = rows_of(count, width, dtype) * data.draw(st.sampled_from([1.0, 100.0]))
    batch[at] = row[0]
    with threads(data.draw(st.sampled_from([1, 2]))):
        got = operator(batch, seed)
    assert same_bits(got[at : at + 1], operator(row, seed))
