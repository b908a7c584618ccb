"""Models of transformers over a KV forest, against their own eager attention on the full text of each branch."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from rules import assert_rule
from tiny import CONFIGS, save_checkpoint, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from tts_search.models.decoder import KVPool
from tts_search.models.transformers import (
    ATTENTION,
    ForestCache,
    TransformersDecoder,
    _Mask,
    _mask,
    load_config,
    load_tokenizer,
    load_transformers,
    model_shape,
    register,
)

Branches = dict[int, list[int]]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def over_forest(model: PreTrainedModel, num_pages: int = 256, page_size: int = 4) -> tuple[TransformersDecoder, KVPool]:
    """The same weights with attention over a forest, and a pool whose unwritten slots are NaN."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(ATTENTION)
    decoder = TransformersDecoder(model)
    pool = KVPool(decoder.shape, num_pages, page_size, decoder.dtype)
    for tensor in (*pool.kv.k, *pool.kv.v):
        tensor.fill_(float("nan"))
    return decoder, pool


def eager(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Logits [len(tokens), V] of the whole text, without any cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def random_rounds(rng: random.Random, pool: KVPool, num_rounds: int = 6):
    """Grow a random forest: packed batches of prompts, chunks and single tokens, with forks and frees in between."""
    texts: Branches = {pool.forest.add_root(): [], pool.forest.add_root(): []}
    for _ in range(num_rounds):
        chosen = rng.sample(sorted(texts), k=rng.randint(1, len(texts)))
        new = [[rng.randrange(7, 250) for _ in range(rng.choice((1, 1, 1, 2, 5, 13)))] for _ in chosen]
        batch = pool.pack(chosen, new)
        for branch, tokens in zip(chosen, new, strict=True):
            texts[branch] = texts[branch] + tokens
        yield batch, [(texts[branch], len(tokens)) for branch, tokens in zip(chosen, new, strict=True)]
        parents = rng.choices(sorted(texts), k=rng.randint(1, 3))
        for child, parent in zip(pool.forest.fork(parents), parents, strict=True):
            texts[child] = texts[parent]
        for branch in rng.sample(sorted(texts), k=rng.randint(0, len(texts) // 3)):
            pool.forest.free([branch])
            del texts[branch]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_logits_of_random_trees_are_eager_ones(kind: str, seed: int) -> None:
    model = tiny_model(kind, seed=seed)
    decoder, pool = over_forest(model)
    for batch, parts in random_rounds(random.Random(seed), pool):
        logits = decoder.logits(batch, pool.kv)
        wanted = torch.cat([eager(model, text)[-count:] for text, count in parts])
        assert logits.shape == wanted.shape
        assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_is_at_most_twice_as_far_as_eager(kind: str) -> None:
    model = tiny_model(kind, initializer_range=0.1)
    exact_model, plain_model = copy.deepcopy(model).double(), copy.deepcopy(model).bfloat16()
    exact_model.load_state_dict(plain_model.state_dict())
    decoder, pool = over_forest(plain_model)
    out, exact, plain = [], [], []
    for batch, parts in random_rounds(random.Random(1), pool):
        out.append(decoder.logits(batch, pool.kv))
        exact += [eager(exact_model, text)[-count:] for text, count in parts]
        plain += [eager(plain_model, text)[-count:] for text, count in parts]
    assert out[0].dtype == torch.bfloat16
    assert_rule(torch.cat(out), torch.cat(exact), torch.cat(plain))


def test_sliding_window_and_softcap_change_the_result() -> None:
    """What the two tests above compare would not notice a model that never got so far as its window."""
    text = list(range(10, 40))
    for kind, options in (("mistral", {"sliding_window": None}), ("gemma2", {"attn_logit_softcapping": None})):
        with_it, without = tiny_model(kind), tiny_model(kind, **options)
        without.load_state_dict(with_it.state_dict())
        assert (eager(with_it, text) - eager(without, text)).abs().max() > 1e-2


def test_only_asked_rows_get_logits_and_hidden_states() -> None:
    model = tiny_model()
    decoder, pool = over_forest(model)
    roots = [pool.forest.add_root(), pool.forest.add_root()]
    batch = pool.pack(roots, [[10, 11, 12], [20, 21]])
    rows = torch.tensor([4, 2])
    heads: list[tuple[int, ...]] = []
    decoder.model.get_output_embeddings().register_forward_hook(lambda _, args, __: heads.append(tuple(args[0].shape)))
    logits = decoder.logits(batch, pool.kv, rows)
    assert heads == [(1, 2, 64)]
    wanted = torch.stack([eager(model, [20, 21])[-1], eager(model, [10, 11, 12])[-1]])
    assert torch.allclose(logits, wanted, atol=1e-4)
    pool.forest.truncate(roots[0], 0)
    pool.forest.truncate(roots[1], 0)
    hidden = decoder.hidden(pool.pack(roots, [[10, 11, 12], [20, 21]]), pool.kv, rows)
    assert heads == [(1, 2, 64)]
    assert torch.allclose(model.lm_head(hidden), wanted, atol=1e-4)


def test_one_plan_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, pool = over_forest(tiny_model())
    planned = []
    plan = pool.forest.plan
    monkeypatch.setattr(
        pool, "forest", _Counting(pool.forest, lambda *args, **kwargs: planned.append(1) or plan(*args, **kwargs))
    )
    decoder.logits(pool.pack([pool.forest.add_root()], [[10, 11]]), pool.kv)
    assert len(planned) == 1


class _Counting:
    def __init__(self, forest, plan) -> None:
        self._forest, self.plan = forest, plan

    def __getattr__(self, name: str):
        return getattr(self._forest, name)


def test_a_model_that_leaves_layers_out_is_found() -> None:
    decoder, pool = over_forest(tiny_model())
    decoder.model.model.layers = decoder.model.model.layers[:2]
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM wrote 2 and attended 2 of 3 layers"):
        decoder.logits(pool.pack([pool.forest.add_root()], [[10]]), pool.kv)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mamba", {}, "AttentionInterface"),
        ("llama4_text", {"layer_types": ["chunked_attention"]}, "chunked_attention"),
        ("deepseek_v3", {"v_head_dim": 8}, "one head size"),
    ],
)
def test_models_without_pluggable_attention_are_refused(kind: str, options: dict, message: str) -> None:
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "intermediate_size_mlp": 32, "moe_intermediate_size": 8, "num_local_experts": 1,
        "n_routed_experts": 8,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **options}))
    with pytest.raises(ValueError, match=message):
        model_shape(model)


def test_attention_outside_a_forest_says_how_to_call_it() -> None:
    model = copy.deepcopy(tiny_model())
    model.set_attn_implementation(ATTENTION)
    with pytest.raises(RuntimeError, match=r"model\(\*\*cache.inputs\(batch\)\)"):
        model(torch.tensor([[10, 11]]), use_cache=False)
    decoder, pool = over_forest(tiny_model())
    with pytest.raises(RuntimeError, match="no slots"):
        decoder.model(torch.tensor([[10, 11]]), past_key_values=ForestCache(pool.kv))


def test_what_changes_attention_and_is_not_known_is_refused() -> None:
    decoder, pool = over_forest(tiny_model())
    inputs = ForestCache(pool.kv).inputs(pool.pack([pool.forest.add_root()], [[10, 11]]))
    with pytest.raises(ValueError, match="position_bias"):
        decoder.model(**inputs, position_bias=torch.ones(4))


def test_the_mask_that_a_model_asks_for_is_recognised() -> None:
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        chunked_causal_mask_function,
        sliding_window_causal_mask_function,
    )

    assert _mask(mask_function=causal_mask_function) == _Mask(None)
    for window in (1, 2, 7, 4096):
        function = sliding_window_causal_mask_function(window)
        assert _mask(mask_function=function, local_size=window) == _Mask(window)
    chunks = chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64))
    assert not _mask(mask_function=chunks, local_size=8).known
    assert not _mask(mask_function=bidirectional_mask_function).known
    with pytest.raises(ValueError, match="no padding"):
        _mask(mask_function=causal_mask_function, attention_mask=torch.ones(1, 3))


def test_a_mask_that_is_not_causal_is_refused() -> None:
    model = tiny_model("gemma2", use_bidirectional_attention=True)
    model.config.is_causal = False
    decoder, pool = over_forest(model)
    with pytest.raises(ValueError, match="Gemma2Attention: expected a causal mask"):
        decoder.logits(pool.pack([pool.forest.add_root()], [[10, 11]]), pool.kv)


def test_shape_counts_the_weights_that_a_token_multiplies() -> None:
    tied, free = tiny_model("llama", tie_word_embeddings=True), tiny_model("llama", tie_word_embeddings=False)
    layers = sum(p.numel() for p in free.model.layers.parameters()) + free.model.norm.weight.numel()
    for model in (tied, free):
        shape = model_shape(model)
        assert shape.body_parameters == layers
        assert shape.head_parameters == free.lm_head.weight.numel()
    assert model_shape(free.model).head_parameters == 0
    assert model_shape(free.model).body_parameters == layers


def test_shape_counts_the_experts_that_a_token_is_sent_to() -> None:
    def sizes(chosen: int) -> int:
        model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=chosen)
        return model_shape(model).body_parameters

    expert = 3 * 64 * 96  # three projections
    assert sizes(4) - sizes(1) == 3 * 3 * expert  # three layers


def test_checkpoints_load_in_the_dtype_asked_for(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_model())
    assert load_transformers(path).dtype == torch.float32
    decoder = load_transformers(path, dtype="bfloat16")
    assert decoder.dtype == torch.bfloat16
    assert decoder.model.config._attn_implementation == ATTENTION


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_model(head="tokens"))
    assert load_transformers(path, causal_lm=False).shape.head_parameters == 0
    with pytest.raises(ValueError, match=r"found no lm_head.weight in the checkpoint"):
        load_transformers(path)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    for load in (load_tokenizer, load_config):
        with pytest.raises(FileNotFoundError, match="path_or_id: expected the folder of a checkpoint"):
            load(str(tmp_path / "nothing"))
