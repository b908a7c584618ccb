"""Draws one token for each row of logits, after temperature, top-k, top-p and min-p.

A draw depends only on the row's logits, options, seed and offset.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op

MAX_VOCAB = 1 << 24
MOST_TOP = 128


class Sampled(NamedTuple):
    """The result of `sample`.

    Attributes
    ----------
    tokens
        [B] int64; -1 for a row with NaN or without a finite logit.
    logprobs
        [B] float32: log-probability of each token under the untempered, untruncated distribution; NaN where there
        is no token.
    """

    tokens: Tensor
    logprobs: Tensor


class SampledTop(NamedTuple):
    """The result of `sample`, with the likeliest tokens at its place.

    Attributes
    ----------
    tokens, logprobs
        As in `Sampled`.
    top_ids
        [B, k] int64: the tokens with the largest logits, best first, the lower id first on ties; -1 where there is no
        token.
    top_logprobs
        [B, k] float32: their log-probabilities, as `logprobs`; NaN where there is no token.
    """

    tokens: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@overload
def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: Tensor,
    offsets: Tensor,
    top_logprobs: Literal[0] = 0,
) -> Sampled: ...


@overload
def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: Tensor,
    offsets: Tensor,
    top_logprobs: int,
) -> Sampled | SampledTop: ...


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: Tensor,
    offsets: Tensor,
    top_logprobs: int = 0,
) -> Sampled | SampledTop:
    """Draw one token for each row.

    The draw depends only on the row's logits and options, its seed and its offset: not on its index, other rows, the
    number of threads or the instruction set.

    Parameters
    ----------
    logits
        [B, V] float, V from 1 to 2**24. -inf masks a token; +inf makes it certain (several of them share the
        probability). Rows may be strided.
    temperature
        A finite number >= 0 or [B] float. The distribution is ``softmax(logits / temperature)``; 0 takes the largest
        logit, the lower id on ties.
    top_k
        An int >= 0 or [B] int. Keeps the k largest logits and all that equal the k-th; 0 keeps all.
    top_p
        A number in (0, 1] or [B] float. Keeps the smallest set of the tokens left by top_k (renormalised; best first,
        the lower id first on ties) whose probability reaches top_p; 1 keeps all.
    min_p
        A number in [0, 1] or [B] float. Keeps those of the remaining tokens that are at least min_p times as likely as
        the likeliest.
    seeds
        [B] int64: the stream of each row.
    offsets
        [B] int64: the number of the draw in this stream.
    top_logprobs
        k, from 0 to the smaller of V and 128: how many of the likeliest tokens to return with each draw.

    Returns
    -------
    Sampled or SampledTop
        tokens [B] int64 and logprobs [B] float32; (-1, nan) for a row with NaN or without a finite logit. With
        top_logprobs also their ids and log-probabilities, [B, k], best first.

    Raises
    ------
    TypeError
        For a wrong dtype or type.
    ValueError
        For a wrong shape or device, or an option out of its range.

    Notes
    -----
    Under torch.compile, an option that changes from call to call should be a tensor: each new number is compiled again.

    ``exp((logit - max) / temperature)`` is rounded to a multiple of 2**-39. So sums are exact integers, independent of
    the order, and a token less likely than 2**-40 times the likeliest is never drawn. 64 bits r of Philox4x32-10 (key
    ``seed``, counter ``offset``) select the first id at which the running sum of kept weights exceeds ``r / 2**64`` of
    their total. Options are read in float32.

    O(V) for each row, without sorting: the row is read from memory once, and about twice from the cache; V
    exponentials, 2 V unless the temperature is 0 or 1. The k likeliest cost O(V + k log(V / k)) more on a CPU, O(k V)
    on a GPU.
    Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
    Top-p: Holtzman et al., arXiv 1904.09751. Min-p: Nguyen et al., arXiv 2407.01082.

    Examples
    --------
    >>> import torch, tts_kernels as tk
    >>> logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 9.0]])
    >>> draw = tk.sample(logits, temperature=0.8, top_p=0.95, seeds=torch.tensor([7, 8]), offsets=torch.tensor([0, 0]))
    >>> draw.tokens.shape, draw.logprobs.dtype
    (torch.Size([2]), torch.float32)
    >>> tk.sample(logits, temperature=0, seeds=torch.tensor([7, 8]), offsets=torch.tensor([0, 0])).tokens
    tensor([1, 2])
    """
    numbers, tensors = [], []
    for value, off, dtype in zip((temperature, top_k, top_p, min_p), _OFF, _DTYPES, strict=True):
        is_tensor = isinstance(value, Tensor)
        numbers.append(off if is_tensor else value)
        tensors.append(_as(value, dtype) if is_tensor else None)
    out = _op(logits, seeds, offsets, *numbers, *tensors, top_logprobs)
    return SampledTop(*out) if top_logprobs else Sampled(*out[:2])


_NAMES = ("temperature", "top_k", "top_p", "min_p")
_OFF = (1.0, 0, 1.0, 0.0)
_DTYPES = (torch.float32, None, torch.float32, torch.float32)


def _as(value: Any, dtype: torch.dtype | None) -> Tensor:
    """Options in the kernel's dtype. A wrong dtype is left unchanged, so that the check names it."""
    tensor: Tensor = value
    if dtype is not None and tensor.dtype in checks.FLOAT:
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def _check(logits: Tensor, seeds: Tensor, offsets: Tensor, *options: Any) -> None:
    checks.tensor("logits", logits, shape=["B", "V"])
    rows, vocab = logits.shape
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"logits: expected 1 to {MAX_VOCAB} columns, got {checks.describe(logits)}")
    for name, value in (("seeds", seeds), ("offsets", offsets)):
        checks.tensor(name, value, (torch.int64,), [rows], logits.device)
    for name, number, values in zip(_NAMES, options[:4], options[4:8], strict=True):
        if values is None:
            _check_number(name, number)
        else:
            _check_values(name, values, rows, logits.device)
    checks.integer("top_logprobs", options[-1], 0, min(vocab, MOST_TOP) + 1)


def _check_number(name: str, value: Any) -> None:
    if name == "top_k":
        checks.integer(name, value, 0)
    elif name == "temperature":
        checks.number(name, value, 0.0, _LARGEST)
    else:
        checks.number(name, value, 0.0, 1.0, open_low=name == "top_p")


_LARGEST = torch.finfo(torch.float32).max


def _check_values(name: str, values: Tensor, rows: int, device: torch.device) -> None:
    checks.tensor(name, values, checks.INDEX if name == "top_k" else checks.FLOAT, [rows], device)
    if checks.readable(values):
        for row, value in enumerate(values.tolist()):
            try:
                _check_number(name, value)
            except ValueError as error:
                raise ValueError(f"{error} in row {row}") from None


def _fake(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, top = logits.shape[0], options[-1]
    integers, floats = (partial(logits.new_empty, dtype=dtype) for dtype in (torch.int64, torch.float32))
    return integers(rows), floats(rows), integers((rows, top)), floats((rows, top))


_op = Op("sample", reference=reference.sample, check=_check, fake=_fake)
