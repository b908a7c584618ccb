"""A lean decoder whose weights are read from their file and packed one projection at a time.

Only the packed weights and the current projection are in memory. In this way weights are quantised while they are
loaded, and files are read that hold few bits already. Two models of transformers are built: one without memory, for the
names and shapes of the configuration, and one of two layers for the self-test.
"""

from __future__ import annotations

import copy
import functools
import re
from typing import Any, Final

import torch
import transformers
from torch import Tensor

from tts_search.models.checkpoint import Checkpoint
from tts_search.models.llama import LlamaDecoder
from tts_search.models.quantised import Loader, Weight, whole
from tts_search.models.selftest import check_decoder, eager_outputs

__all__ = ["blank_model", "check_streamed", "load_state"]

_TESTED_LAYERS: Final = 2
_TESTED_WORDS: Final = 4096


def blank_model(config: Any, causal_lm: bool, dtype: torch.dtype, checkpoint: Checkpoint) -> Any:
    """The model of a configuration, without memory for its weights.

    Raises
    ------
    ValueError
        If the configuration asks for more layers than the checkpoint has.
    """
    layers = {int(match[1]) for name in checkpoint.names if (match := re.search(r"(?:^|\.)layers\.(\d+)\.", name))}
    count = config.get_text_config(decoder=True).num_hidden_layers
    if count > len(layers):
        raise ValueError(f"{checkpoint.path_or_id}: found {len(layers)} of {count} layers in the checkpoint")
    auto = transformers.AutoModelForCausalLM if causal_lm else transformers.AutoModel
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype)


def load_state(checkpoint: Checkpoint, model: Any, device: torch.device) -> dict[str, Tensor | Loader]:
    """Functions that load each weight of a model from a checkpoint, by its name without the prefix ``"model."``.

    Raises
    ------
    ValueError
        If a weight is missing, or has another shape than the model's.
    """
    stored = {name.removeprefix("model."): name for name in checkpoint.names}
    state: dict[str, Tensor | Loader] = {}
    missing = []
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("model.")
        if plain not in stored:
            missing.append(name)
        elif (shape := checkpoint.shape(stored[plain])) != tuple(parameter.shape):
            raise ValueError(
                f"{checkpoint.path_or_id}: expected {name} of shape {list(parameter.shape)}, got {list(shape)}"
            )
        else:
            state[plain] = functools.partial(_load, checkpoint, stored[plain], device)
    if missing:
        raise ValueError(f"{checkpoint.path_or_id}: found no {', '.join(sorted(missing))} in the checkpoint")
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    return state


def _load(checkpoint: Checkpoint, name: str, device: torch.device) -> Weight:
    weight = checkpoint.weight(name)
    return weight if device.type == "cpu" else weight.to(device)


def check_streamed(
    decoder: LlamaDecoder, state: dict[str, Tensor | Loader], config: Any, allowed: float | None
) -> None:
    """Compare the first layers of a decoder with those of transformers, on the same weights as floats.

    ``state`` loads the weights again. ``allowed`` is that of `check_decoder`.

    Raises
    ------
    ValueError
        If they differ by more than rounding, or by more than ``allowed``.
    """
    first = decoder.first_layers(_TESTED_LAYERS)
    config = copy.deepcopy(config)
    config.num_hidden_layers = first.shape.num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: first.shape.num_layers]
    config.vocab_size = min(config.vocab_size, _TESTED_WORDS)
    config.pad_token_id = None
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, dtype=decoder.dtype)
    words = torch.arange(config.vocab_size, device=decoder.device)
    weights = {"embed_tokens.weight": decoder.embed(words)}
    for name, _ in model.named_parameters():
        if name not in weights:
            loader = state[name]
            assert not isinstance(loader, Tensor)
            weight = loader()
            weights[name] = whole(weight, decoder.dtype)
    model.load_state_dict(weights, assign=True)
    model.rotary_emb = type(model.rotary_emb)(config).to(decoder.device)
    check_decoder(first, eager_outputs(model.eval(), decoder.shape.max_length), allowed)
