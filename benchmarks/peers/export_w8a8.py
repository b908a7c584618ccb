"""Write a checkpoint with projections in int8, a scale for each output row: W8A8 of compressed-tensors, for vLLM."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def export(source: Path, target: Path) -> None:
    """Copy the folder; weights [N, K] of projections become int8 with scales [N, 1]."""
    shutil.copytree(source, target)
    state = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            state[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        state[name] = (weight.float() / scale).round().to(torch.int8)
        state[f"{name}_scale"] = scale.to(weight.dtype)
    save_file(state, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    export(options.source, options.target)
