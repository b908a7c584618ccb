"""The lean decoder of the Llama family against transformers' eager models, layer by layer and over random trees."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rules import assert_rule
from test_adapter import eager, random_rounds
from tiny import save_checkpoint, tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from tts_search import HFPolicy
from tts_search.models.arena import Arena
from tts_search.models.decoder import Batch, KVPool
from tts_search.models.llama import LlamaConfig, LlamaDecoder
from tts_search.models.loading import lean_decoder, llama_config, load_decoder, why_not_lean
from tts_search.models.transformers import TransformersDecoder

import tts_kernels as tk

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Every part that one of the families may have.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "all heads": ("llama", {"num_key_value_heads": 4}),
    "one KV head, wide heads": ("llama", {"num_key_value_heads": 1, "head_dim": 40}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn rope": ("qwen3", {"rope_parameters": YARN}),
    "mistral": ("mistral", {}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 without a window": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {}),
    "qwen3 with a window": ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
}


def lean(model: PreTrainedModel) -> LlamaDecoder:
    """The same weights in a lean decoder."""
    assert why_not_lean(model) is None
    return lean_decoder(copy.deepcopy(model))


def model_of(name: str, **options: Any) -> PreTrainedModel:
    """One of `MODELS`, with biases and norms that are not what they start with."""
    kind, settings = MODELS[name]
    model = tiny_model(kind, **{**settings, **options})
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter += torch.randn(parameter.shape) * (0.1 if "norm" in parameter_name else 0.5)
    return model


def empty_pool(decoder: LlamaDecoder) -> KVPool:
    """A pool whose unwritten slots are NaN."""
    pool = KVPool(decoder.shape, 256, 4, decoder.dtype)
    for tensor in (*pool.kv.k, *pool.kv.v):
        tensor.fill_(float("nan"))
    return pool


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_random_trees_are_eager_ones(name: str) -> None:
    model = model_of(name)
    decoder = lean(model)
    pool = empty_pool(decoder)
    for batch, parts in random_rounds(random.Random(name), pool):
        logits = decoder.logits(batch, pool.kv)
        wanted = torch.cat([eager(model, text)[-count:] for text, count in parts])
        assert logits.shape == wanted.shape
        assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_each_layer_is_that_of_transformers(name: str) -> None:
    """A decoder of the first layers alone gives the final norm of what the model has behind them."""
    model = model_of(name)
    config = llama_config(model)
    text = list(range(20, 60))
    with torch.no_grad():
        states = model(torch.tensor([text]), use_cache=False, output_hidden_states=True).hidden_states
    state = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    for depth in range(1, len(config.windows) + 1):
        cut = LlamaConfig(config.num_q_heads, config.num_kv_heads, config.eps, config.windows[:depth], config.cos_sin)
        first = {k: v for k, v in state.items() if not k.startswith("layers.") or int(k.split(".")[1]) < depth}
        decoder = LlamaDecoder(cut, first)
        pool = empty_pool(decoder)
        hidden = decoder.hidden(pool.pack([pool.forest.add_root()], [text]), pool.kv)
        # transformers norms the last of its hidden states itself
        wanted = states[depth][0] if depth == len(config.windows) else model.model.norm(states[depth][0])
        assert (hidden - wanted).abs().max() <= 1e-4 * wanted.abs().max(), depth


@pytest.mark.parametrize("name", ["llama", "biases", "mistral", "qwen2", "qwen3"])
def test_bfloat16_is_at_most_twice_as_far_as_eager(name: str) -> None:
    plain_model = model_of(name, initializer_range=0.1).bfloat16()
    exact_model = copy.deepcopy(plain_model).double()
    decoder = lean(plain_model)
    pool = empty_pool(decoder)
    out, exact, plain = [], [], []
    for batch, parts in random_rounds(random.Random(1), pool):
        out.append(decoder.logits(batch, pool.kv))
        exact += [eager(exact_model, text)[-count:] for text, count in parts]
        plain += [eager(plain_model, text)[-count:] for text, count in parts]
    assert out[0].dtype == torch.bfloat16
    assert_rule(torch.cat(out), torch.cat(exact), torch.cat(plain))


def test_rows_asked_for_are_rows_of_all() -> None:
    decoder = lean(model_of("qwen3"))
    texts, rows = [[10, 11, 12], [20, 21], [30]], torch.tensor([4, 2, 5, 2])

    def run(call: str, rows: Tensor | None) -> Tensor:
        pool = empty_pool(decoder)
        batch = pool.pack([pool.forest.add_root() for _ in texts], texts)
        return getattr(decoder, call)(batch, pool.kv, rows)

    for call in ("hidden", "logits"):
        assert torch.equal(run(call, rows), run(call, None)[rows])
    assert run("hidden", rows).shape == (4, 64)
    assert run("logits", rows[:0]).shape[0] == 0


def test_a_branch_does_not_depend_on_its_company() -> None:
    """To the bit where each branch keeps its keys in a segment of its own, as the roots here do."""
    decoder = lean(model_of("llama").bfloat16())
    texts = [[10 + i, 11, 12 + i] for i in range(40)]

    def step(chosen: list[int]) -> Tensor:
        pool = empty_pool(decoder)
        roots = [pool.forest.add_root() for _ in chosen]
        decoder.hidden(pool.pack(roots, [texts[i] for i in chosen]), pool.kv)
        return decoder.logits(pool.pack(roots, [[50 + i] for i in chosen]), pool.kv)

    together = step(list(range(40)))
    for chosen in ([7], [39, 0], list(range(0, 40, 3))):
        assert torch.equal(step(chosen), together[chosen])


UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "family": ("gemma2", {}, "of class Gemma2ForCausalLM"),
    "activation": ("llama", {"hidden_act": "gelu"}, "with hidden_act 'gelu'"),
    "rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        "with the rotary embedding .*dynamic",
    ),
    "head": ("llama", {"head": "tokens"}, "of class LlamaForTokenClassification"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_it_does_not_know_it_does_not_run(name: str) -> None:
    kind, options, reason = UNFIT[name]
    assert re.match(reason, why_not_lean(tiny_model(kind, **options)) or "")


def test_weights_that_it_cannot_run() -> None:
    assert why_not_lean(tiny_model().double()) == "of dtype torch.float64"
    assert why_not_lean(tiny_model().to("meta")) == "on meta"
    split = tiny_model()
    split.lm_head.to("meta")
    assert why_not_lean(split) == "on cpu, meta"
    mixed = tiny_model()
    mixed.lm_head.half()
    assert why_not_lean(mixed) == "of dtype torch.float16, torch.float32"
    quantised = tiny_model()
    quantised.config.quantization_config = {"quant_method": "fp8"}
    assert why_not_lean(quantised) == "with quantised weights"


def test_state_must_be_complete_and_nothing_more() -> None:
    model = tiny_model("llama")
    config = llama_config(model)
    state = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^state: .*layers\.0\.self_attn\.sinks"):
        LlamaDecoder(config, {**state, "layers.0.self_attn.sinks": torch.ones(4)})
    del state["layers.1.mlp.up_proj.weight"]
    with pytest.raises(KeyError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        LlamaDecoder(config, state)


def test_checkpoints_load_lean_where_they_can(tmp_path: Path) -> None:
    model = model_of("tied")
    path = save_checkpoint(tmp_path / "llama", model)
    decoder = load_decoder(path, dtype="bfloat16")
    assert isinstance(decoder, LlamaDecoder)
    assert (decoder.dtype, decoder.device.type) == (torch.bfloat16, "cpu")
    body = load_decoder(path, causal_lm=False)
    assert isinstance(body, LlamaDecoder)
    assert body.shape.head_parameters == 0
    with pytest.raises(ValueError, match="without its LM head"):
        body.logits(*one_token(body))


def test_a_decoder_can_be_insisted_on(tmp_path: Path) -> None:
    llama = save_checkpoint(tmp_path / "llama", tiny_model())
    gemma = save_checkpoint(tmp_path / "gemma2", tiny_model("gemma2"))
    for path, kind, expected in (
        (llama, "auto", LlamaDecoder),
        (llama, "lean", LlamaDecoder),
        (llama, "transformers", TransformersDecoder),
        (gemma, "auto", TransformersDecoder),
    ):
        assert type(HFPolicy(path, kv_memory="1MiB", decoder=kind).decoder) is expected
    with pytest.raises(ValueError, match=r"^decoder: .* of class Gemma2ForCausalLM"):
        load_decoder(gemma, decoder="lean")
    with pytest.raises(ValueError, match=r"^decoder: expected 'auto', 'lean' or 'transformers', got 'fast'"):
        HFPolicy(llama, decoder="fast")


def one_token(decoder: LlamaDecoder) -> tuple[Batch, tk.KVCache]:
    pool = empty_pool(decoder)
    return pool.pack([pool.forest.add_root()], [[10]]), pool.kv


@pytest.mark.parametrize("name", ["llama", "tied", "biases", "qwen2"])
def test_shape_is_that_of_the_model(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    general = load_decoder(save_checkpoint(tmp_path, model), decoder="transformers")
    assert lean(model).shape == general.shape


@pytest.mark.parametrize("name", ["llama", "tied", "biases", "qwen3"])
def test_memory_holds_the_weights_once(name: str) -> None:
    """Packing takes the model's weights away; a tied embedding is the packed head alone."""
    model = copy.deepcopy(model_of(name))
    total = sum(parameter.numel() for parameter in model.parameters())
    files = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    decoder = lean_decoder(model)
    assert not list(model.parameters())
    held = {tensor.data_ptr(): tensor.numel() for tensor in weights_of(decoder)}
    assert total <= sum(held.values()) <= total + 16 * 64  # panels of 16 rows are filled up
    assert not files & {tensor.untyped_storage().data_ptr() for tensor in weights_of(decoder)}


def test_arena_keeps_tensors_side_by_side() -> None:
    arena = Arena()
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.randn(4, 6).T, torch.randn(0)]
    kept = [arena.keep(tensor) for tensor in tensors]
    for tensor, copied in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, copied)
        assert copied.is_contiguous()
        assert copied.data_ptr() % 64 == 0 or not copied.numel()
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept[:3]}) == 1
    large = arena.keep(torch.ones(20 * 2**20))  # more than a block
    assert bool((large == 1).all())
    assert torch.equal(kept[0], tensors[0])


def weights_of(part: object) -> Iterator[Tensor]:
    """The tensors of a decoder, but for its rotary table."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for item in part:
            yield from weights_of(item)
    elif type(part).__module__.startswith(
        ("tts_search.models.llama", "tts_search.models.arena", "tts_kernels")
    ) and not isinstance(part, LlamaConfig):
        names = getattr(part, "__slots__", None) or vars(part)
        for name in names:
            yield from weights_of(getattr(part, name))
