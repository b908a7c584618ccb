"""Floating-point operations of training and of inference, as papers on test-time scaling count them.

Searches count their own operations more exactly (``SearchStats.flops_policy``, ``flops_verifier``): 2 for each weight
and token that was processed, and attention. The formulas of this module are for comparisons with published numbers.
"""

from __future__ import annotations

__all__ = ["inference_flops", "pretraining_flops", "total_flops"]


def pretraining_flops(parameters: float, tokens: float) -> float:
    """Return 6 * parameters * tokens (Kaplan et al., arXiv 2001.08361): forward 2, backward 4 per weight and token.

    Examples
    --------
    >>> f"{pretraining_flops(405e9, 15e12):.3g}"  # Llama-3.1-405B
    '3.65e+25'
    """
    return 6.0 * parameters * tokens


def inference_flops(parameters: float, tokens: float) -> float:
    """Return 2 * parameters * tokens, without attention."""
    return 2.0 * parameters * tokens


def total_flops(parameters: float, training_tokens: float, inference_tokens: float) -> float:
    """Return the total cost of a model, training and inference, as in table 4 of arXiv 2502.06703."""
    return pretraining_flops(parameters, training_tokens) + inference_flops(parameters, inference_tokens)
