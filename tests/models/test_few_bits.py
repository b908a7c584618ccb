"""Checkpoints of compressed-tensors, GPTQ and AWQ against the same weights as floats; unsupported ones are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import few_bits_files as files
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llama_decoder import empty_pool
from tiny import tiny_model
from torch import Tensor
from tts_search import HFPolicy, HFVerifier, SearchConfig, search
from tts_search.models.formats.opening import open_checkpoint
from tts_search.models.llama import LlamaDecoder
from tts_search.models.loading import load_decoder

IDS = list(range(10, 40))


def scheme(bits: int, group_size: int | None, inputs: bool = False, **options: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if group_size else "channel",
        "group_size": group_size,
    }  # fmt: skip
    activations = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    return {"weights": {**weights, **options}, "input_activations": activations if inputs else None}


def compressed_config(kind: str, **schemes: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": schemes}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
PACKED = compressed_config("pack-quantized", group_0=scheme(4, 32))
Quantise = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
FORMATS: dict[str, tuple[dict[str, Any], Quantise, str, int | None]] = {
    "W8A8": (
        compressed_config("int-quantized", group_0=scheme(8, None, inputs=True)),
        functools.partial(files.compressed, bits=8, group_size=None, zeros=False, packed=False), "int8", None,
    ),
    "W8A8, zeros": (
        compressed_config("int-quantized", group_0=scheme(8, None, inputs=True)),
        functools.partial(files.compressed, bits=8, group_size=None, zeros=True, packed=False), "int8", None,
    ),
    "W4A16": (
        PACKED, functools.partial(files.compressed, bits=4, group_size=32, zeros=False, packed=True), "int4", 32,
    ),
    "W4A16, zeros": (
        PACKED, functools.partial(files.compressed, bits=4, group_size=32, zeros=True, packed=True), "int4", 32,
    ),
    "W8A16": (
        compressed_config("pack-quantized", group_0=scheme(8, None)),
        functools.partial(files.compressed, bits=8, group_size=None, zeros=False, packed=True), "int8", None,
    ),
    "GPTQ": (GPTQ, functools.partial(files.gptq, group_size=64, zeros=False), "int4", 64),
    "GPTQ, zeros": ({**GPTQ, "sym": False}, functools.partial(files.gptq, group_size=64, zeros=True), "int4", 64),
    "GPTQ, version 2": (
        {**GPTQ, "checkpoint_format": "gptq_v2", "group_size": -1},
        functools.partial(files.gptq, group_size=None, zeros=True, version=2), "int4", None,
    ),
    "AWQ": (AWQ, functools.partial(files.awq, group_size=32), "int4", 32),
}  # fmt: skip


def model_of(kind: str = "llama") -> Any:
    return tiny_model(kind, hidden_size=128, intermediate_size=192, head_dim=32, use_sliding_window=False)


def logits_of(decoder: Any) -> Tensor:
    pool = empty_pool(decoder)
    out: Tensor = decoder.logits(pool.pack([pool.forest.add_root()], [IDS]), pool.kv)
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_weights_and_logits_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    config, quantise, kind, group_size = FORMATS[name]
    model = files.save(tmp_path, model_of("qwen2" if "zeros" in name else "llama"), config, quantise)
    decoder = load_decoder(str(tmp_path))
    assert isinstance(decoder, LlamaDecoder)
    assert decoder.dtype == torch.float32
    for number, layer in enumerate(decoder.layers.layers):
        own = model.model.layers[number]
        joined = torch.cat([getattr(own.self_attn, f"{each}_proj").weight for each in "qkv"])
        for packed, expected in ((layer.qkv, joined), (layer.down, own.mlp.down_proj.weight)):
            torch.testing.assert_close(packed.unpack(), expected, rtol=1e-6, atol=1e-6)
            assert packed.quantize == kind
            # A row of 64 columns or less has one group in any case.
            assert packed.group_size == group_size
    want = model(torch.tensor([IDS])).logits[0]
    assert 0 < ((logits_of(decoder) - want).norm() / want.norm()).item() < 0.12  # rows of x become 8 bits
    checkpoint = open_checkpoint(str(tmp_path))
    proj = model.model.layers[0].self_attn.o_proj.weight
    found = checkpoint.tensor("model.layers.0.self_attn.o_proj.weight", [3, 1])
    torch.testing.assert_close(found, proj[[3, 1]], rtol=1e-6, atol=1e-6)
    assert checkpoint.names == {*model.state_dict()}


def test_searches_run(tmp_path: Path) -> None:
    config, quantise, *_ = FORMATS["GPTQ"]
    files.save(tmp_path, model_of(), config, quantise)
    policy = HFPolicy(str(tmp_path), kv_memory="1MiB")
    verifier = HFVerifier(str(tmp_path), format="yes_no", kv_memory="1MiB")
    settings = SearchConfig(n=4, expand=2, max_steps=2, max_step_tokens=6)
    assert len(search(["1+1?"], policy, verifier, settings, progress=False)[0].completions) == 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "got quant_method 'bitsandbytes'"),
    "fp8": ({"quant_method": "fp8"}, "got quant_method 'fp8'"),
    "nameless": ({"bits": 4}, "got quant_method None"),
    "gptq bits": ({**GPTQ, "bits": 3}, "gptq with 3 bits"),
    "gptq groups": ({**GPTQ, "group_size": 16}, "gptq with groups of 16"),
    "gptq marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "gptq with checkpoint_format 'marlin'"),
    "awq bits": ({**AWQ, "bits": 8}, "awq with 8 bits"),
    "awq gemv": ({**AWQ, "version": "gemv"}, "awq with version 'gemv'"),
    "format": (compressed_config("float-quantized", a=scheme(8, None)), "format 'float-quantized'"),
    "float": (compressed_config("pack-quantized", a=scheme(4, 32, type="float")), "no whole numbers"),
    "static": (
        compressed_config("int-quantized", a={**scheme(8, None), "input_activations": {"num_bits": 8}}),
        "activations that have a scale in the file",
    ),
    "mixed": (compressed_config("pack-quantized", a=scheme(4, 32), b=scheme(8, None)), "more than one scheme"),
    "bits": (compressed_config("pack-quantized", a=scheme(2, 32)), "2 bits"),
    "strategy": (compressed_config("pack-quantized", a=scheme(4, 32, strategy="block")), "strategy 'block'"),
    "sparse": ({**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "no scheme": ({**PACKED, "config_groups": ["W4A16"]}, "config_groups without a scheme"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    files.save(tmp_path, model_of(), REFUSED[name][0], FORMATS["GPTQ"][1])
    with pytest.raises(ValueError, match=rf"^{tmp_path}: .*{REFUSED[name][1]}"):
        load_decoder(str(tmp_path))


def changed(folder: Path, **parts: Tensor | None) -> None:
    """Replace parts of the second layer's first projection (None: leave it out)."""
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, tensor in parts.items():
        key = f"model.layers.1.self_attn.q_proj.{name}"
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    save_file(state, path, {"format": "pt"})


BROKEN: dict[str, tuple[str, dict[str, Tensor | None], str]] = {
    "order": ("GPTQ", {"g_idx": torch.arange(128).flip(0).to(torch.int32) // 64}, r"columns in order of their"),
    "zeros": ("GPTQ", {"qzeros": torch.zeros(3, 16, dtype=torch.int32)}, r"expected qzeros of shape \[2, 16\]"),
    "scales": ("GPTQ", {"scales": None}, r"expected a scales"),
    "type": (
        "AWQ",
        {"qweight": torch.zeros(128, 16)},
        r"expected qweight of .*, got .* of torch.float32",
    ),
    "size": ("AWQ", {"qweight": torch.zeros(64, 16, dtype=torch.int32)}, r"of shape \[128, 128\], got \[128, 64\]"),
    "packed": ("W4A16", {"weight_shape": torch.tensor([128, 127])}, r"expected weight_shape \[128, 128\]"),
    "part": ("W4A16", {"weight_packed": None}, r"has no parts of this format"),
    "missing": (
        "W8A8",
        {"weight": None, "weight_scale": None},
        r"found no .*1\.self_attn\.q_proj\.weight",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_parts_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    kind, parts, reason = BROKEN[name]
    config, quantise, *_ = FORMATS[kind]
    files.save(tmp_path, model_of(), config, quantise)
    changed(tmp_path, **parts)
    with pytest.raises(ValueError, match=reason):
        load_decoder(str(tmp_path))


def test_transformers_reads_what_it_can(tmp_path: Path) -> None:
    """Its own readers of quantised weights are asked for by name; they may lack a package."""
    config, quantise, *_ = FORMATS["GPTQ"]
    files.save(tmp_path, model_of(), config, quantise)
    with pytest.raises(Exception, match=r"(?i)gptq"):
        load_decoder(str(tmp_path), decoder="transformers")
