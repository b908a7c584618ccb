"""model.generate() of transformers over a forest, against its own caches: equal to the token in float32."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from test_docs_kernels import code_of
from tiny import CONFIGS, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from tts_search.adapters.generate import GenerationCache, generate_over_forest
from tts_search.lab import MODELS_DIR
from tts_search.models.transformers import ATTENTION, register

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True, "length_penalty": 0.5},
    "prefill in chunks": {"prefill_chunk_size": 5, "do_sample": True, "num_return_sequences": 2},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


def prompts(padded: bool) -> dict[str, Tensor]:
    """Three prompts [3, 13], of 13 tokens or padded on the left to that."""
    ids = torch.randint(7, 250, (3, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :6], mask[2, :1] = 0, 0
        ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def over_forest(model: PreTrainedModel) -> PreTrainedModel:
    register()
    copied = copy.deepcopy(model)
    copied.set_attn_implementation(ATTENTION)
    return copied


def small_cache(model: PreTrainedModel, **options: Any) -> GenerationCache:
    """Pages of 4 tokens, NaN where nothing was written."""
    cache = GenerationCache(model, **{"kv_memory": "4MiB", "page_size": 4, **options})
    for tensor in (*cache.kv.k, *cache.kv.v):
        tensor.fill_(float("nan"))
    return cache


def generate(model: PreTrainedModel, **options: Any) -> Tensor:
    torch.manual_seed(1)
    return model.generate(**{"max_new_tokens": 18, "pad_token_id": 0, **options})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_generates_what_transformers_generates(kind: str, mode: str, padded: bool) -> None:
    model = tiny_model(kind)
    options = {**prompts(padded), **MODES[mode]}
    wanted = generate(model, **options)
    forest_model = over_forest(model)
    cache = small_cache(forest_model)
    assert torch.equal(generate(forest_model, past_key_values=cache, **options), wanted)
    assert cache.pool.forest.stats().branches == len(set(cache.rows))
    cache.reset()
    assert cache.pool.forest.stats().pages_free == cache.pool.forest.num_pages


@pytest.mark.parametrize("mode", ["return sequences", "beam search"])
def test_custom_generate_on_a_model_with_other_attention(mode: str) -> None:
    model = tiny_model()
    options = {**prompts(True), **MODES[mode]}
    wanted = generate(model, **options)
    ours = {"custom_generate": generate_over_forest, "kv_memory": "4MiB"}
    result = generate(model, **ours, return_dict_in_generate=True, output_scores=True, **options)
    assert torch.equal(result.sequences, wanted)  # type: ignore[attr-defined]
    assert isinstance(result.past_key_values, GenerationCache)  # type: ignore[attr-defined]
    assert model.config._attn_implementation == "eager"
    assert torch.equal(generate(model, **options), wanted)  # the hooks leave other caches alone


def test_a_prompt_is_read_and_kept_once() -> None:
    model = over_forest(tiny_model())
    cache = small_cache(model)
    ids = prompts(False)["input_ids"][:1]
    out = generate(
        model, input_ids=ids, past_key_values=cache, do_sample=True, num_return_sequences=16, eos_token_id=-1
    )
    new = out[:, 13:-1]  # the last token is never forwarded
    distinct = {tuple(row[: n + 1].tolist()) for row in new for n in range(new.shape[1])}
    assert cache.forwarded_tokens == 13 + len(distinct)  # rows that agree so far are one branch
    stats = cache.pool.forest.stats()
    assert stats.logical_tokens == 16 * (13 + 17)
    assert stats.unique_tokens <= 13 + 16 * 17 + 4 * 16  # each fork may copy a part of a page
    page_bytes = 4 * cache.pool.shape.kv_bytes(torch.float32)
    assert cache.peak_bytes == (stats.pages_total - stats.pages_free) * page_bytes


def test_equal_rows_are_forwarded_once() -> None:
    """A batch that repeats a prompt, decoded greedily: one branch from beginning to end."""
    model = over_forest(tiny_model())
    cache = small_cache(model)
    ids = prompts(False)["input_ids"][:1]
    out = generate(model, input_ids=ids.repeat(5, 1), past_key_values=cache, eos_token_id=-1)
    assert len(set(cache.rows)) == 1
    assert cache.forwarded_tokens == 13 + 17
    assert torch.equal(out, generate(tiny_model(), input_ids=ids, eos_token_id=-1).repeat(5, 1))


def test_reordering_beams_copies_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    import tts_kernels

    copied: list[int] = []
    plain = tts_kernels.copy_pages_

    def counting(caches: Any, src: Tensor, dst: Tensor) -> None:
        copied.append(src.numel())
        plain(caches, src, dst)

    monkeypatch.setattr(tts_kernels, "copy_pages_", counting)
    model = over_forest(tiny_model())
    cache = small_cache(model)
    generate(model, **prompts(False), past_key_values=cache, num_beams=4, eos_token_id=-1)
    assert copied
    assert max(copied) <= 3 * 3  # a last page for each beam but one of a prompt, whatever the length
    before = cache.pool.forest.stats()
    rows = cache.rows
    cache.reorder_cache(torch.tensor([0, 0, 0, 0, 5, 5, 4, 4, 8, 9, 10, 11]))
    assert cache.rows == (rows[0],) * 4 + (rows[5], rows[5], rows[4], rows[4]) + rows[8:]
    assert cache.pool.forest.stats().pages_free >= before.pages_free


def test_turns_continue_on_one_cache() -> None:
    model, forest_model = tiny_model(), over_forest(tiny_model())
    caches = DynamicCache(config=model.config), small_cache(forest_model)
    ids = [prompts(False)["input_ids"]] * 2
    for _ in range(3):
        ids = [generate(m, input_ids=i, past_key_values=c, max_new_tokens=5, eos_token_id=-1)
               for m, i, c in zip((model, forest_model), ids, caches, strict=True)]  # fmt: skip
        assert torch.equal(*ids)
        ids = [torch.cat((i, torch.full((3, 2), 77)), 1) for i in ids]
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_a_cached_prompt_is_repeated_for_other_questions() -> None:
    model, forest_model = tiny_model(), over_forest(tiny_model())
    ids = prompts(False)["input_ids"]
    cache = small_cache(forest_model)
    forest_model(ids[:1], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    tails = torch.cat((ids[:1].expand(3, -1), ids[:, :4]), 1)
    assert torch.equal(generate(forest_model, input_ids=tails, past_key_values=cache), generate(model, input_ids=tails))
    cache.batch_select_indices(torch.tensor([2]))
    assert cache.batch_size == 1


def test_assisted_decoding_crops() -> None:
    model, forest_model = tiny_model(), over_forest(tiny_model())
    ids = prompts(False)["input_ids"][:1].repeat(1, 3)
    options = {"input_ids": ids, "prompt_lookup_num_tokens": 4, "max_new_tokens": 30}
    cache = small_cache(forest_model)
    assert torch.equal(generate(forest_model, past_key_values=cache, **options), generate(model, **options))


def test_logits_of_every_column() -> None:
    model, forest_model = tiny_model(), over_forest(tiny_model())
    inputs = prompts(True)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = model(**inputs, position_ids=positions).logits
        logits = forest_model(**inputs, past_key_values=small_cache(forest_model)).logits
        last = forest_model(**inputs, past_key_values=small_cache(forest_model), logits_to_keep=9).logits
    real = inputs["attention_mask"].bool()
    assert (logits - wanted)[real].abs().max() < 1e-4
    assert not logits[~real].any()
    assert torch.equal(last, logits[:, -9:])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="attn_implementation: expected"):
        GenerationCache(tiny_model())
    model = over_forest(tiny_model())
    inputs = prompts(True)
    cache = small_cache(model)
    with pytest.raises(ValueError, match="padding on the left"):
        generate(model, **{**inputs, "attention_mask": inputs["attention_mask"].flip(1)}, past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids"):
        model(**inputs, position_ids=torch.arange(13)[None], past_key_values=cache)
    with pytest.raises(ValueError, match="inputs_embeds: not supported"):
        model(inputs_embeds=torch.zeros(1, 2, 64), past_key_values=cache)
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(**inputs, output_hidden_states=True, past_key_values=cache)
    assert cache.pool.forest.stats().branches == 0
    model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="expected 3 rows, as in past_key_values, got 2"):
        model(inputs["input_ids"][:2, -1:], past_key_values=cache)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(2)
    full = DynamicCache(config=model.config)
    tiny_model()(inputs["input_ids"], past_key_values=full)
    with pytest.raises(ValueError, match="expected a GenerationCache or an empty cache, got DynamicCache"):
        generate(model, **inputs, past_key_values=full, custom_generate=generate_over_forest)


def test_a_full_pool_says_so_and_leaves_the_rows() -> None:
    model = over_forest(tiny_model())
    cache = small_cache(model, kv_memory=8 * 4 * 768)
    with pytest.raises(RuntimeError, match=r"kv_memory: the pool of 8 pages of 4 tokens is too small"):
        generate(model, **prompts(False), past_key_values=cache)
    assert cache.pool.forest.stats().pages_free == 8
    ids = prompts(False)["input_ids"][:2]
    model(ids, past_key_values=cache)
    rows, stats = cache.rows, cache.pool.forest.stats()
    with pytest.raises(RuntimeError, match="kv_memory"):
        model(ids, past_key_values=cache)
    assert (cache.rows, cache.pool.forest.stats()) == (rows, stats)


def test_a_forward_that_failed_is_not_continued() -> None:
    model = over_forest(tiny_model())
    cache = small_cache(model)
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(prompts(False)["input_ids"], past_key_values=cache)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"the last forward on this cache failed; call its reset\(\)"):
        model(prompts(False)["input_ids"], past_key_values=cache)
    cache.reset()
    model(prompts(False)["input_ids"], past_key_values=cache)
    assert cache.get_seq_length() == 13


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / "adapters" / "generate.py"
    options = ["--prompt-tokens", "40", "--new-tokens", "4", "--branches", "3", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [str(script), str(MODELS_DIR / "policy-0.1m"), *options])
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("=")[0] for line in lines] == ["num_return_sequences", "num_beams"]
    assert [line.rpartition("; ")[2] for line in lines] == ["3 of 3 texts equal", "1 of 1 texts equal"]


def test_the_code_of_the_docs() -> None:
    names: dict[str, Any] = {
        "path": str(MODELS_DIR / "policy-0.1m"),
        "inputs": {"input_ids": torch.tensor([[1, 40, 41]])},
    }
    first, second = code_of("adapters/transformers.md", "test_generate.py")
    exec(first, names)
    assert names["out"].shape[0] == 16
    exec(second, names)
    assert names["out"].shape[0] == 1
