"""Loading needs memory for the packed weights and little else: peaks of processes, compared with sizes of files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")

LOAD = """
import json, sys
import torch
from tts_search.models.loading import load_decoder
import transformers
torch.set_num_threads(1)
def peak():  # of this program alone, which rusage's is not
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
load_decoder(sys.argv[1], quantize="int8")  # everything that is imported on use, and torch's own memory
before = peak()
decoder = load_decoder(sys.argv[2], quantize=sys.argv[3])
print(json.dumps(peak() - before))
"""


def save(folder: Path, width: int, layers: int) -> int:
    """Write a model in bfloat16; the bytes of its file."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").bfloat16()
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("quantize", "share"), [("int8", 0.5), ("int4", 0.33)])
def test_quantising_holds_no_second_copy(quantize: str, share: float, tmp_path: Path) -> None:
    """Of a file in bfloat16 8 bits are a half and 4 bits a third, with scales. On top come two layers in float for the
    self-test and the copies of the projection that is being packed: less, together, than a copy of the file.
    """
    save(tmp_path / "small", 64, 1)
    size = save(tmp_path / "large", 1024, 24)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large"), quantize]
    used = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    layer = size / 24
    print(f"{quantize}: file {size / 2**20:.0f} MiB, {used / 2**20:.0f} MiB more at the peak")
    assert share * size * 0.9 < used < share * size + 9 * layer
