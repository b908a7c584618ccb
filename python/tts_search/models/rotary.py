"""How long a text a model's rotary embedding allows, and the embeddings that must not see the company of a text.

Two kinds of rotary scaling, ``"longrope"`` and ``"dynamic"``, choose the factors of a whole forward by the longest
position in it, and so change the meaning of keys that were cached before. In a packed forward that would turn a short
branch by the length of its neighbours. Up to the length that the model was first trained on the factors are constant:
there its context ends, and no position beyond it reaches the choice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

__all__ = ["bound_rotary", "context_of", "rotary_bound"]

_NO_LIMIT: Final = 2**17  # context of a model whose configuration names none
_STRETCHED: Final = ("linear", "ntk", "yarn")
_BOUND: Final = "_tts_bound"
_BEYOND: Final = "_tts_beyond"


def context_of(config: Any) -> int:
    """The most tokens of a text by a configuration, as vLLM derives it.

    That is ``max_position_embeddings``; where rotary angles are stretched by a factor, that many times more, for yarn
    of the length before stretching. ``"llama3"`` and ``"longrope"`` have it stretched already, and so have
    configurations with other angles for each kind of layer.
    """
    length: int = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind not in _STRETCHED:
        return length
    if kind == "yarn":
        length = rope.get("original_max_position_embeddings") or length
    return int(length * (rope.get("factor") or 1.0))


def rotary_bound(model: Any) -> int | None:
    """The length up to which every rotary embedding's factors are constant; None if they always are."""
    return min((length for module in model.modules() for _, length in _bounds(module)), default=None)


def bound_rotary(model: Any, attention: str) -> None:
    """Keep positions beyond `rotary_bound` from the choice of factors, and warn that the context ends there.

    Positions beyond it give NaN. Nothing changes for a model while its attention is another than ``attention``, nor
    when this is called again.
    """
    bound = rotary_bound(model)
    if bound is None:
        return
    for module in model.modules():
        if any(True for _ in _bounds(module)) and not hasattr(module, _BOUND):
            setattr(module, _BOUND, (bound, attention))
            module.register_forward_pre_hook(_hide_beyond, with_kwargs=True)
            module.register_forward_hook(_blank_beyond)
    kinds = sorted({kind for module in model.modules() for kind, _ in _bounds(module)})
    warnings.warn(
        f"{type(model).__name__}: rope type {', '.join(kinds)} turns all tokens of a text by its length once that is "
        f"beyond {bound} tokens, which a forest of texts of many lengths cannot follow: the context ends there",
        stacklevel=2,
    )


def _bounds(module: Any) -> Iterator[tuple[str, int]]:
    """Kind and bound of a rotary module's scalings that look at the length of a text."""
    kinds = getattr(module, "rope_type", None)
    config = getattr(module, "config", None)
    if kinds is None or config is None:
        return
    for layer, kind in kinds.items() if isinstance(kinds, Mapping) else [(None, kinds)]:
        rope = config.rope_parameters if layer is None else config.rope_parameters[layer]
        if kind == "longrope":
            original = rope.get("original_max_position_embeddings")
            yield kind, original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
        elif "dynamic" in kind:
            yield kind, config.max_position_embeddings


def _hide_beyond(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bound, attention = getattr(module, _BOUND)
    positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    setattr(module, _BEYOND, None)
    if positions is None or module.config._attn_implementation != attention:
        return None
    setattr(module, _BEYOND, positions >= bound)
    kept = positions.clamp(max=bound - 1)
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": kept}
    return (args[0], kept, *args[2:]), kwargs


def _blank_beyond(module: Any, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG001
    beyond = getattr(module, _BEYOND)
    if beyond is None:
        return output
    return tuple(part.masked_fill(beyond[..., None], torch.nan) for part in output)
