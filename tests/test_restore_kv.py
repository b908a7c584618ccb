"""restore_kv_: dequantize_rows, the turn of the keys' channels, and rope_append_ in one pass, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import DTYPES, assert_names, assert_same_by_threads
from torch import Tensor
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference


def blocks_of(k: Tensor, v: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """The bytes of keys and values [B, block, Hkv, D]."""
    channels = k.flatten(2).transpose(1, 2)
    keys = tk.quantize_rows(channels.flatten(0, 1).contiguous(), bits, k.shape[1]).unflatten(0, channels.shape[:2])
    values = tk.quantize_rows(v.flatten(2).flatten(0, 1), bits, group).unflatten(0, v.shape[:2])
    return keys, values


def inputs(
    stored: int, count: int, tokens: int, heads: int, dim: int, bits: int, group: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    """Arguments: some of the stored blocks, to slots in any order."""
    torch.manual_seed(seed)
    k, v = torch.randn(2, stored, tokens, heads, dim).mul_(torch.rand(dim) * 10).to(dtype)
    keys, values = blocks_of(k, v, bits, group)
    angles = torch.rand(300, dim // 2) * 6
    pages = count * tokens // 16 + 2
    caches = [torch.full((pages, 16, heads, dim), 7.0, dtype=dtype) for _ in range(2)]
    return {
        "keys": keys,
        "values": values,
        "blocks": torch.randperm(stored)[:count],
        "k_cache": caches[0],
        "v_cache": caches[1],
        "positions": torch.randint(0, 300, (count * tokens,)),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], 1),
        "slots": torch.randperm(16 * pages)[: count * tokens],
        "bits": bits,
        "group_size": group,
    }


def run(given: dict[str, Any], restore: Any = tk.restore_kv_) -> list[Tensor]:
    caches = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    restore(**{**given, **caches})
    return list(caches.values())


def by_other_operators(**given: Any) -> None:
    """The definition, of the operators that it stands for."""
    reference.restore_kv_(**given, ops=_OPERATORS)


class _OPERATORS:
    dequantize_rows = staticmethod(tk.dequantize_rows)

    @staticmethod
    def rope_append_(*args: Any) -> None:
        tk.rope_append_(*args[:6], num_q_heads=args[6], num_kv_heads=args[7])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_bits_of_the_operators_and_nearly_the_definition(data: st.DataObject) -> None:
    heads, dim = data.draw(st.sampled_from([(1, 16), (3, 64), (8, 2), (2, 72), (4, 20), (1, 144), (2, 256), (8, 6)]))
    group = data.draw(st.sampled_from([size for size in range(1, 129) if dim % size == 0]))
    stored = data.draw(st.integers(1, 4))
    given_ = inputs(
        stored, data.draw(st.integers(0, stored)), 16 * data.draw(st.integers(1, 8)), heads, dim,
        data.draw(st.sampled_from([2, 3, 4, 8])), group, data.draw(st.sampled_from(DTYPES)),
        data.draw(st.integers(0, 1000)),
    )  # fmt: skip
    got, same = run(given_), run(given_, by_other_operators)
    assert all(map(torch.equal, got, same))
    for ours, exact in zip(got, run(given_, reference.restore_kv_), strict=True):
        torch.testing.assert_close(ours, exact)


def test_a_block_has_the_same_bits_in_any_company_and_nothing_else_is_written() -> None:
    given_ = inputs(5, 4, 128, 3, 64, 4, 64, torch.bfloat16)
    together = run(given_)
    alone = [given_[name].clone() for name in ("k_cache", "v_cache")]
    for i in reversed(range(4)):
        part = slice(128 * i, 128 * (i + 1))
        at = {"blocks": given_["blocks"][i : i + 1], **{n: given_[n][part] for n in ("positions", "slots")}}
        tk.restore_kv_(**{**given_, **at, "k_cache": alone[0], "v_cache": alone[1]})
    assert all(map(torch.equal, together, alone))
    other = torch.ones(together[0].shape[0] * 16, dtype=torch.bool)
    other[given_["slots"]] = False
    for cache in together:
        assert bool((cache.flatten(0, 1)[other] == 7).all())


def test_threads_do_not_change_the_result() -> None:
    given_ = inputs(5, 4, 128, 3, 64, 4, 64, torch.bfloat16)
    assert_same_by_threads(lambda: run(given_))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_that_are_not_finite_are_nan_and_nothing_beside_them(bits: int) -> None:
    k, v = torch.randn(2, 1, 32, 2, 16)
    k[0, 5, 1, 3], v[0, 9, 0, 7] = torch.inf, torch.nan
    given_ = inputs(1, 1, 32, 2, 16, bits, 16, torch.float32)
    given_["keys"], given_["values"] = blocks_of(k, v, bits, 16)
    keys, values = (cache.flatten(0, 1)[given_["slots"]] for cache in run(given_))
    assert bool(keys[:, 1, [3, 11]].isnan().all())  # the channel, and its pair of the rotation
    assert int(keys.isnan().sum()) == 2 * 32
    assert bool(values[9, 0].isnan().all())
    assert int(values.isnan().sum()) == 16


def test_strided_caches_and_int32() -> None:
    given_ = inputs(2, 2, 16, 2, 8, 3, 4, torch.float16)
    wide = torch.zeros(2, *given_["k_cache"].shape[:2], 5, 11, dtype=torch.float16)[..., 1:3, 2:10]
    given_ |= {name: given_[name].int() for name in ("blocks", "positions", "slots")}
    wide.copy_(torch.stack([given_["k_cache"], given_["v_cache"]]))
    tk.restore_kv_(**{**given_, "k_cache": wide[0], "v_cache": wide[1]})
    assert all(map(torch.equal, run(given_), wide))


def test_opcheck_and_compile() -> None:
    given_ = inputs(3, 2, 16, 2, 8, 4, 8, torch.float32)
    opcheck(torch.ops.tts_kernels.restore_kv_.default, tuple(given_.values()))
    compiled = torch.compile(tk.restore_kv_, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, run(given_, compiled), run(given_)))


def test_bad_input_names_the_argument() -> None:
    good = inputs(3, 2, 32, 2, 16, 4, 16, torch.float32)

    def refused(kind: type[Exception], name: str, **changes: Any) -> None:
        caches = [good["k_cache"].clone(), good["v_cache"].clone()]
        assert_names(kind, name, lambda: tk.restore_kv_(**{**good, **changes}))
        assert torch.equal(good["k_cache"], caches[0])
        assert torch.equal(good["v_cache"], caches[1])

    refused(TypeError, "keys", keys=None)
    refused(TypeError, "keys", keys=good["keys"].char())
    refused(ValueError, "keys", keys=good["keys"][:2])
    refused(ValueError, "keys", keys=good["keys"][:, :16])
    refused(ValueError, "keys", keys=good["keys"].transpose(0, 1).contiguous().transpose(0, 1))
    refused(TypeError, "values", values=good["values"].float())
    refused(ValueError, "values", values=good["values"][..., :-1])
    refused(ValueError, "values", values=good["values"][:, :24].contiguous())
    refused(ValueError, "values", values=good["values"].repeat(1, 5, 1))
    refused(TypeError, "blocks", blocks=good["blocks"].float())
    refused(IndexError, "blocks", blocks=torch.tensor([0, 3]))
    refused(IndexError, "positions", positions=good["positions"] + 300)
    refused(IndexError, "slots", slots=good["slots"] - 100)
    refused(ValueError, "slots", slots=good["slots"][1:])
    refused(ValueError, "bits", bits=5)
    refused(ValueError, "bits", bits=4.0)
    refused(ValueError, "values", bits=3)
    refused(ValueError, "group_size", group_size=6)
    refused(ValueError, "values", group_size=8)
    refused(TypeError, "v_cache", v_cache=good["v_cache"].half())
    refused(ValueError, "v_cache", v_cache=good["v_cache"][:1])
    refused(TypeError, "k_cache", k_cache=good["k_cache"].char(), v_cache=good["v_cache"].char())
    refused(ValueError, "k_cache", k_cache=good["k_cache"][:1].expand(3, -1, -1, -1))
    odd = {name: good[name][..., :12] for name in ("k_cache", "v_cache")}
    refused(ValueError, "k_cache", **odd, group_size=12)
    refused(ValueError, "cos_sin", cos_sin=good["cos_sin"][:, :8].contiguous())
    with tk.debug_checks(True):
        refused(ValueError, "slots", slots=0 * good["slots"])
