"""The least work of each op, as a function of its arguments: bytes from memory, and operations.

The benchmarks compute their bounds from these functions, and gpu_model.py compares its predictions with them. Indices,
scores and offsets are ignored if there are also hidden states, weights, logits or pages.
"""

from __future__ import annotations

import torch
from measure import Bound


def step_scores(steps: int, width: int, dtype: torch.dtype) -> Bound:
    """A one-row head: the rows of the steps."""
    return Bound(steps * width * dtype.itemsize, 2 * steps * width)


def hidden_layer(steps: int, width: int, units: int, dtype: torch.dtype) -> Bound:
    """A head with a hidden layer: W1 once."""
    return Bound(units * width * dtype.itemsize, 2 * steps * width * units, dtype)


def aggregate_steps(scores: int, chains: int) -> Bound:
    """Float32 scores and int64 offsets read, float32 results written."""
    return Bound(4 * scores + 12 * chains)


def prune(candidates: int, groups: int, k: int) -> Bound:
    """Float32 scores read; an int64 index and a score written for each that stays."""
    return Bound(4 * candidates + 12 * groups * k)


def score_and_prune(candidates: int, width: int, groups: int, k: int, dtype: torch.dtype) -> Bound:
    """One new step a candidate."""
    rows, kept = step_scores(candidates, width, dtype), prune(candidates, groups, k)
    return Bound(rows.bytes + kept.bytes, rows.operations)


def append_kv(tokens: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Bound:
    """K and V, read and written."""
    return Bound(4 * tokens * kv_heads * dim * dtype.itemsize)


def rope_append(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Bound:
    """Queries, keys and values, read and written."""
    return Bound(2 * tokens * (heads + 2 * kv_heads) * dim * dtype.itemsize)


def copy_pages(pages: int, caches: int, page_bytes: int) -> Bound:
    """Read and written."""
    return Bound(2 * pages * caches * page_bytes)


def tree_attention(
    tokens: int, reads: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, head_bytes: int = 0
) -> Bound:
    """``tokens``: of the tree, each read once; ``reads``: summed over the rows, the keys that a row sees.

    ``head_bytes``: of a token's keys or values in a head, where they are quantised.
    """
    return Bound(2 * tokens * kv_heads * (head_bytes or dim * dtype.itemsize), 4 * reads * heads * dim, dtype)


def merge_states(rows: int, heads: int, dim: int, dtype: torch.dtype) -> Bound:
    """Two rows and two log-sum-exps read, one written."""
    return Bound(3 * rows * heads * (dim * dtype.itemsize + 4))


def linear(rows: int, weights: int, dtype: torch.dtype) -> Bound:
    """The weights once."""
    return Bound(weights * dtype.itemsize, 2 * rows * weights, dtype)


def linear_quantized(weights: int, bits: int, group_size: int | None, depth: int) -> Bound:
    """The weights once, and a float32 scale for each group of them."""
    return Bound(weights * bits / 8 + 4 * weights / (group_size or depth))


def linear_logprob(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> Bound:
    """The weight once; no logits."""
    return linear(rows, width * vocabulary, dtype)


def sample(rows: int, vocabulary: int, dtype: torch.dtype) -> Bound:
    """The logits once."""
    return Bound(rows * vocabulary * dtype.itemsize)


def rms_norm(rows: int, width: int, dtype: torch.dtype) -> Bound:
    """With a residual: two rows read, two written."""
    return Bound(4 * rows * width * dtype.itemsize)


def swiglu(rows: int, width: int, dtype: torch.dtype) -> Bound:
    """Two rows read, one written."""
    return Bound(3 * rows * width * dtype.itemsize)


def restore_kv(tokens: int, kv_heads: int, dim: int, token_bytes: float, dtype: torch.dtype) -> Bound:
    """The bytes of blocks read, keys and values written."""
    return Bound(tokens * (token_bytes + 2 * kv_heads * dim * dtype.itemsize))


def dequantize_rows(rows: int, width: int, row_bytes: int, dtype: torch.dtype) -> Bound:
    """The bytes read, the numbers written."""
    return Bound(rows * (row_bytes + width * dtype.itemsize))
