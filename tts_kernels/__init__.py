"""The kernel layer of external test-time scaling, as torch operators.

Score the steps of a reasoning chain with a process reward model, fork the KV cache of a search tree without copying its
prefix, attend over the tree reading each shared token once, prune its branches, sample its next tokens.
"""

from __future__ import annotations

from .backend import BackendInfo, backend_info, debug_checks, use_backend
from .ops.aggregate_steps import aggregate_steps
from .ops.linear_logprob import linear_logprob
from .ops.prune import Pruned, prune
from .ops.sample import Sampled, sample
from .ops.score_and_prune import ScoredPruned, score_and_prune
from .ops.step_scores import step_scores
from .score_head import ScoreHead

__version__ = "0.1.0"

__all__ = [
    "BackendInfo",
    "Pruned",
    "Sampled",
    "ScoreHead",
    "ScoredPruned",
    "aggregate_steps",
    "backend_info",
    "debug_checks",
    "linear_logprob",
    "prune",
    "sample",
    "score_and_prune",
    "step_scores",
    "use_backend",
]
