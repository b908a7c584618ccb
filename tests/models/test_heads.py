"""Heads of verifiers: found by name in the checkpoint, never unpickled, refused with the missing name."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from layouts import LAYOUTS, save
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tts_search import HFVerifier
from tts_search.models.checkpoint import Checkpoint

WRITE = {layout.checkpoint: layout.write for layout in LAYOUTS}


def written(folder: Path, name: str) -> Path:
    WRITE[name](folder / name)
    return folder / name


def without(folder: Path, *names: str) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name not in names}, path, {"format": "pt"})


def test_tensors_are_read_by_name_from_shards(tmp_path: Path) -> None:
    model = tiny_model(head="tokens")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint = Checkpoint(str(tmp_path))
    assert {"score.weight", "score.bias", "model.embed_tokens.weight"} <= checkpoint.names
    assert torch.equal(checkpoint.tensor("score.weight"), model.score.weight)
    assert torch.equal(checkpoint.tensor("score.weight", [1, 0, 1]), model.score.weight[[1, 0, 1]])
    assert Checkpoint(str(tmp_path.parent)).names == frozenset()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        Checkpoint(str(tmp_path.parent)).tensor("score.weight")


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        ("Skywork-o1-Open-PRM-Qwen-2.5-1.5B", "v_head.summary.weight", r"'skywork' found no v_head.summary.weight in"),
        ("Qwen2.5-Math-PRM-7B", "score.2.bias", r"'qwen_math_prm' found no score.2.bias in the checkpoint"),
        (
            "math-shepherd-mistral-7b-prm",
            "lm_head.weight",
            r"'math_shepherd' found no lm_head.weight in the checkpoint",
        ),
    ],
)
def test_a_missing_head_is_named(tmp_path: Path, name: str, gone: str, message: str) -> None:
    folder = written(tmp_path, name)
    without(folder, gone)
    with pytest.raises(ValueError, match=message):
        HFVerifier(str(folder))


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, "Skywork-o1-Open-PRM-Qwen-2.5-1.5B")
    path = folder / "model.safetensors"
    save_file({**load_file(path), "v_head.summary.weight": torch.zeros(2, 32)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"expected v_head.summary.weight .* to be \[1, 32\] float, got \[2, 32\]"):
        HFVerifier(str(folder))


def test_a_missing_head_file_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path, "ReasonFlux-PRM-1.5B")
    (folder / "reward_head.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no reward_head.pt, which holds the head"):
        HFVerifier(str(folder))


class Payload:
    """What a malicious pickle does when it is loaded."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self.path),))

    def __init__(self, path: Path) -> None:
        self.path = str(path)


def test_a_head_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    folder = written(tmp_path, "ReasonFlux-PRM-1.5B")
    for dump in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        dump({"weight": torch.zeros(1, 32), "bias": Payload(tmp_path / "run")}, folder / "reward_head.pt")
        with pytest.raises(ValueError, match="not safe to load"):
            HFVerifier(str(folder))
    assert not (tmp_path / "run").exists()


def test_a_head_file_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, "ReasonFlux-PRM-1.5B")
    torch.save([torch.zeros(1, 32)], folder / "reward_head.pt")
    with pytest.raises(ValueError, match=r"expected tensors by name, got list"):
        HFVerifier(str(folder))


def test_tied_embeddings_are_an_lm_head(tmp_path: Path) -> None:
    from layouts import llama3_tokenizer

    folder = tmp_path / "VersaPRM"
    save(folder, llama3_tokenizer(), "llama", drop_lm_head=True, config_json={"tie_word_embeddings": True})
    verifier = HFVerifier(str(folder))
    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(verifier.head.weight, rows[10] - rows[12])  # "+" and "-"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """A checkpoint in half precision gives the rounded head, and loads in its dtype."""
    folder = written(tmp_path, "Qwen2.5-Math-PRM-7B")
    path = folder / "model.safetensors"
    state = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    text = (folder / "config.json").read_text().replace('"float32"', f'"{str(dtype).removeprefix("torch.")}"')
    (folder / "config.json").write_text(text)
    verifier = HFVerifier(str(folder))
    assert verifier.decoder.dtype == dtype
    assert torch.equal(verifier.head.w1, state["score.0.weight"])
    assert torch.equal(verifier.head.weight, state["score.2.weight"][1].float() - state["score.2.weight"][0].float())
