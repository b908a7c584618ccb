"""Log-probabilities of given tokens from hidden states, without logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of one token a row under a language-model head, with no row of logits.

    ``out[n] = log softmax(hidden[n] @ weight.T / temperature)[targets[n]]``

    Parameters
    ----------
    hidden
        [N, H] float: hidden states. Rows may be strided.
    weight
        [V, H] float: the LM head, which may differ from ``hidden`` in dtype. Rows may be strided.
    targets
        [N] int: a token a row, in [0, V).
    temperature
        Divides the logits; finite and above 0.

    Returns
    -------
    Tensor
        [N] float32, at most 0. NaN where the row's logits hold NaN or +inf, as in torch.

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
    Under torch.compile each new temperature compiles anew.

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
    out: Tensor = _op(hidden, weight, targets, temperature)
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
