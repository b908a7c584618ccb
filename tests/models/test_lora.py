"""Adapters merged while loading, against the same weights merged by hand and against peft where it is installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_checkpoint, tiny_model, tiny_tokenizer
from tts_search import HFPolicy, HFVerifier, SearchConfig, search
from tts_search.models.formats.opening import open_checkpoint
from tts_search.search.protocol import Score

TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
STEPS = ("So it is.\n\n", "Then 5.\n\n")


def adapter(folder: Path, base: str, *, rank: int = 4, head: bool = False, **config: Any) -> dict[str, torch.Tensor]:
    """Write an adapter as peft does; returns its tensors."""
    torch.manual_seed(1)
    weights, tensors = load_file(Path(base) / "model.safetensors"), {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            stem = f"base_model.model.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, weight.shape[1]) * 0.3
            tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], rank) * 0.3
    if head:
        tensors["base_model.model.score.weight"] = torch.randn(2, 64)
        tensors["base_model.model.score.bias"] = torch.randn(2)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    options = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "lora_alpha": 12, "bias": "none",
        "target_modules": ["q_proj", "v_proj", "down_proj"], **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return tensors


def merged(folder: Path, base: str, tensors: dict[str, torch.Tensor], scale: float) -> str:
    """A checkpoint of the weights that an adapter makes of its base model's."""
    state = load_file(Path(base) / "model.safetensors")
    for name in state:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in tensors:
            state[name] += scale * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((Path(base) / "config.json").read_text())
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / math.sqrt(4))])
def test_a_policy_of_an_adapter(tmp_path: Path, rslora: bool, scale: float) -> None:
    base = save_checkpoint(tmp_path / "base", tiny_model("qwen3"))
    tensors = adapter(tmp_path / "adapter", base, use_rslora=rslora)
    whole = merged(tmp_path / "merged", base, tensors, scale)
    config = SearchConfig(method="best_of_n", n=4, max_step_tokens=12)
    texts = [
        [
            one.text
            for one in search(["p"], HFPolicy(path, kv_memory="1MiB"), None, config, progress=False)[0].completions
        ]
        for path in (str(tmp_path / "adapter"), whole, base)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_verifier_that_trl_trained_as_an_adapter(tmp_path: Path) -> None:
    """Its head was saved whole; the format is known by the task."""
    base = save_checkpoint(tmp_path / "base", tiny_model("qwen3"))
    tensors = adapter(tmp_path / "adapter", base, head=True, task_type="TOKEN_CLS")
    whole = merged(tmp_path / "merged", base, tensors, 3.0)
    file = Path(whole) / "model.safetensors"
    own = {f"score.{part}": tensors[f"base_model.model.score.{part}"] for part in ("weight", "bias")}
    save_file({**load_file(file), **own}, file, {"format": "pt"})
    scores = []
    for path, name in ((str(tmp_path / "adapter"), "auto"), (whole, "two_class")):
        verifier = HFVerifier(path, format=name, kv_memory="1MiB")
        assert verifier.format.name == "two_class"
        verifier.begin(0, "Which?")
        scores += verifier.score([Score(0, 1, STEPS, 0)])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_one_alpha_for_a_module(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", tiny_model("llama"))
    tensors = adapter(tmp_path / "adapter", base, alpha_pattern={"layers.1.self_attn.q_proj": 40})
    checkpoint, plain = open_checkpoint(str(tmp_path / "adapter")), open_checkpoint(base)
    for layer, scale in ((0, 3.0), (1, 10.0)):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        delta = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(checkpoint.tensor(name), plain.tensor(name) + scale * delta)
        torch.testing.assert_close(checkpoint.tensor(name, [3, 1]), checkpoint.tensor(name)[[3, 1]])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type LORA, got 'IA3'"),
        ({"use_dora": True}, "expected an adapter without use_dora, got True"),
        ({"bias": "all"}, "expected an adapter without bias, got 'all'"),
        ({"base_model_name_or_path": None}, "expected base_model_name_or_path, got none"),
    ],
)
def test_what_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    base = save_checkpoint(tmp_path / "base", tiny_model("llama"))
    adapter(tmp_path / "adapter", base, **config)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"), "no pair"),
        (lambda tensors: tensors.update({"base_model.model.model.embed.lora_embedding_A": torch.ones(2)}), "no pair"),
        (
            lambda tensors: tensors.update(
                {f"base_model.model.other.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
            ),
            "found no other.weight in",
        ),
        (
            lambda tensors: tensors.update(
                {"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(4, 5)}
            ),
            r"expected A \[r, 96\] and B \[64, r\], got \[4, 5\]",
        ),
    ],
)
def test_tensors_without_a_place(tmp_path: Path, change: Any, message: str) -> None:
    base = save_checkpoint(tmp_path / "base", tiny_model("llama"))
    tensors = adapter(tmp_path / "adapter", base)
    change(tensors)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(str(tmp_path / "adapter"))


def test_modules_of_transformers_read_no_adapter(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", tiny_model("llama"))
    adapter(tmp_path / "adapter", base)
    with pytest.raises(ValueError, match="decoder: expected 'auto' or 'lean'"):
        HFPolicy(str(tmp_path / "adapter"), decoder="transformers", kv_memory="1MiB")


def test_peft_merges_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = save_checkpoint(tmp_path / "base", tiny_model("qwen3"))
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        alpha_pattern={"layers.1.mlp.down_proj": 40}, rank_pattern={"layers.0.self_attn.q_proj": 2},
    )  # fmt: skip
    model = peft.get_peft_model(tiny_model("qwen3"), config)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    checkpoint = open_checkpoint(str(tmp_path / "adapter"))
    state = model.merge_and_unload().state_dict()
    for name in checkpoint.names:
        torch.testing.assert_close(checkpoint.tensor(name), state[name])
