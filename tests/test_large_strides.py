"""Offsets above 2**31 elements: views of so much memory, of which only a few pages are touched."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import tts_kernels as tk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory that nobody touches may cost something")
FAR = 2**30 + 2**14  # two of them are beyond 2**31
APART = 2**25 + 2**20  # 63 of them are


def far_rows(values: Tensor) -> Tensor:
    """The same three rows (or pages), FAR elements apart."""
    view = torch.empty(2 * FAR + values[0].numel(), dtype=values.dtype).as_strided(
        values.shape, (FAR, *values[0].contiguous().stride())
    )
    return view.copy_(values)


def far_elements(values: Tensor) -> Tensor:
    """The same rows of 64, neighbouring elements APART from each other."""
    rows = values.shape[:-1].numel()
    view = torch.empty(63 * APART + rows, dtype=values.dtype).as_strided(
        values.shape, (*values[..., 0].contiguous().stride(), APART)
    )
    return view.copy_(values)


def half(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def test_append_kv() -> None:
    k_cache, v_cache = (far_rows(half(3, 4, 2, 64)) for _ in range(2))
    k, v, slots = half(2, 2, 64), half(2, 2, 64), torch.tensor([9, 2])
    tk.append_kv_(k_cache, v_cache, far_elements(k), v, slots)
    assert torch.equal(k_cache[[2, 0], [1, 2]], k)
    assert torch.equal(v_cache[[2, 0], [1, 2]], v)


def test_copy_pages() -> None:
    caches = [far_rows(half(3, 4, 2, 64)) for _ in range(2)]
    expected = [cache[1].clone() for cache in caches]
    tk.copy_pages_(caches, torch.tensor([1]), torch.tensor([2]))
    for cache, page in zip(caches, expected, strict=True):
        assert torch.equal(cache[2], page)


@pytest.mark.parametrize("apart", [False, True])
def test_tree_attention(apart: bool) -> None:
    k, v, q = half(3, 4, 2, 64), half(3, 4, 2, 64), half(2, 4, 64)
    table, lengths = torch.tensor([[2, 1], [2, 0]]), torch.tensor([7, 6])
    plan = tk.plan_attention(table, lengths, page_size=4, num_q_heads=4, num_kv_heads=2, head_dim=64)
    out = tk.tree_attention(far_elements(q) if apart else q, far_rows(k), far_rows(v), plan)
    assert torch.equal(out, tk.tree_attention(q, k, v, plan))


def test_rope_append() -> None:
    qkv, tokens, angles, slots = half(3, 8 * 64), torch.arange(3), torch.rand(9, 64), torch.tensor([9, 2, 5])
    outputs = []
    for far in (True, False):
        caches = [torch.zeros(3, 4, 2, 64).bfloat16() for _ in range(2)]
        if far:
            caches = [far_rows(cache) for cache in caches]
        x = far_rows(qkv) if far else qkv
        q = tk.rope_append_(x, *caches, tokens, angles, slots, num_q_heads=4, num_kv_heads=2)
        outputs.append([q, *(cache.clone() for cache in caches)])
    for got, expected in zip(*outputs, strict=True):
        assert torch.equal(got, expected)


def test_rows() -> None:
    """Ops that take rows [T, H] apart from each other."""
    x, weight, seeds = half(3, 64), half(64), torch.arange(3)
    head = tk.ScoreHead.label_pair(torch.randn(64), torch.randn(64))
    mlp = tk.ScoreHead.mlp(half(40, 64), half(40), torch.randn(2, 40), None)
    far = far_rows(x)
    for one in (head, mlp, head.with_norm(weight, 1e-5)):
        assert torch.equal(tk.step_scores(far, seeds, one), tk.step_scores(x, seeds, one))
    assert torch.equal(tk.linear_logprob(far, far, seeds), tk.linear_logprob(x, x, seeds))
    assert torch.equal(*(tk.sample(t, seeds=seeds, offsets=seeds).tokens for t in (far, x)))
    assert torch.equal(tk.rms_norm(far, weight, 1e-5, far)[0], tk.rms_norm(x, weight, 1e-5, x)[0])
    assert torch.equal(tk.swiglu(far), tk.swiglu(x))


def test_the_views_are_as_large_as_they_say() -> None:
    values = half(3, 64)
    assert far_rows(values)[2:].storage_offset() > 2**31
    assert far_elements(values)[:, 63:].storage_offset() > 2**31
    assert torch.equal(far_rows(values), values)
    assert torch.equal(far_elements(values), values)
