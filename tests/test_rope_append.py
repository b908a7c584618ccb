from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from rules import (
    DTYPES,
    assert_names,
    assert_refuses_fp8,
    assert_rule,
    assert_same_by_threads,
    compilations,
    reading_fp8,
)
from torch import Tensor
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference


def angles(positions: int, head_dim: int) -> torch.Tensor:
    """cos and sin [positions, D] in float32, as Llama has them."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    theta = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([theta.cos(), theta.sin()], dim=-1).float()


@dataclass
class Case:
    """The arguments of rope_append_."""

    qkv: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    positions: torch.Tensor
    cos_sin: torch.Tensor
    slots: torch.Tensor
    num_q_heads: int
    num_kv_heads: int
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 1e-5

    @classmethod
    def random(
        cls, tokens: int, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, norms: bool = False
    ) -> Case:
        torch.manual_seed(tokens * 31 + head_dim)
        cache = torch.randn(2, 9, 16, kv_heads, head_dim).to(dtype)
        norm = (torch.rand(2, head_dim) + 0.5).to(dtype)
        return cls(
            torch.randn(tokens, (q_heads + 2 * kv_heads) * head_dim).to(dtype),
            cache[0],
            cache[1],
            torch.randint(0, 200, (tokens,)),
            angles(200, head_dim),
            torch.randperm(9 * 16)[:tokens].int(),
            q_heads,
            kv_heads,
            *((norm[0], norm[1]) if norms else (None, None)),
        )

    def double(self) -> Case:
        wide = {n: v.double() for n, v in vars(self).items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        return replace(self, **wide)

    def copy(self) -> Case:
        return replace(self, k_cache=self.k_cache.clone(), v_cache=self.v_cache.clone())

    def args(self) -> tuple[object, ...]:
        return tuple(vars(self).values())

    def run(self) -> torch.Tensor:
        options = dict(list(vars(self).items())[6:])
        return tk.rope_append_(*self.args()[:6], **options)


def plain(case: Case) -> torch.Tensor:
    """As transformers does it, in the dtype of the model, with a head's norm rounded before its rotation."""
    head_dim = case.cos_sin.shape[1]
    q, k, v = (
        t.reshape(len(t), -1, head_dim)
        for t in case.qkv.split([n * head_dim for n in (case.num_q_heads, case.num_kv_heads, case.num_kv_heads)], dim=1)
    )
    cos, sin = (t.repeat(1, 2).to(q.dtype)[:, None] for t in case.cos_sin[case.positions].chunk(2, dim=-1))

    def rotated(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        if norm is not None:
            h = x.float()
            x = norm * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + case.eps)).to(x.dtype)
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-high, low], dim=-1) * sin

    case.k_cache.flatten(0, 1)[case.slots.long()] = rotated(k, case.k_norm)
    case.v_cache.flatten(0, 1)[case.slots.long()] = v
    return rotated(q, case.q_norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"), [(1, (1, 1), 2), (5, (9, 3), 64), (40, (4, 2), 34), (100, (2, 1), 128)]
)
def test_equals_the_definition(
    tokens: int, heads: tuple[int, int], head_dim: int, norms: bool, dtype: torch.dtype
) -> None:
    case = Case.random(tokens, *heads, head_dim, dtype, norms)
    exact, torch_like, ours = case.double(), case.copy(), case.copy()
    exact_q = reference.rope_append_(*exact.args())
    plain_q, q = plain(torch_like), ours.run()
    assert q.dtype == dtype
    assert_rule(q, exact_q, plain_q)
    assert_rule(ours.k_cache, exact.k_cache, torch_like.k_cache)
    assert torch.equal(ours.v_cache, torch_like.v_cache)


def test_other_slots_stay_as_they_are() -> None:
    case = Case.random(7, 2, 1, 8, torch.bfloat16)
    before = case.copy()
    case.run()
    others = torch.ones(9 * 16, dtype=torch.bool)
    others[case.slots.long()] = False
    for cache, old in ((case.k_cache, before.k_cache), (case.v_cache, before.v_cache)):
        assert torch.equal(cache.flatten(0, 1)[others], old.flatten(0, 1)[others])
        assert not torch.equal(cache, old)


def test_strided_caches_rows_norms_and_indices() -> None:
    """Caches as the framework's interleaved [P, 2, page_size, Hkv, D] would give them."""
    case = Case.random(6, 3, 1, 16, torch.float32, norms=True)
    expected = case.copy()
    q = expected.run()
    norms = torch.stack([case.q_norm, case.k_norm], dim=1)
    both = torch.stack([case.k_cache, case.v_cache], dim=1)
    strided = replace(
        case,
        qkv=torch.cat([case.qkv, case.qkv], 1)[:, : case.qkv.shape[1]],
        k_cache=both[:, 0],
        v_cache=both[:, 1],
        positions=case.positions.repeat_interleave(2)[::2],
        slots=case.slots.long().repeat_interleave(2)[::2],
        q_norm=norms[:, 0],
        k_norm=norms[:, 1],
    )
    assert torch.equal(strided.run(), q)
    assert torch.equal(both[:, 0], expected.k_cache)
    assert torch.equal(both[:, 1], expected.v_cache)


def test_empty_and_non_finite() -> None:
    case = Case.random(3, 2, 1, 8, torch.float16)
    assert replace(case, qkv=case.qkv[:0], positions=case.positions[:0], slots=case.slots[:0]).run().shape == (0, 2, 8)
    clean = case.copy().run()
    case.qkv[1, 0] = torch.nan
    q = case.run()
    assert q[1, 0, [0, 4]].isnan().all()
    assert torch.equal(q[[0, 2]], clean[[0, 2]])


def test_threads_do_not_change_the_result() -> None:
    case = Case.random(140, 9, 3, 64, torch.bfloat16, norms=True)

    def results() -> list[Tensor]:
        own = case.copy()
        return [own.run(), own.k_cache, own.v_cache]

    assert_same_by_threads(results)


def test_opcheck_and_compile() -> None:
    for norms in (False, True):
        case = Case.random(4, 2, 1, 8, torch.float32, norms)
        opcheck(torch.ops.tts_kernels.rope_append_.default, case.args())

    def step(qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        return replace(case, qkv=qkv, k_cache=k_cache, v_cache=v_cache).run() * k_cache.sum()

    ours, theirs = case.copy(), case.copy()
    expected = step(ours.qkv, ours.k_cache, ours.v_cache)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(theirs.qkv, theirs.k_cache, theirs.v_cache), expected)
    assert torch.equal(theirs.k_cache, ours.k_cache)


def test_compiles_once_for_all_numbers_of_tokens() -> None:
    case = Case.random(14, 2, 1, 8, torch.float32)
    calls = [(case.qkv[:n].clone(), case.positions[:n].clone(), case.slots[:n].clone()) for n in range(2, 14)]

    def step(qkv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return replace(case, qkv=qkv, positions=positions, slots=slots).run()

    assert compilations(step, calls) <= 2


def test_bad_input_names_the_argument_and_writes_nothing() -> None:
    case = Case.random(4, 2, 1, 8, torch.float32, norms=True)
    before = case.copy()
    bad = [
        (TypeError, "qkv", {"qkv": case.qkv.double()}),
        (ValueError, "qkv", {"qkv": case.qkv[:, 1:]}),
        (ValueError, "qkv", {"num_q_heads": 3}),
        (ValueError, "num_q_heads", {"num_q_heads": 0}),
        (ValueError, "num_q_heads", {"num_q_heads": 2**31}),
        (TypeError, "num_kv_heads", {"num_kv_heads": 1.0}),
        (TypeError, "k_cache", {"k_cache": case.k_cache.half()}),
        (ValueError, "k_cache", {"k_cache": case.k_cache[0]}),
        (ValueError, "k_cache", {"k_cache": case.k_cache.transpose(0, 3).contiguous().transpose(0, 3)}),
        (ValueError, "v_cache", {"v_cache": case.v_cache[:8]}),
        (ValueError, "v_cache", {"v_cache": case.v_cache[:1].expand(9, -1, -1, -1)}),
        (TypeError, "positions", {"positions": case.positions.float()}),
        (ValueError, "positions", {"positions": case.positions[:3]}),
        (IndexError, "positions", {"positions": torch.tensor([0, 1, 200, 3])}),
        (IndexError, "positions", {"positions": torch.tensor([0, 1, -1, 3])}),
        (TypeError, "cos_sin", {"cos_sin": case.cos_sin.double()}),
        (ValueError, "cos_sin", {"cos_sin": case.cos_sin[0]}),
        (ValueError, "cos_sin", {"cos_sin": case.cos_sin[:, :7]}),
        (ValueError, "slots", {"slots": case.slots[:3]}),
        (IndexError, "slots", {"slots": torch.tensor([0, 1, 2, 144])}),
        (IndexError, "slots", {"slots": torch.tensor([0, 1, 2, -1])}),
        (TypeError, "q_norm", {"q_norm": case.q_norm.half()}),
        (ValueError, "k_norm", {"k_norm": case.k_norm[:4]}),
        (ValueError, "eps", {"eps": -1.0}),
        (ValueError, "eps", {"eps": 1e39}),
    ]
    for kind, name, change in bad:
        assert_names(kind, name, replace(case, **change).run)
    with tk.debug_checks(True):
        assert_names(ValueError, "slots", replace(case, slots=torch.tensor([0, 1, 2, 1])).run)
    assert torch.equal(case.k_cache, before.k_cache)
    assert torch.equal(case.v_cache, before.v_cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["int8", "int4"])
@pytest.mark.parametrize("head_dim", [2, 34, 64])
def test_a_quantised_cache_gets_what_append_makes_of_the_rotated_keys(
    head_dim: int, stored: str, dtype: torch.dtype
) -> None:
    case = Case.random(40, 4, 2, head_dim, dtype, norms=True)
    q = case.run()
    k, v = (cache.flatten(0, 1)[case.slots.long()] for cache in (case.k_cache, case.v_cache))
    ours, expected = (tk.KVCache(1, 9, 2, head_dim, dtype=stored) for _ in range(2))
    for t in (*ours.tensors(), *expected.tensors()):
        t.zero_()
    reference.append_kv_(expected.k[0], expected.v[0], k, v, case.slots, **expected.beside(0))
    options = dict(list(vars(case).items())[6:]) | ours.beside(0)
    got = tk.rope_append_(case.qkv, ours.k[0], ours.v[0], case.positions, case.cos_sin, case.slots, **options)
    assert torch.equal(got, q)
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), expected.tensors(), strict=True))
    opcheck(
        torch.ops.tts_kernels.rope_append_.default,
        (case.qkv, ours.k[0], ours.v[0], *case.args()[3:]),
        ours.beside(0),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [None, "int8", "int4", "fp8"])
def test_a_token_has_the_same_bits_in_any_company(stored: str | None, dtype: torch.dtype) -> None:
    case = Case.random(30, 5, 2, 34, dtype, norms=True)
    options = dict(list(vars(case).items())[6:])
    together, alone = (tk.KVCache(1, 9, 2, 34, dtype=stored or dtype) for _ in range(2))
    for t in (*together.tensors(), *alone.tensors()):
        t.zero_()

    def run(cache: tk.KVCache, rows: slice) -> Tensor:
        args = (case.qkv[rows], cache.k[0], cache.v[0], case.positions[rows], case.cos_sin, case.slots[rows])
        return tk.rope_append_(*args, **options, **cache.beside(0))

    with reading_fp8("rope_append_") if stored == "fp8" else nullcontext():
        q = run(together, slice(None))
        assert torch.equal(torch.cat([run(alone, slice(i, i + 1)) for i in range(30)]), q)
    assert all(torch.equal(a, b) for a, b in zip(together.tensors(), alone.tensors(), strict=True))


def test_scales_of_a_quantised_cache_that_are_missing_are_named() -> None:
    case = Case.random(4, 2, 1, 8, torch.float32)
    cache = tk.KVCache(1, 9, 1, 8, dtype="int8")
    quantised = replace(case, k_cache=cache.k[0], v_cache=cache.v[0])
    assert_names(TypeError, "k_scale", quantised.run)
    wide = tk.KVCache(1, 9, 1, 16, dtype="int4")
    args = (case.qkv, wide.k[0], wide.v[0], case.positions, case.cos_sin, case.slots)
    assert_names(ValueError, "k_cache", tk.rope_append_, *args, num_q_heads=2, num_kv_heads=1, **wide.beside(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_fp8_cache_gets_what_append_makes_of_the_rotated_keys(dtype: torch.dtype) -> None:
    case = Case.random(20, 4, 2, 34, dtype, norms=True)
    case.qkv[3] *= 1000
    ours, expected = (tk.KVCache(1, 9, 2, 34, dtype="fp8") for _ in range(2))
    for t in (*ours.tensors(), *expected.tensors()):
        t.zero_()
    with reading_fp8("rope_append_"):
        q = case.run()
        k, v = (cache.flatten(0, 1)[case.slots.long()] for cache in (case.k_cache, case.v_cache))
        reference.append_kv_(expected.k[0], expected.v[0], k, v, case.slots)
        options = dict(list(vars(case).items())[6:])
        got = tk.rope_append_(case.qkv, ours.k[0], ours.v[0], case.positions, case.cos_sin, case.slots, **options)
    assert torch.equal(got, q)
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), expected.tensors(), strict=True))


def test_an_fp8_cache_is_refused_on_a_cpu() -> None:
    with torch.device("cpu"):
        case, cache = Case.random(20, 4, 2, 34, torch.float32), tk.KVCache(1, 9, 2, 34, dtype="fp8")
        args = (case.qkv, cache.k[0], cache.v[0], case.positions, case.cos_sin, case.slots)
        assert_refuses_fp8(tk.rope_append_, *args, num_q_heads=4, num_kv_heads=2)
