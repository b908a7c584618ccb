"""Tests while a model loads whether a decoder computes the same as the model itself: a few tokens over a small tree.

Each model has its own code for positions, masks and caches, and its configuration does not describe all of it. So
before a decoder is used, two texts with a common beginning go through it as the branches of a search do: the beginning,
a part of each branch, and one more token of each, beside a third text at the end of the context. They also go through
the model with its own eager attention, each as a whole and alone. If the results differ by more than rounding, the
decoder is refused.

If rotary factors change with the length of a text (`DecoderShape.switch`), the test moves this length between the
lengths of the two texts, so the longer one is read again in the middle. Texts of thousands of tokens would take too
long.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from tts_search.models.decoder import Batch, Decoder, KVPool
from tts_search.models.rotary import rotary_switch, switching_at
from tts_search.models.transformers import TransformersDecoder, body_of

__all__ = ["QUANTISED", "EagerOutputs", "check_decoder", "eager_outputs"]

_TOKENS: Final = 24  # tokens of the longer text: a page and a half
_LONGEST: Final = 160  # largest length of the longer text, if a sliding window needs more
_PAST: Final = 20  # tokens of it after the first window
# The largest allowed error of a hidden state, relative to its norm. Rounding is 1e-6 in float32, and a hundred times
# that in a model that runs its layers many times (HRM). Lower precision is less exact, and in a mixture of experts
# rounding may choose another expert. So there, only half of the rows must be near.
# another one; so there half of the rows must be near.
_EXACT: Final = 1e-3
_COARSE: Final = 0.1
# Quantised weights add a rounding of their own, largest in small random models. Half of the rows must be near.
QUANTISED: Final = {"int8": 0.3, "int4": 0.9}


@dataclass(frozen=True, slots=True)
class EagerOutputs:
    """Two texts with a common beginning, and a model's outputs for them.

    Attributes
    ----------
    texts : tuple of list of int
        The shorter text and the longer text.
    common : int
        Number of tokens in the common beginning.
    hidden : tuple of Tensor
        Final hidden states [n, H] of each text, float32.
    logits : Tensor or None
        Logits [1, V] of the longer text's last token, if the model has a head.
    switch : int or None
        The length at which the rotary factors changed for these outputs, if the model's do change.
    """

    texts: tuple[list[int], list[int]]
    common: int
    hidden: tuple[Tensor, Tensor]
    logits: Tensor | None
    switch: int | None = None


@torch.inference_mode()
def eager_outputs(model: Any, max_length: int) -> EagerOutputs:
    """The outputs of a transformers model for two texts, with its own eager attention.

    Raises
    ------
    ValueError
        If the model does not run.
    """
    common, texts = _texts(model, max_length)
    switch = rotary_switch(model)
    if switch is not None:
        switch = sum(map(len, texts)) // 2 if switch < max_length else None
    with _eager(model), switching_at(model, switch):
        ids = [torch.tensor([text], device=model.device) for text in texts]
        short, long = (body_of(model)(input_ids=each, use_cache=False).last_hidden_state[0].float() for each in ids)
        has_head = model.get_output_embeddings() is not None
        logits = model(input_ids=ids[1], use_cache=False).logits[0, -1:].float() if has_head else None
    return EagerOutputs((texts[0], texts[1]), common, (short, long), logits, switch)


@torch.inference_mode()
def check_decoder(decoder: Decoder, expected: EagerOutputs, allowed: float | None = None) -> None:
    """Compare a decoder with the outputs of its model.

    This costs the forwards of about 50 tokens. ``allowed`` replaces the error that the dtype allows for half of the
    rows.

    Raises
    ------
    ValueError
        If the difference is larger than rounding. The message has the difference.
    """
    if isinstance(decoder, TransformersDecoder):
        shape = decoder.shape
        decoder.pretended = max(0, shape.max_length - _LONGEST)
        decoder.shape = replace(shape, switch=expected.switch)
        try:
            with switching_at(decoder.model, expected.switch):
                _walk(decoder, expected, allowed)
        finally:
            decoder.pretended, decoder.shape = 0, shape
    else:
        _walk(decoder, expected, allowed)


def _walk(decoder: Decoder, expected: EagerOutputs, allowed: float | None) -> None:
    pool = KVPool(decoder.shape, 64, dtype=decoder.dtype, device=decoder.device)
    short, long = expected.texts
    start, ends = expected.common, (len(expected.texts[0]), len(expected.texts[1]))
    root = pool.forest.add_root()
    first = decoder.hidden(pool.pack([root], [short[:start]]), pool.kv)
    branches = pool.forest.fork([root, root])
    new = pool.renewed(branches, [short[start:-1], long[start:-1]])
    rows = decoder.hidden(_with_stranger(pool, branches, new), pool.kv)
    middle = torch.split(rows, [*map(len, new), 2])
    last = decoder.hidden(pool.pack(branches, [short[-1:], long[-1:]]), pool.kv)
    parts = [  # of a text that was read again, everything from then on
        torch.cat([first[: end - 1 - len(read)], read, row[None]])
        for end, read, row in zip(ends, middle, last, strict=False)
    ]
    for got, want in zip(parts, expected.hidden, strict=True):
        _compare("hidden states", got, want, decoder.dtype, allowed)
    if expected.logits is None:
        return
    for branch in branches:
        pool.forest.truncate(branch, pool.forest.length(branch) - 1)
    batch = pool.pack(branches, [short[-1:], long[-1:]])
    got = decoder.logits(batch, pool.kv, torch.tensor([1], device=decoder.device))
    _compare("logits", got, expected.logits, decoder.dtype, allowed)


def _texts(model: Any, max_length: int) -> tuple[int, list[list[int]]]:
    """The length of the common beginning, and two texts. The longer one leaves a sliding window if that is cheap."""
    config = model.config.get_text_config(decoder=True)
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_window")]
    lengths = [window + _PAST for window in windows if isinstance(window, int)]
    wanted = max([_TOKENS, *(length for length in lengths if length <= _LONGEST)])
    total = max(4, min(wanted, max_length))
    special = {value for name, value in config.to_dict().items() if "token" in name and isinstance(value, int)}
    rows = int(model.get_input_embeddings().weight.shape[0])
    words = [word for word in range(rows) if word not in special] if rows < 10_000 else range(1000, rows - 1000)
    rng = random.Random(0)
    common, shorter = total // 2, max(2, (total - total // 2) // 2)
    long, other = ([rng.choice(words) for _ in range(length)] for length in (total, shorter))
    return common, [[*long[:common], *other], long]


def _with_stranger(pool: KVPool, branches: list[int], tokens: Sequence[Sequence[int]]) -> Batch:
    """A packed forward that also has two tokens at the end of the longest text that the model takes."""
    batch = pool.pack([*branches, pool.forest.add_root()], [*tokens, [*tokens[0][:1], *tokens[1][:1]]])
    ends = torch.arange(pool.shape.max_length - 2, pool.shape.max_length, device=pool.device)
    positions = torch.cat([batch.positions[:-2], ends])
    far = None if batch.far is None else torch.cat([batch.far[:-2], torch.ones_like(ends, dtype=torch.bool)])
    return replace(batch, positions=positions, far=far)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _compare(what: str, got: Tensor, want: Tensor, dtype: torch.dtype, allowed: float | None) -> None:
    if got.shape != want.shape:
        raise ValueError(f"expected {what} {list(want.shape)}, as with its own eager attention, got {list(got.shape)}")
    off = (got.float() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    exact = allowed is None and dtype in (torch.float32, torch.float64)
    error = float(off.max() if exact else off.median())
    if not error <= (_EXACT if exact else _COARSE if allowed is None else allowed):  # NaN too
        raise ValueError(f"its {what} differ from those with its own eager attention by {error:.1%} of their norm")
