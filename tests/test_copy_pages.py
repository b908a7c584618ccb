from __future__ import annotations

import pytest
import torch
from rules import DTYPES, assert_names
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize("layers", [0, 1, 5])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_copies_pages_of_every_cache(layers: int, count: int, dtype: torch.dtype, index: torch.dtype) -> None:
    caches = [torch.randn(20, 4, 3, 7).to(dtype) for _ in range(layers)]
    expected = [c.clone() for c in caches]
    pages = torch.randperm(20)
    src, dst = pages[:count].clone(), pages[count : 2 * count]
    src[count // 2 :] = src[:1]  # one page may be copied to many
    reference.copy_pages_(expected, src, dst)
    tk.copy_pages_(caches, src.to(index), dst.to(index))
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))
    assert not layers or torch.equal(caches[0][dst], caches[0][src])


def test_a_cache_whose_pages_are_one_memory_is_refused() -> None:
    cache = torch.randn(4, 2, 3, 5)
    before = cache.clone()
    for dim in range(3):
        shared = cache.narrow(dim, 0, 1).expand_as(cache)
        assert_names(ValueError, r"caches\[1\]", tk.copy_pages_, [cache, shared], torch.tensor([0]), torch.tensor([1]))
    assert torch.equal(cache, before)


def test_strided_and_unequal_caches() -> None:
    pool = torch.randn(3, 30, 4, 16)
    views = [
        pool[..., :7].permute(1, 2, 0, 3),  # heads first
        torch.randn(30, 4, 3, 8)[:, :, :, :5],  # padded rows
        torch.randn(30, 8, 2, 5)[:, ::2],  # every other token
        torch.randn(12, 2, 1, 64).half(),
    ]
    expected = [v.clone() for v in views]
    src, dst = torch.tensor([3, 3, 7]), torch.tensor([11, 0, 5])
    reference.copy_pages_(expected, src, dst)
    rest = pool[..., 7:].clone()
    tk.copy_pages_(tuple(views), src, dst)
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))
    assert torch.equal(pool[..., 7:], rest)


@pytest.mark.parametrize("count", [448, 449, 900])
def test_more_caches_than_a_launch_takes(count: int) -> None:
    """A CUDA launch has room for 448."""
    caches = list(torch.arange(3.0 * count).view(count, 3, 1, 1, 1))
    src, dst = torch.tensor([0]), torch.tensor([2])
    tk.copy_pages_(caches, src, dst)
    assert [c.flatten().tolist() for c in caches] == [[3.0 * i, 3.0 * i + 1, 3.0 * i] for i in range(count)]


def test_opcheck_and_compile() -> None:
    caches, src, dst = [torch.randn(6, 2, 1, 4) for _ in range(3)], torch.tensor([0, 1]), torch.tensor([5, 2])
    opcheck(torch.ops.tts_kernels.copy_pages_.default, (caches, src, dst))
    expected = [c.clone() for c in caches]
    reference.copy_pages_(expected, src, dst)
    torch.compile(lambda a, b, c: tk.copy_pages_([a, b, c], src, dst), fullgraph=True, backend="aot_eager")(*caches)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


def test_bad_input_names_the_argument_and_writes_nothing() -> None:
    caches = [torch.randn(6, 2, 3, 4) for _ in range(2)]
    before = [c.clone() for c in caches]
    src, dst = torch.tensor([0, 1]), torch.tensor([5, 2])
    copy = tk.copy_pages_
    assert_names(TypeError, r"caches\[1\]", copy, [caches[0], caches[1].double()], src, dst)
    assert_names(TypeError, r"caches\[0\]", copy, [3], src, dst)
    assert_names(ValueError, r"caches\[1\]", copy, [caches[0], caches[1][0]], src, dst)
    assert_names(ValueError, r"caches\[0\]", copy, [caches[0].transpose(2, 3)], src, dst)
    assert_names(TypeError, "src", copy, caches, src.float(), dst)
    assert_names(TypeError, "dst", copy, caches, src, [1, 2])
    assert_names(ValueError, "dst", copy, caches, src, dst[:1])
    assert_names(ValueError, "src", copy, caches, src[None], dst)
    assert_names(IndexError, "src", copy, caches, torch.tensor([0, 6]), dst)
    assert_names(IndexError, "dst", copy, [caches[0], caches[1][:5]], src, dst)
    assert_names(ValueError, "dst", copy, caches, src, torch.tensor([5, 5]))
    assert_names(ValueError, "dst", copy, caches, src, torch.tensor([5, 1]))
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


def test_codes_and_scales_of_quantised_caches() -> None:
    """Bytes, and two bytes a head, in one call with floats."""
    caches = [
        torch.randint(-127, 127, (6, 4, 3, 5)).to(torch.int8),
        torch.randint(0, 255, (6, 4, 1, 1)).to(torch.uint8),
    ]
    caches += [torch.randn(6, 4, 3).half()[..., None], torch.randn(6, 4, 3, 5)]
    expected = [c.clone() for c in caches]
    src, dst = torch.tensor([5, 0]), torch.tensor([1, 3])
    for cache in expected:
        cache[dst] = cache[src]
    tk.copy_pages_(caches, src, dst)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))
