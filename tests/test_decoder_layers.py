from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from rules import DTYPES, assert_names, assert_rule, compilations
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference
from tts_kernels.ops.decoder_layers import PLAN

HIDDEN, Q_HEADS, KV_HEADS, HEAD_DIM, INNER, PAGES, PAGE_SIZE = 24, 4, 2, 6, 33, 12, 4
EPS = 1e-5


@dataclass
class Case:
    """The arguments of decoder_layers_: two branches that share a prompt, in the middle of a random tree."""

    x: torch.Tensor
    layers: tk.DecoderLayers
    k_caches: list[torch.Tensor]
    v_caches: list[torch.Tensor]
    plan: tk.AttentionPlan
    positions: torch.Tensor
    cos_sin: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor | None = None
    k_scales: Sequence[torch.Tensor] = ()
    v_scales: Sequence[torch.Tensor] = ()
    k_zeros: Sequence[torch.Tensor] = ()
    v_zeros: Sequence[torch.Tensor] = ()

    @classmethod
    def random(
        cls,
        dtype: torch.dtype,
        depth: int = 2,
        *,
        full: bool = True,
        rows: list[int] | None = None,
        quantize: str | None = None,
    ) -> Case:
        torch.manual_seed(depth)
        forest = tk.KVForest(PAGES, page_size=PAGE_SIZE)
        root = forest.add_root()
        forest.append([root], [9])
        branches = forest.fork([root, root])
        counts = [1, 3]
        slots = forest.append(branches, counts).slots.to(torch.get_default_device())
        positions = torch.tensor([9, 9, 10, 11])
        plan = forest.plan(branches, counts, num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
        theta = torch.arange(20)[:, None] * 10.0 ** -torch.linspace(0, 1, HEAD_DIM // 2)
        caches = torch.randn(2, depth, PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM).to(dtype)
        return cls(
            torch.randn(4, HIDDEN).to(dtype),
            tk.DecoderLayers([layer(dtype, full, [None, 5][i % 2], quantize) for i in range(depth)]),
            list(caches[0]),
            list(caches[1]),
            plan,
            positions,
            torch.cat([theta.cos(), theta.sin()], dim=-1),
            slots,
            None if rows is None else torch.tensor(rows, dtype=torch.int64),
        )

    def copy(self) -> Case:
        return replace(self, k_caches=[c.clone() for c in self.k_caches], v_caches=[c.clone() for c in self.v_caches])

    def run(self) -> torch.Tensor:
        return tk.decoder_layers_(**vars(self), eps=EPS)

    def args(self, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        """Those of the operator; with a dtype, what is not an index in it, and the rotary table as it is."""

        def cast(t: torch.Tensor) -> torch.Tensor:
            return t if dtype is None else t.to(dtype)

        return (
            cast(self.x),
            [cast(t) for t in self.layers.weights],
            [cast(t) for t in self.k_caches],
            [cast(t) for t in self.v_caches],
            self.positions,
            self.cos_sin,
            self.slots,
            self.rows,
            [getattr(self.plan, name) for name in PLAN],
            PAGE_SIZE,
            Q_HEADS,
            KV_HEADS,
            self.plan.max_slots,
            INNER,
            self.layers.windows,
            EPS,
            list(self.k_scales),
            list(self.v_scales),
            list(self.k_zeros),
            list(self.v_zeros),
        )

    def quantised(self, stored: str) -> Case:
        """The same over quantised caches of the same keys and values."""
        cache = tk.KVCache(len(self.k_caches), PAGES, KV_HEADS, HEAD_DIM, PAGE_SIZE, dtype=stored)
        for i, (k, v) in enumerate(zip(self.k_caches, self.v_caches, strict=True)):
            cache.append(i, k.flatten(0, 1), v.flatten(0, 1), torch.arange(PAGES * PAGE_SIZE))
        scales = (cache.k_scale, cache.v_scale, cache.k_zero, cache.v_zero)
        names = ("k_scales", "v_scales", "k_zeros", "v_zeros")
        beside = dict(zip(names, map(list, scales), strict=True))
        return replace(self, k_caches=list(cache.k), v_caches=list(cache.v), **beside)

    def beside(self, layer: int) -> dict[str, torch.Tensor]:
        names = {"k_scale": self.k_scales, "v_scale": self.v_scales, "k_zero": self.k_zeros, "v_zero": self.v_zeros}
        return {name: some[layer] for name, some in names.items() if some}


def layer(dtype: torch.dtype, full: bool, window: int | None, quantize: str | None = None) -> tk.DecoderLayer:
    """Random weights; with biases and norms of heads if `full`. "zeros": one projection has zero points."""

    def packed(rows: int, columns: int) -> tk.PackedLinear:
        weight = torch.randn(rows, columns) / columns**0.5
        if quantize == "zeros":
            q, zero = (weight * 50).to(torch.int8), torch.randint(-9, 9, (rows, 1))
            return tk.PackedLinear.from_quantized(q, torch.full((rows, 1), 0.02), zero)
        return tk.pack_linear(weight.to(dtype), quantize=quantize, group_size=32 if quantize == "int4" else None)

    def vector(size: int) -> torch.Tensor:
        return (torch.rand(size) + 0.5).to(dtype)

    qkv_width = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
    more = (
        {
            "qkv_bias": vector(qkv_width), "q_norm": vector(HEAD_DIM), "k_norm": vector(HEAD_DIM),
            "o_bias": vector(HIDDEN), "gate_up_bias": vector(2 * INNER), "down_bias": vector(HIDDEN),
        }
        if full
        else {}
    )  # fmt: skip
    return tk.DecoderLayer(
        input_norm=vector(HIDDEN),
        qkv=packed(qkv_width, HIDDEN),
        o=packed(HIDDEN, Q_HEADS * HEAD_DIM),
        post_norm=vector(HIDDEN),
        gate_up=packed(2 * INNER, HIDDEN),
        down=packed(HIDDEN, INNER),
        window=window,
        **more,
    )


def one_by_one(case: Case) -> torch.Tensor:
    """The same by the public operators."""
    x = case.x
    for i, (part, k, v) in enumerate(zip(case.layers.layers, case.k_caches, case.v_caches, strict=True)):
        q = tk.rope_append_(
            tk.linear(tk.rms_norm(x, part.input_norm, EPS)[0], part.qkv, part.qkv_bias),
            k,
            v,
            case.positions,
            case.cos_sin,
            case.slots,
            num_q_heads=Q_HEADS,
            num_kv_heads=KV_HEADS,
            q_norm=part.q_norm,
            k_norm=part.k_norm,
            eps=EPS,
            **case.beside(i),
        )
        attended = tk.tree_attention(q, k, v, case.plan, window=part.window, **case.beside(i)).flatten(1)
        if case.rows is not None and i == len(case.layers) - 1:
            attended, x = attended[case.rows], x[case.rows]
        x = tk.linear(attended, part.o, part.o_bias, residual=x)
        units = tk.linear(tk.rms_norm(x, part.post_norm, EPS)[0], part.gate_up, part.gate_up_bias)
        x = tk.linear(tk.swiglu(units), part.down, part.down_bias, residual=x)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("rows", [None, [3, 0, 3], []])
def test_is_its_operators_to_the_bit(dtype: torch.dtype, full: bool, rows: list[int] | None) -> None:
    ours = Case.random(dtype, 3, full=full, rows=rows)
    theirs = ours.copy()
    out = ours.run()
    assert out.dtype == dtype
    assert torch.equal(out, one_by_one(theirs))
    for mine, other in zip(ours.k_caches + ours.v_caches, theirs.k_caches + theirs.v_caches, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("quantize", ["int8", "int4", "zeros"])
@pytest.mark.parametrize("full", [True, False])
def test_quantised_projections_to_the_bit(quantize: str, full: bool) -> None:
    ours = Case.random(torch.bfloat16, full=full, quantize=quantize)
    theirs = ours.copy()
    assert torch.equal(ours.run(), one_by_one(theirs))
    args = Case.random(torch.float32, full=full, quantize=quantize).args()
    opcheck(torch.ops.tts_kernels.decoder_layers_.default, args)
    exact = reference.decoder_layers_(*args)
    out = Case.random(torch.float32, full=full, quantize=quantize).run()
    # A difference in the last bits may move a rounding to whole numbers.
    torch.testing.assert_close(out, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_quantised_caches_to_the_bit(stored: str, dtype: torch.dtype) -> None:
    ours, theirs = (Case.random(dtype, 3, rows=[3, 1]).quantised(stored) for _ in range(2))
    assert torch.equal(ours.run(), one_by_one(theirs))
    for mine, other in zip(
        [*ours.args()[2:4], *ours.args()[-4:]], [*theirs.args()[2:4], *theirs.args()[-4:]], strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    opcheck(torch.ops.tts_kernels.decoder_layers_.default, Case.random(dtype).quantised(stored).args())
    exact = reference.decoder_layers_(*Case.random(torch.float32).quantised(stored).args())
    torch.testing.assert_close(Case.random(torch.float32).quantised(stored).run(), exact, rtol=0, atol=0.05)
    assert_names(ValueError, "v_scales", replace(ours, v_scales=ours.v_scales[:1]).run)
    assert_names(TypeError, r"k_scales\[0\]", replace(ours, k_scales=()).run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [True, False])
def test_equals_the_definition(dtype: torch.dtype, full: bool) -> None:
    case = Case.random(dtype, full=full, rows=[2, 1, 0, 3])
    exact = reference.decoder_layers_(*case.args(torch.float64))
    plain = reference.decoder_layers_(*case.copy().args())
    assert_rule(case.run(), exact, plain)


def test_the_reference_backend_runs_it() -> None:
    ours, theirs = Case.random(torch.float32), Case.random(torch.float32)
    with tk.use_backend("reference"):
        out = theirs.run()
    torch.testing.assert_close(out, ours.run(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.k_caches, ours.k_caches, rtol=1e-4, atol=1e-5)


def test_opcheck_and_compile() -> None:
    for rows in (None, [1]):
        opcheck(torch.ops.tts_kernels.decoder_layers_.default, Case.random(torch.bfloat16, rows=rows).args())
    ours, theirs = Case.random(torch.float32), Case.random(torch.float32)

    def step(x: torch.Tensor, k_caches: list[torch.Tensor], v_caches: list[torch.Tensor]) -> torch.Tensor:
        return replace(theirs, x=x, k_caches=k_caches, v_caches=v_caches).run() + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(theirs.x, theirs.k_caches, theirs.v_caches), ours.run() + 1)
    torch.testing.assert_close(theirs.v_caches, ours.v_caches)


def test_bad_input_names_the_argument() -> None:
    case = Case.random(torch.float32)
    good = case.layers.layers
    half = case.x.bfloat16()
    for kind, name, change in [
        (TypeError, "x", {"x": case.x.double()}),
        (ValueError, "x", {"x": case.x[0]}),
        (TypeError, r"layers\[0\].input_norm", {"x": half}),
        (ValueError, r"layers\[0\].input_norm", {"x": case.x[:, 1:]}),
        (ValueError, r"layers\[1\].post_norm", {"layers": [good[0], replace(good[1], post_norm=torch.ones(3))]}),
        (ValueError, r"layers\[0\].down_bias", {"layers": [replace(good[0], down_bias=torch.ones(3)), good[1]]}),
        (ValueError, "k_caches", {"k_caches": case.k_caches[:1]}),
        (TypeError, r"v_caches\[1\]", {"v_caches": [case.v_caches[0], case.v_caches[1].half()]}),
        (ValueError, r"v_caches\[0\]", {"v_caches": [c[:5] for c in case.v_caches]}),
        (ValueError, "positions", {"positions": case.positions[:3]}),
        (IndexError, "positions", {"positions": case.positions + 11}),
        (ValueError, "cos_sin", {"cos_sin": case.cos_sin[0]}),
        (IndexError, "slots", {"slots": case.slots + PAGES * PAGE_SIZE}),
        (IndexError, "rows", {"rows": torch.tensor([4])}),
        (TypeError, "rows", {"rows": torch.tensor([1.0])}),
        (ValueError, "plan.rows", {"x": case.x[:3], "positions": case.positions[:3], "slots": case.slots[:3]}),
    ]:
        layers = change.get("layers")  # type: ignore[attr-defined]
        changed = {**change, "layers": tk.DecoderLayers(layers)} if isinstance(layers, list) else change
        assert_names(kind, name, replace(case.copy(), **changed).run)
    other = replace(case.plan, num_q_heads=2)
    assert_names(ValueError, "plan", replace(case, plan=other).run)


def test_layers_that_do_not_fit_are_named() -> None:
    """Their padded weights would fit: HIDDEN + 1 columns have as many panels as HIDDEN."""
    good = layer(torch.float32, full=False, window=None)
    assert_names(ValueError, "layers", tk.DecoderLayers, [])
    assert_names(TypeError, r"layers\[1\]", tk.DecoderLayers, [good, None])
    for kind, name, wrong in [
        (ValueError, "qkv", tk.pack_linear(torch.ones(good.qkv.out_features + 1, HIDDEN))),
        (ValueError, "o", tk.pack_linear(torch.ones(HIDDEN + 1, good.o.in_features))),
        (ValueError, "gate_up", tk.pack_linear(torch.ones(2 * INNER + 1, HIDDEN))),
        (ValueError, "down", tk.pack_linear(torch.ones(HIDDEN + 1, INNER))),
        (TypeError, "down", torch.ones(HIDDEN, INNER)),
        (ValueError, "window", 0),
        (TypeError, "window", 2.0),
    ]:
        layers = [good, replace(good, **{name: wrong})]  # type: ignore[arg-type]
        assert_names(kind, rf"layers\[1\].{name}", tk.DecoderLayers, layers)


def test_compiles_once_for_all_numbers_of_rows() -> None:
    case = Case.random(torch.float32)
    forest = tk.KVForest(PAGES, page_size=PAGE_SIZE)
    root = forest.add_root()
    forest.append([root], [20])
    shape = {"num_q_heads": Q_HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}

    def step(x: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, plan: tk.AttentionPlan) -> torch.Tensor:
        return replace(case, x=x, positions=positions, slots=slots, plan=plan).run()

    calls = [
        (torch.randn(n, HIDDEN), torch.arange(n), torch.arange(n), forest.plan([root], [n], **shape))
        for n in range(2, 14)
    ]
    assert compilations(step, calls) <= 4  # max_slots is a constant of the graph
