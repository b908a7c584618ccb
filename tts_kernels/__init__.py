"""The kernel layer of external test-time scaling, as torch operators.

Score the steps of a reasoning chain with a process reward model, fork the KV cache of a search tree without copying its
prefix, attend over the tree reading each shared token once, prune its branches, sample its next tokens.
"""

from __future__ import annotations

from .backend import debug_checks, deterministic, use_backend
from .forest import Append, ForestStats, KVForest, OutOfPages
from .info import BackendInfo, backend_info
from .kv_cache import KVCache
from .ops.aggregate_steps import aggregate_steps
from .ops.append_kv import append_kv_
from .ops.copy_pages import copy_pages_
from .ops.decoder_layers import DecoderLayer, DecoderLayers, decoder_layers_
from .ops.linear import PackedLinear, linear, pack_linear
from .ops.linear_logprob import linear_logprob
from .ops.merge_states import merge_states
from .ops.prune import Pruned, prune
from .ops.quantize_rows import dequantize_rows, quantize_rows, row_bytes
from .ops.restore_kv import restore_kv_
from .ops.rms_norm import rms_norm
from .ops.rope_append import rope_append_
from .ops.sample import Sampled, SampledTop, sample
from .ops.score_and_prune import ScoredPruned, score_and_prune
from .ops.step_scores import step_scores
from .ops.swiglu import swiglu
from .ops.tree_attention import tree_attention
from .plan import AttentionPlan, plan_attention
from .score_head import ScoreHead

__version__ = "0.1.0"

__all__ = [
    "Append",
    "AttentionPlan",
    "BackendInfo",
    "DecoderLayer",
    "DecoderLayers",
    "ForestStats",
    "KVCache",
    "KVForest",
    "OutOfPages",
    "PackedLinear",
    "Pruned",
    "Sampled",
    "SampledTop",
    "ScoreHead",
    "ScoredPruned",
    "aggregate_steps",
    "append_kv_",
    "backend_info",
    "copy_pages_",
    "debug_checks",
    "decoder_layers_",
    "dequantize_rows",
    "deterministic",
    "linear",
    "linear_logprob",
    "merge_states",
    "pack_linear",
    "plan_attention",
    "prune",
    "quantize_rows",
    "restore_kv_",
    "rms_norm",
    "rope_append_",
    "row_bytes",
    "sample",
    "score_and_prune",
    "step_scores",
    "swiglu",
    "tree_attention",
    "use_backend",
]
