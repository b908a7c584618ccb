"""Log-probabilities of given tokens from hidden states, without logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op
from .linear import PackedLinear, check_weight


def linear_logprob(
    hidden: Tensor, weight: Tensor | PackedLinear, targets: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Log-probability of one token for each row under a language-model head, without storing a row of logits.

    ``out[n] = log softmax(hidden[n] @ weight.T / temperature)[targets[n]]``

    Parameters
    ----------
    hidden
        [N, H] float: hidden states. Rows may be strided.
    weight
        [V, H] float: the LM head, which may differ from ``hidden`` in dtype. Rows may be strided. Or a weight of 8 or 4
        bits (`pack_linear`), whose logits are those of `linear`, unrounded.
    targets
        [N] int: a token for each row, in [0, V).
    temperature
        Divides the logits; finite and above 0.

    Returns
    -------
    Tensor
        [N] float32, at most 0. NaN if the row's logits have NaN or +inf, as in torch.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape or device, or a temperature that is not finite and positive.
    IndexError
        For a target outside [0, V).

    Notes
    -----
    Under torch.compile each new temperature is compiled again.

    Reads ``weight`` from memory once, whatever N is; 2 N H V operations. Takes O(N V / 1000) bytes of memory (and a
    float32 copy of ``hidden`` if it is float16, or bfloat16 with a weight of another dtype). The sum is kept online in
    float32 (arXiv 1805.02867) by chunks of the vocabulary that are merged in order; logits are never rounded to the
    dtype of the inputs. A row's result does not depend on the other rows.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    >>> tk.linear_logprob(hidden, weight, torch.tensor([1])).exp()
    tensor([0.5000])
    """
    out: Tensor
    if not isinstance(weight, PackedLinear):
        out = _op(hidden, weight, targets, temperature)
    elif weight.scale is None:
        raise TypeError("weight: expected a tensor or a quantised PackedLinear, got one that is not quantised")
    else:
        parts = (weight.in_features, weight.out_features, weight.scale, weight.zero)
        out = _quantized_op(hidden, weight.weight, targets, temperature, *parts)
    return out


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    checks.tensor("hidden", hidden, shape=["N", "H"])
    checks.tensor("weight", weight, shape=["V", hidden.shape[1]], device=hidden.device)
    checks.tensor("targets", targets, checks.INDEX, [hidden.shape[0]], hidden.device)
    checks.number("temperature", temperature, low=0.0, open_low=True)
    checks.index_range("targets", targets, 0, weight.shape[0])


def _fake(hidden: Tensor, _weight: Tensor, _targets: Tensor, _temperature: float) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


_op = Op("linear_logprob", reference=reference.linear_logprob, check=_check, fake=_fake)


def _check_quantized(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    in_features: int,
    vocabulary: int,
    scale: Tensor,
    zero: Tensor | None,
) -> None:
    checks.tensor("hidden", hidden, shape=["N", in_features])
    check_weight("weight.", hidden, weight, in_features, vocabulary, scale, zero)
    checks.tensor("targets", targets, checks.INDEX, [hidden.shape[0]], hidden.device)
    checks.number("temperature", temperature, low=0.0, open_low=True)
    checks.index_range("targets", targets, 0, vocabulary)


def _fake_quantized(hidden: Tensor, *_rest: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _dequantized(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    in_features: int,
    vocabulary: int,
    scale: Tensor,
    zero: Tensor | None,
) -> Tensor:
    dense = reference.dequantize_linear(weight, in_features, vocabulary, scale, zero)
    out: Tensor = _op(hidden, dense.to(hidden.dtype), targets, temperature)
    return out


_quantized_op = Op(
    "linear_logprob_quantized",
    reference=reference.linear_logprob_quantized,
    check=_check_quantized,
    fake=_fake_quantized,
    composed=_dequantized,
)
