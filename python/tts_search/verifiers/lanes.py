"""Loads the model of a verifier, and makes its KV pool."""

from __future__ import annotations

from typing import Any

from tts_search.models.decoder import KvDtype
from tts_search.models.graphs import decode_graphs
from tts_search.models.pool import MAX_FORWARD_TOKENS, BranchPool
from tts_search.models.sizing import pool_for
from tts_search.models.streams import Lane

__all__ = ["load_lane"]


def load_lane(
    path_or_id: str,
    causal_lm: bool,
    batch_tokens: int = MAX_FORWARD_TOKENS,
    *,
    kv_memory: int | str | None = None,
    kv_dtype: KvDtype | None = None,
    **options: Any,
) -> Lane:
    """A model, with its LM head if it is to generate, and a pool for it."""
    from tts_search.models.loading import load_decoder

    model = load_decoder(path_or_id, causal_lm=causal_lm, **options)
    pool = pool_for(model, kv_memory, kv_dtype=kv_dtype)
    return Lane(model, BranchPool(pool, batch_tokens, decode_graphs(model, pool) if causal_lm else None))
