"""Files that PyPI's compressed-tensors wrote, against the weights that it finds in them itself (`make adapters`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

compressed_tensors = pytest.importorskip("compressed_tensors", reason="`make adapters` installs compressed-tensors")

from compressed_tensors.compressors import ModelCompressor  # noqa: E402
from compressed_tensors.quantization import (  # noqa: E402
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402
from tiny import save_checkpoint, tiny_model  # noqa: E402
from tts_search.models.formats.opening import open_checkpoint  # noqa: E402
from tts_search.models.llama import LlamaDecoder  # noqa: E402
from tts_search.models.loading import load_decoder  # noqa: E402

# Its own names of schemes; bits, and columns that share a scale.
SCHEMES = {"W8A8": ("int8", None), "W8A16": ("int8", 128), "W4A16": ("int4", 128), "W4A16_ASYM": ("int4", 128)}


def quantise(model: Any, scheme: str) -> ModelCompressor:
    """Round the projections to the nearest numbers of a scheme, by the package's own code."""
    groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if (found := getattr(module, "quantization_scheme", None)) is None:
            continue
        parts = module.weight.unflatten(1, (-1, found.weights.group_size or module.weight.shape[1]))
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), found.weights)
        module.weight_scale.copy_(scale)
        if (stored := getattr(module, "weight_zero_point", None)) is not None:
            stored.copy_(zero)
    return ModelCompressor.from_pretrained_model(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_those_that_the_package_finds(scheme: str, tmp_path: Path) -> None:
    model = tiny_model(hidden_size=256, intermediate_size=384, num_hidden_layers=2, head_dim=64)
    compressor = quantise(model, scheme)
    compressor.compress_model(model)
    save_checkpoint(tmp_path, model)
    compressor.update_config(str(tmp_path))
    compressor.decompress_model(model)
    checkpoint, want = open_checkpoint(str(tmp_path)), model.state_dict()
    projections = {name for name in want if name.endswith("_proj.weight")}
    assert projections <= checkpoint.names
    for name in sorted(projections):
        torch.testing.assert_close(checkpoint.tensor(name), want[name], rtol=1e-6, atol=1e-6)
    decoder = load_decoder(str(tmp_path))
    assert isinstance(decoder, LlamaDecoder)
    down = decoder.layers.layers[1].down
    assert (down.quantize, down.group_size) == SCHEMES[scheme]
    torch.testing.assert_close(down.unpack(), want["model.layers.1.mlp.down_proj.weight"], rtol=1e-6, atol=1e-6)
