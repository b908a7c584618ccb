"""Models whose weights are quantised while they are loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_llama_decoder import empty_pool, model_of
from tiny import save_checkpoint, tiny_model
from torch import Tensor
from tts_search import HFPolicy, HFVerifier, SearchConfig, search
from tts_search.models.llama import INT4_GROUP, LlamaDecoder
from tts_search.models.loading import lean_decoder, load_decoder

import tts_kernels as tk


def logits_of(decoder: LlamaDecoder, tokens: list[int]) -> Tensor:
    pool = empty_pool(decoder)
    return decoder.logits(pool.pack([pool.forest.add_root()], [tokens]), pool.kv)


@pytest.mark.parametrize("name", ["llama", "tied", "biases", "qwen3"])
@pytest.mark.parametrize(("quantize", "allowed"), [("int8", 0.12), ("int4", 0.8)])
def test_logits_are_near_those_of_the_model(name: str, quantize: str, allowed: float) -> None:
    model = model_of(name)
    exact = logits_of(lean_decoder(copy.deepcopy(model)), list(range(10, 40)))
    decoder = lean_decoder(copy.deepcopy(model), quantize)
    out = logits_of(decoder, list(range(10, 40)))
    assert 0 < ((out - exact).norm() / exact.norm()).item() < allowed
    layer = decoder.layers.layers[0]
    form = (quantize, INT4_GROUP if quantize == "int4" else None)
    assert {(p.quantize, p.group_size) for p in (layer.qkv, layer.o, layer.gate_up, layer.down)} == {form}
    assert decoder.shape == lean_decoder(model).shape


def test_a_branch_does_not_depend_on_its_company() -> None:
    decoder = lean_decoder(model_of("llama").bfloat16(), "int8")
    texts = [[10 + i, 11, 12 + i] for i in range(40)]

    def step(chosen: list[int]) -> Tensor:
        pool = empty_pool(decoder)
        roots = [pool.forest.add_root() for _ in chosen]
        return decoder.logits(pool.pack(roots, [texts[i] for i in chosen]), pool.kv)

    together = step(list(range(40))).unflatten(0, (40, 3))
    for chosen in ([7], [39, 0], list(range(0, 40, 3))):
        assert torch.equal(step(chosen).unflatten(0, (len(chosen), 3)), together[chosen])


def test_memory_holds_few_bits(tmp_path: Path) -> None:
    """The projections are a quarter and an eighth of float32, their scales besides; the embedding is what it was."""
    path = save_checkpoint(tmp_path, model_of("llama"))
    plain, eight, four = (load_decoder(path, quantize=quantize) for quantize in (None, "int8", "int4"))

    def size(decoder: LlamaDecoder) -> tuple[int, int]:
        packed = [p for layer in decoder.layers.layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        assert isinstance(decoder._head, tk.PackedLinear)
        return sum(p.weight.nbytes for p in (*packed, decoder._head)), decoder._embedding.nbytes

    floats, embedding = size(plain)
    # The depths of these models are padded to 64.
    assert size(eight)[0] <= floats / 4 * 2
    assert size(four)[0] * 2 == size(eight)[0]
    assert size(eight)[1] == size(four)[1] == embedding


def test_searches_run_and_repeat(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, model_of("qwen2"))
    config = SearchConfig(method="beam_search", n=4, expand=2, max_steps=2, max_step_tokens=6)

    def run(quantize: str | None) -> list[str]:
        policy = HFPolicy(path, kv_memory="1MiB", quantize=quantize)
        verifier = HFVerifier(path, format="yes_no", kv_memory="1MiB", quantize=quantize)
        result = search(["1+1?"], policy, verifier, config, progress=False)[0]
        return [one.text for one in result.completions] + [str(one.score) for one in result.completions]

    assert run("int8") == run("int8")
    assert run("int8") != run("int4") != run(None)


def test_what_cannot_be_quantised_is_refused_by_name(tmp_path: Path) -> None:
    llama = save_checkpoint(tmp_path / "llama", tiny_model())
    gemma = save_checkpoint(tmp_path / "gemma2", tiny_model("gemma2"))
    with pytest.raises(ValueError, match=r"^quantize: .* of class Gemma2ForCausalLM"):
        load_decoder(gemma, quantize="int8")
    with pytest.raises(ValueError, match=r"^quantize: expected None with decoder='transformers'"):
        HFPolicy(llama, decoder="transformers", quantize="int8")
    with pytest.raises(ValueError, match=r"^quantize: expected 'int8', 'int4' or None, got 'int3'"):
        HFPolicy(llama, quantize="int3")
