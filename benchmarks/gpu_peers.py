"""`tree_attention` and FlashInfer's cascade on a GPU, on the trees of bench_tree_attention: one line of JSON.

FlashInfer's cascade works by levels: the nodes of each level are a batch of paged prefills, whose queries are the rows
below a node, and levels are merged by log-sum-exp. Both read the same cache with pages of 16. Numbers are medians of 30
calls after 10, timed by events of the stream.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_tree_attention import DECODE, DIM, HEADS, KV_HEADS, PAGE_SIZE, grow
from measure import seconds
from torch import Tensor

import tts_kernels as tk

DTYPE = torch.bfloat16


def cascade(fan_out: list[int], lengths: list[int], table: Tensor, q: Tensor, cache: Tensor) -> Callable[[], Tensor]:
    """FlashInfer's call for a tree whose levels' lengths are multiples of a page but for the last."""
    import flashinfer

    rows = fan_out[-1]
    columns = [0, *(-(-end // PAGE_SIZE) for end in itertools.accumulate(lengths))]
    arrays: dict[str, list[Tensor]] = {"qo": [], "indptr": [], "indices": [], "last": []}
    for nodes, length, begin, end in zip(fan_out, lengths, columns[:-1], columns[1:], strict=True):
        below = rows // nodes
        arrays["qo"].append(torch.arange(0, rows + 1, below, dtype=torch.int32))
        arrays["indptr"].append(torch.arange(0, nodes * (end - begin) + 1, end - begin, dtype=torch.int32))
        arrays["indices"].append(table[::below, begin:end].flatten().int().contiguous())
        arrays["last"].append(torch.full((nodes,), (length - 1) % PAGE_SIZE + 1, dtype=torch.int32))
    workspace = torch.zeros(256 << 20, dtype=torch.uint8)
    wrapper = flashinfer.cascade.MultiLevelCascadeAttentionWrapper(len(fan_out), workspace, "NHD")
    wrapper.plan(*arrays.values(), HEADS, KV_HEADS, DIM, PAGE_SIZE, q_data_type=DTYPE)
    return partial(wrapper.run, q, cache)


def measure(call: Callable[[], Any]) -> float:
    """Median seconds of a call."""
    for _ in range(10):
        call()
    return statistics.median(seconds(call) for _ in range(30))


def compare(fan_out: list[int], lengths: list[int]) -> dict[str, float]:
    """Seconds of both, and how far apart their results are."""
    forest, leaves = grow(fan_out, lengths)
    table, _ = forest.page_table(leaves)
    cache = torch.randn(forest.stats().pages_total, 2, PAGE_SIZE, KV_HEADS, DIM).to(DTYPE)
    q = torch.randn(fan_out[-1], HEADS, DIM).to(DTYPE)
    device = torch.get_default_device()
    plan = forest.plan(leaves, num_q_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, device=device)
    ours = partial(tk.tree_attention, q, cache[:, 0], cache[:, 1], plan)
    theirs = cascade(fan_out, lengths, table.to(device), q, cache)
    apart = float((ours().float() - theirs().float()).abs().max())
    return {"ours_s": measure(ours), "flashinfer_s": measure(theirs), "apart": apart}


def main() -> None:
    """Print what was measured, or why nothing was."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False")
    try:
        import flashinfer
    except ImportError:
        raise SystemExit("no FlashInfer") from None
    with torch.device("cuda"):
        print(
            json.dumps({"flashinfer": flashinfer.__version__} | {name: compare(*tree) for name, tree in DECODE.items()})
        )


if __name__ == "__main__":
    main()
