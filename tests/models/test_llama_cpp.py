"""GGUF files that llama.cpp quantised, against the weights that PyPI's gguf finds in them.

llama-cpp-python has to be compiled, which takes minutes; CONTRIBUTING.md says how to run this.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: see CONTRIBUTING.md")

from gguf_files import LARGE, SMALL, paired, wide_model, write  # noqa: E402
from tts_search.models.formats.gguf import GGUFCheckpoint  # noqa: E402
from tts_search.models.loading import load_decoder  # noqa: E402

# Where llama.cpp has no mixture of this type alone; `pure` makes every matrix of one type.
MIXTURES = {"Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}


def quantise(source: Path, target: Path, kind: str) -> None:
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{MIXTURES.get(kind, kind)}")
    options.pure, options.nthread = True, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SMALL, *LARGE])
def test_weights_are_those_that_gguf_finds(kind: str, tmp_path: Path) -> None:
    model = wide_model(tie_word_embeddings=False)
    write(tmp_path / "float.gguf", model, "F32")
    path = tmp_path / "m.gguf"
    quantise(tmp_path / "float.gguf", path, kind)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    checkpoint = GGUFCheckpoint(str(path))
    kinds = set()
    for name, parameter in model.state_dict().items():
        tensor = stored[names.get_name(name.removesuffix(".weight")) + ".weight"]
        want = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(parameter.shape)
        heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            want = paired(want, heads[name[-13]], back=True)
        torch.testing.assert_close(checkpoint.tensor(name), want, rtol=1e-6, atol=want.abs().max().item() * 1e-6)
        if parameter.dim() > 1:
            kinds.add(tensor.tensor_type.name)
            assert (want - parameter).norm() < 0.1 * parameter.norm()  # quantised, and not another model
    assert kinds == {kind}
    load_decoder(str(path))  # compares its logits with those of the weights in transformers
