"""Chooses the decoder for a checkpoint: the lean one if it can run it, else that of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from tts_search.models import transformers as adapter
from tts_search.models.checkpoint import Checkpoint
from tts_search.models.decoder import Decoder, DecoderKind
from tts_search.models.formats.gguf import is_gguf
from tts_search.models.formats.lora import base_of
from tts_search.models.formats.opening import open_checkpoint
from tts_search.models.llama import LlamaConfig, LlamaDecoder, Quantize
from tts_search.models.quantised import Loader
from tts_search.models.rotary import context_of
from tts_search.models.selftest import QUANTISED, check_decoder, eager_outputs
from tts_search.models.streaming import blank_model, check_streamed, load_state

__all__ = ["lean_decoder", "llama_config", "load_decoder", "why_not_lean"]


def _no_window(config: Any) -> list[int | None]:
    return [None] * config.num_hidden_layers


def _one_window(config: Any) -> list[int | None]:
    return [config.sliding_window] * config.num_hidden_layers


def _window_by_layer(config: Any) -> list[int | None]:
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


# The parameters of the families, which their configurations name differently. Biases and the norms of heads (Qwen3) are
# found by their weights. The models of a family in transformers are <name>Model and <name>ForCausalLM.
_WINDOWS: Final[dict[str, Callable[[Any], list[int | None]]]] = {
    "Llama": _no_window,
    "Mistral": _one_window,
    "Qwen2": _window_by_layer,
    "Qwen3": _window_by_layer,
}
# Rotations whose angles depend only on the position. Others depend on the length of the longest sequence.
_ROPES: Final = ("default", "linear", "llama3", "yarn")
_DEVICES: Final = ("cpu", "cuda", "xpu")
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def load_decoder(
    path_or_id: str,
    *,
    causal_lm: bool = True,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    decoder: DecoderKind = "auto",
    self_test: bool = True,
    quantize: Quantize | None = None,
) -> Decoder:
    """Load a checkpoint (folder, hub id or GGUF file); ``causal_lm=False`` leaves its head out.

    Parameters
    ----------
    path_or_id : str
        What transformers loads: config and safetensors weights. Or a file that ends in ``.gguf``.
    causal_lm : bool
        Whether logits are needed.
    dtype : torch.dtype or str or None
        By default the checkpoint's.
    device : torch.device or str or None
        By default a GPU if there is one, else the CPU.
    decoder : {"auto", "lean", "transformers"}
        `LlamaDecoder`, `TransformersDecoder`, or by default the first if `why_not_lean` finds no reason against it.
    self_test : bool
        Whether a few tokens are computed by the decoder and by the model's own eager attention, see
        :mod:`tts_search.models.selftest`. If the results differ, the model is refused.
    quantize : {"int8", "int4"} or None
        Quantise the weights as `LlamaDecoder` does, one projection after another. Modules of transformers are not
        quantised. Weights that have few bits in their file keep them.

    Raises
    ------
    ValueError
        If the checkpoint lacks weights, if the model cannot run over a forest in either way, or if ``"lean"`` or
        ``quantize`` was given and is not possible. The message has the reason.
    """
    if decoder not in ("auto", "lean", "transformers"):
        raise ValueError(f"decoder: expected 'auto', 'lean' or 'transformers', got {decoder!r}")
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize: expected 'int8', 'int4' or None, got {quantize!r}")
    if quantize is not None and decoder == "transformers":
        raise ValueError(f"quantize: expected None with decoder='transformers', got {quantize!r}")
    if decoder == "transformers" and (is_gguf(path_or_id) or base_of(path_or_id) != path_or_id):
        raise ValueError(f"decoder: expected 'auto' or 'lean' for the weights of {path_or_id}, got 'transformers'")
    # Modules of transformers read what transformers reads.
    checkpoint = None if decoder == "transformers" else open_checkpoint(path_or_id)
    if checkpoint is not None and (
        quantize is not None or is_gguf(path_or_id) or checkpoint.few_bits or checkpoint.merged
    ):
        return _streamed(checkpoint, causal_lm, dtype, device, quantize, self_test)
    general = adapter.load_transformers(path_or_id, causal_lm=causal_lm, dtype=dtype, device=device)
    model = general.model
    reason = why_not_lean(model)
    if decoder == "lean" and reason is not None:
        raise ValueError(f"decoder: expected a model that the lean decoder can run, got one {reason}")
    with adapter.following(model.config):
        expected = eager_outputs(model, general.shape.max_length) if self_test else None
        chosen: Decoder = general
        if decoder != "transformers" and reason is None:
            del general  # so that its weights are freed one by one
            chosen = lean_decoder(model)
        if expected is not None:
            check_decoder(chosen, expected)
    return chosen


def _streamed(
    checkpoint: Checkpoint,
    causal_lm: bool,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    quantize: Quantize | None,
    self_test: bool,
) -> LlamaDecoder:
    """A lean decoder whose weights are packed, and quantised, as they are read from their file."""
    config = adapter.load_config(checkpoint.path_or_id)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the checkpoint handles it
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = _dtype(dtype, config, checkpoint)
    with adapter.following(config):
        model = blank_model(config, causal_lm, kind, checkpoint)
    reason = _why_not_kind(model.config, type(model).__name__) or _why_not_placed({place}, {kind})
    if reason is not None:
        what = "decoder" if quantize is None else "quantize"
        raise ValueError(f"{what}: expected a model that the lean decoder can run, got one {reason}")
    state = load_state(checkpoint, model, place)
    decoder = LlamaDecoder(llama_config(model, place), state, quantize, kind)
    if self_test:
        allowed = QUANTISED[quantize] if quantize else QUANTISED["int8"] if checkpoint.few_bits else None
        with adapter.following(config):
            check_streamed(decoder, load_state(checkpoint, model, place), config, allowed)
    return decoder


def _dtype(dtype: torch.dtype | str | None, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The requested dtype, or else the checkpoint's."""
    if isinstance(dtype, torch.dtype):
        return dtype
    found = config.dtype if dtype in (None, "auto") else getattr(torch, dtype, None)
    if found is None and dtype in (None, "auto"):
        found = checkpoint.dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: expected one of torch, got {dtype!r}")
    return found


def why_not_lean(model: Any) -> str | None:
    """The reason why `LlamaDecoder` cannot run a transformers model; None if it can.

    The rule: a model of Llama, Mistral, Qwen2 or Qwen3 or its causal LM, on the CPU or on one GPU, in float32,
    bfloat16 or float16 throughout, not quantised, with SiLU and a rotation that depends on the position alone.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return "with quantised weights"
    return _why_not_kind(model.config, type(model).__name__) or _why_not_placed(
        {parameter.device for parameter in model.parameters()}, {parameter.dtype for parameter in model.parameters()}
    )


def _why_not_placed(devices: set[torch.device], dtypes: set[torch.dtype]) -> str | None:
    if len(devices) != 1 or next(iter(devices)).type not in _DEVICES:
        return f"on {', '.join(sorted(map(str, devices)))}"
    if len(dtypes) != 1 or not dtypes <= {*_DTYPES}:
        return f"of dtype {', '.join(sorted(map(str, dtypes)))}"
    return None


def _why_not_kind(config: Any, name: str) -> str | None:
    family = name.removesuffix("ForCausalLM").removesuffix("Model")
    if family not in _WINDOWS:
        return f"of class {name}, not of {', '.join(_WINDOWS)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"with hidden_act {config.hidden_act!r}"
    rope = config.rope_parameters
    if rope.get("rope_type") not in _ROPES or rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        return f"with the rotary embedding {rope}"
    return None


def lean_decoder(model: Any, quantize: Quantize | None = None) -> LlamaDecoder:
    """A `LlamaDecoder` with the weights of a model that `why_not_lean` accepts. They are removed from the model."""
    config = llama_config(model)
    state: dict[str, Tensor | Loader] = {}
    for module_name, module in model.named_modules():
        for name in list(module._parameters):
            if (parameter := module._parameters.pop(name)) is not None:
                state[f"{module_name}.{name}".removeprefix("model.")] = parameter.detach()
    return LlamaDecoder(config, state, quantize)


def llama_config(model: Any, device: torch.device | None = None) -> LlamaConfig:
    """The parameters that are not in the weights of a model of the families, on its device or on another."""
    config, base = model.config, model.base_model
    family = type(base).__name__.removesuffix("Model")
    # in float32 for any dtype of the model; the module supports every kind of scaling.
    rotary = type(base.rotary_emb)(config)
    cos, sin = rotary(torch.zeros(0), torch.arange(context_of(config))[None])
    half = cos.shape[-1] // 2
    return LlamaConfig(
        num_q_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        eps=config.rms_norm_eps,
        windows=tuple(_WINDOWS[family](config)),
        cos_sin=torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1).to(device or model.device),
    )
