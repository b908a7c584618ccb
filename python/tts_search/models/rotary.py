"""The longest text that a model's rotary embedding allows, and embeddings whose factors depend on a text's length.

Two kinds of rotary scaling choose the factors of a whole forward by the longest position in it. In a packed forward,
this would rotate a short branch by the length of its neighbours, and keys in the cache would become wrong.

``"longrope"`` has two sets of factors: one for texts up to the length that the model was first trained on
(`rotary_switch`), and one for longer texts. Each row gets the factors of its own text, which its position says
(`marked`). A text that grows beyond the switch is read again from its start. The code that keeps the keys does this:
`KVPool.pack` and `BranchPool`.

``"dynamic"`` has other factors for each length beyond the first one (`rotary_bound`), so the context ends there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["context_of", "follow_rotary", "marked", "rotary_bound", "rotary_switch", "switching_at"]

_NO_LIMIT: Final = 2**17  # context of a model whose configuration has no limit
_ORIGINAL: Final = "original_max_position_embeddings"
_STRETCHED: Final = ("linear", "ntk", "yarn")
_FAR: Final = 1 << 40  # is added to the positions of texts longer than the switch
_DYNAMIC: Final = "dynamic"
_LONGROPE: Final = "longrope"
_LENGTH: Final = "_tts_length"  # set on a module: its bound or switch, and the attention over a forest
_GIVEN: Final = "_tts_given"  # set on a module: the positions it was given


def context_of(config: Any) -> int:
    """The largest number of tokens of a text, from a configuration, as vLLM derives it.

    It is ``max_position_embeddings``. If rotary angles are stretched by a factor, it is multiplied by this factor. For
    yarn, the length before stretching is multiplied instead. In ``"llama3"`` and ``"longrope"`` configurations, and in
    those with other angles for each kind of layer, ``max_position_embeddings`` already includes the factor.
    """
    length: int = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind not in _STRETCHED:
        return length
    if kind == "yarn":
        length = rope.get(_ORIGINAL) or length
    return int(length * (rope.get("factor") or 1.0))


def rotary_bound(model: Any) -> int | None:
    """The length of texts above which a rotary embedding has other factors for each length; None if there is none."""
    return min(_lengths(model, _DYNAMIC), default=None)


def rotary_switch(model: Any) -> int | None:
    """The length of texts above which a rotary embedding uses its second set of factors; None if it has only one.

    Raises
    ------
    ValueError
        If there are several such lengths.
    """
    switches = _lengths(model, _LONGROPE)
    if len(switches) > 1:
        raise ValueError(f"expected rotary embeddings that switch at one length, got {sorted(switches)}")
    return min(switches, default=None)


def marked(positions: Tensor, far: Tensor) -> Tensor:
    """Positions [T], marked in the rows of texts longer than the switch (``far`` [T] bool)."""
    return positions + _FAR * far


def follow_rotary(model: Any, attention: str) -> None:
    """Make rotary embeddings rotate each row as if its text were alone, and warn if this limits the context.

    Positions beyond a bound give NaN. A model with another attention than ``attention`` is not changed, nor is a model
    in a second call.
    """
    switch, bound = rotary_switch(model), rotary_bound(model)
    for module in model.modules():
        kinds = {kind for _, kind, _ in _scalings(module)}
        if len(kinds) > 1:
            raise ValueError("expected rotary embeddings with one kind of scaling by length, got longrope and dynamic")
        if not kinds or hasattr(module, _LENGTH):
            continue
        long = _LONGROPE in kinds
        setattr(module, _LENGTH, (switch if long else bound, attention))
        module.register_forward_pre_hook(_hide_beyond, with_kwargs=True)
        module.register_forward_hook(_turn_far if long else _blank_beyond, with_kwargs=True)
    if bound is not None:
        warnings.warn(
            f"{type(model).__name__}: rope type {_DYNAMIC} turns all tokens of a text by its length once that is "
            f"beyond {bound} tokens, which keys in a cache cannot follow: the context ends there",
            stacklevel=2,
        )


@contextmanager
def switching_at(model: Any, length: int | None) -> Iterator[None]:
    """Let a model switch at another length (None: at its own), so that a test needs no long texts."""
    before = rotary_switch(model)
    if length is not None:
        _set_switch(model, length)
    try:
        yield
    finally:
        if before is not None:
            _set_switch(model, before)


def _set_switch(model: Any, length: int) -> None:
    for module in model.modules():
        for rope, kind, _ in _scalings(module):
            if kind == _LONGROPE:
                rope[_ORIGINAL] = length
                if hasattr(module.config, _ORIGINAL):  # if the length is in both places, this one is used
                    setattr(module.config, _ORIGINAL, length)
                if hasattr(module, _LENGTH):
                    setattr(module, _LENGTH, (length, getattr(module, _LENGTH)[1]))


def _lengths(model: Any, wanted: str) -> set[int]:
    return {length for module in model.modules() for _, kind, length in _scalings(module) if kind == wanted}


def _scalings(module: Any) -> Iterator[tuple[dict[str, Any], str, int]]:
    """Parameters, kind and first length of those scalings of a rotary module that depend on the length of a text."""
    kinds = getattr(module, "rope_type", None)
    config = getattr(module, "config", None)
    if kinds is None or config is None:
        return
    for layer, kind in kinds.items() if isinstance(kinds, Mapping) else [(None, kinds)]:
        rope = config.rope_parameters if layer is None else config.rope_parameters[layer]
        if kind == _LONGROPE:
            yield rope, kind, rope.get(_ORIGINAL) or getattr(config, _ORIGINAL, config.max_position_embeddings)
        elif _DYNAMIC in kind:
            yield rope, _DYNAMIC, config.max_position_embeddings


def _hide_beyond(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the embedding: hide positions beyond its length, so that they do not change the choice of factors."""
    length, attention = getattr(module, _LENGTH)
    positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    if module.config._attn_implementation != attention:
        positions = None
    setattr(module, _GIVEN, positions)
    return None if positions is None else _with_positions(args, kwargs, positions.clamp(max=length - 1))


def _turn_far(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After the embedding: rotate rows of long texts again, together with a position beyond the switch."""
    positions, (switch, _) = getattr(module, _GIVEN), getattr(module, _LENGTH)
    if positions is None:
        return output
    far = positions >= _FAR
    places = torch.where(far, positions - _FAR, 0)
    beyond = places.new_full((*places.shape[:-1], 1), switch)
    args, kwargs = _with_positions(args, kwargs, torch.cat([places, beyond], dim=-1))
    turned = module.forward(*args, **kwargs)
    return tuple(
        torch.where(far[..., None], long[..., :-1, :], short) for short, long in zip(output, turned, strict=True)
    )


def _blank_beyond(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG001
    """After the embedding: set hidden positions to NaN."""
    positions, (bound, _) = getattr(module, _GIVEN), getattr(module, _LENGTH)
    if positions is None:
        return output
    return tuple(part.masked_fill((positions >= bound)[..., None], torch.nan) for part in output)


def _with_positions(args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor) -> Any:
    """The arguments with these positions."""
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": positions}
    return (args[0], positions, *args[2:]), kwargs
