"""Which of the causal language models in transformers run over a KV forest: the table in docs/models.md.

Each type gets a tiny model with random weights, saved and loaded as a user's checkpoint is; `load_decoder` follows it,
or says why not. After an update of transformers::

    python tools/sweep_models.py --write          # the page
    python tools/sweep_models.py llama falcon     # or some types
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from tts_search.models.loading import load_decoder

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- the table: tools/sweep_models.py --write -->", "<!-- the end of the table -->"
MOST_PARAMETERS = 20_000_000
# What makes a model small, under the names that configurations use.
SIZES: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "is_decoder": True,
    "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "shared_expert_intermediate_size": 32,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "ffn_dim": 96, "word_embed_proj_dim": 64, "d_model": 64, "d_ff": 96, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 8, "intermediate_size_mlp": 96,
}  # fmt: skip
# What some types need besides, since their configurations check how parts fit together.
MORE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "roberta": {"max_position_embeddings": 258},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "activation_sparsity_pattern": [0.0] * 10},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {
        "num_layers": 2, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96, "zero_expert_num": 2, "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "reformer": {
        "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16], "attention_head_size": 16,
        "attn_layers": ["local", "lsh"], "num_buckets": 4,
    },
    "xlnet": {"d_head": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def sweep(kinds: Sequence[str]) -> dict[str, tuple[str, str]]:
    """For each type "followed", "refused" or "not checked", and why."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return {kind: _outcome(kind) for kind in kinds}


def _outcome(kind: str) -> tuple[str, str]:
    try:
        config = _small(kind)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            return "not checked", f"no small one by the usual options: {size // 10**6} million weights"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        return "not checked", f"no small one by the usual options: {_short(error)}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            load_decoder(folder)
        except ValueError as error:
            return "refused", _short(error)
    return "followed", ""


def _small(kind: str) -> Any:
    return AutoConfig.for_model(kind, **_merged(_options(AutoConfig.for_model(kind)), MORE.get(kind, {})))


def _options(plain: Any) -> dict[str, Any]:
    """What makes a configuration small, and those of its parts (texts, images, sounds)."""
    known = {*plain.to_dict(), *plain.attribute_map}
    options = {name: value for name, value in SIZES.items() if name in known}
    if isinstance(getattr(plain, "sliding_window", None), int):
        options["sliding_window"] = 9  # less than the texts of the test
    if "qk_rope_head_dim" in options and "head_dim" in options:
        options["head_dim"] = options["qk_rope_head_dim"]  # what latent attention calls a head's size
    parts = {name: getattr(plain, name, None) for name in plain.sub_configs}
    return options | {
        name: {"model_type": part.model_type, **_options(part)}
        for name, part in parts.items()
        if isinstance(part, PreTrainedConfig)
    }


def _merged(options: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both, and in a part what `more` has for it."""
    parts = {name: _merged(options.get(name, {}), value) for name, value in more.items() if isinstance(value, dict)}
    return {**options, **more, **parts}


def _short(error: Exception) -> str:
    """The reason in an error, on one line of a table."""
    text = re.sub(r"^.*models of type .* do not run over a forest: ", "", " ".join(str(error).split()))
    return text.replace("|", "\\|").replace("<", "&lt;")[:160]


def table(outcomes: dict[str, tuple[str, str]]) -> str:
    """The page's part: a list of those that are followed, and two tables."""
    names = {
        what: [f"`{kind}`" for kind, (found, _) in outcomes.items() if found == what]
        for what in ("followed", "refused", "not checked")
    }
    lines = [f"Of transformers {transformers.__version__}, {len(outcomes)} types of causal language models:", ""]
    lines += [f"**Followed** ({len(names['followed'])}): {', '.join(names['followed'])}.", ""]
    for what, heading in (("refused", "Refused"), ("not checked", "Not checked")):
        lines += [f"**{heading}** ({len(names[what])}):", "", "| type | why |", "| --- | --- |"]
        lines += [f"| `{kind}` | {why} |" for kind, (found, why) in outcomes.items() if found == what]
        lines += [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="types of models; by default all")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    options = parser.parse_args()
    found = table(sweep(options.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
    if not options.write:
        print(found)
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{found}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
