"""Attention over the caches and page tables of FlashInfer and vLLM: the same memory, not a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_docs_kernels import code_of
from torch import Tensor
from tts_search.adapters.page_tables import flashinfer_caches, flashinfer_page_table, vllm_caches

import tts_kernels as tk

P, PAGE, HQ, HKV, D = 40, 16, 8, 2, 64
HEADS = {"page_size": PAGE, "num_q_heads": HQ, "num_kv_heads": HKV, "head_dim": D}
# Three requests, of which two share their first 64 tokens; a table in the allocator's order; rows of q of each.
PAGES = [[31, 4, 12, 27, 17], [31, 4, 12, 27, 9, 2], [33, 22]]
KV_LENS, Q_LENS = [69, 96, 20], [1, 3, 2]


def flashinfer_nhd() -> tuple[Tensor, tuple[Tensor, Tensor], Callable[[Tensor, Tensor], None]]:
    cache = torch.full((P, 2, PAGE, HKV, D), float("nan"))
    return cache, flashinfer_caches(cache, "NHD"), lambda k, v: cache.copy_(torch.stack((k, v), 1))


def flashinfer_hnd() -> tuple[Tensor, tuple[Tensor, Tensor], Callable[[Tensor, Tensor], None]]:
    cache = torch.full((P, 2, HKV, PAGE, D), float("nan"))
    return cache, flashinfer_caches(cache, "HND"), lambda k, v: cache.copy_(torch.stack((k, v), 1).transpose(2, 3))


def vllm_separate() -> tuple[Tensor, tuple[Tensor, Tensor], Callable[[Tensor, Tensor], None]]:
    cache = torch.full((2, P, PAGE, HKV, D), float("nan"))
    return cache, vllm_caches(cache), lambda k, v: cache.copy_(torch.stack((k, v)))


def vllm_token_major() -> tuple[Tensor, tuple[Tensor, Tensor], Callable[[Tensor, Tensor], None]]:
    """Its layout LBNHC: [P, Hkv, page_size, 2 D] to look at, tokens before heads in memory."""
    cache = torch.full((P, PAGE, HKV, 2 * D), float("nan")).transpose(1, 2)
    return cache, vllm_caches(cache), lambda k, v: cache.copy_(torch.cat((k, v), -1).transpose(1, 2))


def vllm_head_major() -> tuple[Tensor, tuple[Tensor, Tensor], Callable[[Tensor, Tensor], None]]:
    """Its layout LBHNC."""
    cache = torch.full((P, HKV, PAGE, 2 * D), float("nan"))
    return cache, vllm_caches(cache), lambda k, v: cache.copy_(torch.cat((k, v), -1).transpose(1, 2))


LAYOUTS = [flashinfer_nhd, flashinfer_hnd, vllm_separate, vllm_token_major, vllm_head_major]


def random_pages() -> tuple[Tensor, Tensor, Tensor]:
    """q [T, Hq, D]; k, v [P, page_size, Hkv, D] with NaN in every slot that no request has."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(Q_LENS), HQ, D, generator=generator)
    k, v = torch.randn(2, P, PAGE, HKV, D, generator=generator)
    used = torch.zeros(P, PAGE, dtype=torch.bool)
    for pages, length in zip(PAGES, KV_LENS, strict=True):
        for position in range(length):
            used[pages[position // PAGE], position % PAGE] = True
    k[~used], v[~used] = float("nan"), float("nan")
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention of each request over its tokens, in float64."""
    outs, row = [], 0
    for pages, length, rows in zip(PAGES, KV_LENS, Q_LENS, strict=True):
        keys, values = (x[pages].flatten(0, 1)[:length].double().repeat_interleave(HQ // HKV, 1) for x in (k, v))
        logits = torch.einsum("thd,shd->hts", q[row : row + rows].double(), keys) * D**-0.5
        seen = torch.arange(length) <= torch.arange(length - rows, length)[:, None]
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hts,shd->thd", weights, values))
        row += rows
    return torch.cat(outs)


def compressed() -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's form of PAGES and KV_LENS."""
    indptr = torch.tensor([0, *map(len, PAGES)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    indices = torch.tensor(
        [*(page for pages in PAGES for page in pages), 0, 0], dtype=torch.int32
    )  # its buffer may be longer
    return indptr, indices, torch.tensor([(n - 1) % PAGE + 1 for n in KV_LENS], dtype=torch.int32)


def block_table() -> Tensor:
    """vLLM's form: rows of a fixed width, anything behind a request's blocks."""
    return torch.tensor([pages + [99] * (6 - len(pages)) for pages in PAGES], dtype=torch.int32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_reads_the_framework_s_memory(layout: Callable[[], Any]) -> None:
    cache, (k_view, v_view), write = layout()
    q, k, v = random_pages()
    write(k, v)
    assert k_view.shape == v_view.shape == (P, PAGE, HKV, D)
    assert k_view.data_ptr() == cache.data_ptr()
    assert v_view.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    assert torch.equal(k_view.nan_to_num(), k.nan_to_num())
    assert torch.equal(v_view.nan_to_num(), v.nan_to_num())
    for table, lengths in ((block_table(), KV_LENS), flashinfer_page_table(*compressed(), PAGE)):
        plan = tk.plan_attention(table, lengths, Q_LENS, **HEADS)
        out = tk.tree_attention(q, k_view, v_view, plan)
        assert (out - dense(q, k, v)).abs().max() < 1e-5
        num_pages = int(plan.sizes[3])
        assert num_pages == len({page for pages in PAGES for page in pages})  # a shared page is listed, and read, once


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_tokens_are_written_to_the_framework_s_memory(layout: Callable[[], Any]) -> None:
    cache, (k_view, v_view), _ = layout()
    k, v = torch.randn(2, 3, HKV, D)
    slots = torch.tensor([5 * PAGE + 1, 7, 39 * PAGE + 15])
    tk.append_kv_(k_view, v_view, k, v, slots)
    assert torch.equal(k_view[slots // PAGE, slots % PAGE], k)
    assert torch.equal(v_view[slots // PAGE, slots % PAGE], v)
    assert int(cache.isfinite().sum()) == 2 * k.numel()  # and to nothing else


def test_page_tables_agree() -> None:
    table, lengths = flashinfer_page_table(*compressed(), PAGE)
    assert lengths.tolist() == KV_LENS
    for row, pages in zip(table.tolist(), PAGES, strict=True):
        assert row[: len(pages)] == pages
    empty, lengths = flashinfer_page_table(torch.tensor([0, 0, 1]), torch.tensor([3]), torch.tensor([0, 4]), PAGE)
    assert (empty.tolist(), lengths.tolist()) == ([[0], [3]], [0, 4])
    none, lengths = flashinfer_page_table(torch.tensor([0]), torch.tensor([]).int(), torch.tensor([]).int(), PAGE)
    assert (none.shape, lengths.shape) == ((0, 0), (0,))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kv_layout"):
        flashinfer_caches(torch.empty(1, 2, 1, 1, 1), "NDH")  # type: ignore[arg-type]
    for cache in (torch.empty(4, 3, 16, 2, 8), (torch.empty(4, 16, 2, 8), torch.empty(5, 16, 2, 8))):
        with pytest.raises(ValueError, match="paged_kv_cache"):
            flashinfer_caches(cache)
    with pytest.raises(ValueError, match=r"kv_cache: expected \[2, num_blocks"):
        vllm_caches(torch.empty(3, 4, 16, 2, 8))
    indptr, indices, last = compressed()
    with pytest.raises(ValueError, match="paged_kv_indptr"):
        flashinfer_page_table(indptr, indices[:5], last, PAGE)
    with pytest.raises(ValueError, match="paged_kv_last_page_len"):
        flashinfer_page_table(indptr, indices, last + PAGE, PAGE)


def test_the_code_of_the_docs() -> None:
    q, k, v = random_pages()
    indptr, indices, last = compressed()
    names = {
        "torch": torch, "tk": tk, "q": q, "block_table": block_table(), "seq_lens": torch.tensor(KV_LENS),
        "query_start_loc": torch.tensor([0, *Q_LENS]).cumsum(0), "qo_indptr": torch.tensor([0, *Q_LENS]).cumsum(0),
        "vllm_kv_cache": torch.cat((k, v), -1).transpose(1, 2), "paged_kv_indptr": indptr, "paged_kv_indices": indices,
        "paged_kv_last_page_len": last, "paged_kv_cache": torch.stack((k, v), 1).transpose(2, 3).contiguous(),
    }  # fmt: skip
    (code,) = code_of("kernels.md", "test_page_tables.py")
    before, after = code.split("# FlashInfer")
    exec(before, names)
    assert (names["out"] - dense(q, k, v)).abs().max() < 1e-5
    names["out"] = None
    exec("# FlashInfer" + after, names)
    assert (names["out"] - dense(q, k, v)).abs().max() < 1e-5
