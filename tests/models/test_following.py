"""Which models can run over a forest: contexts, rotary embeddings, refusals and the test while loading."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapter import eager
from tiny import save_checkpoint, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from tts_search import HFPolicy, StepParams
from tts_search.adapters.generate import generate_over_forest
from tts_search.models import selftest
from tts_search.models import transformers as adapter
from tts_search.models.decoder import Batch, Decoder, KVPool
from tts_search.models.loading import load_decoder
from tts_search.models.rotary import context_of
from tts_search.search.protocol import Expand

import tts_kernels as tk

LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 48,
    "short_factor": [1.0] * 8, "long_factor": [1, 1.2, 1.5, 2, 3, 4, 6, 8.0],
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
# Rotary embeddings that look at the longest position of a forward; texts of up to 48 tokens are as they were trained.
SWITCHING: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {"rope_parameters": LONG, "max_position_embeddings": 192, "sliding_window": None,
                      "original_max_position_embeddings": 48}),
    "llama, longrope": ("llama", {"rope_parameters": LONG, "max_position_embeddings": 192}),
    "qwen3, longrope": ("qwen3", {"rope_parameters": LONG, "max_position_embeddings": 192, "head_dim": 16}),
    "phimoe": ("phimoe", {"rope_parameters": {**LONG, "short_mscale": 1.1, "long_mscale": 1.4},
                          "max_position_embeddings": 192, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "gemma3, longrope in one kind of layer": ("gemma3_text", {
        "rope_parameters": {"full_attention": LONG, "sliding_attention": PLAIN},
        "layer_types": ["full_attention", "sliding_attention", "full_attention"], "max_position_embeddings": 192,
        "sliding_window": 9, "head_dim": 16}),
}  # fmt: skip
BOUNDED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 48}),
    "mistral, dynamic": ("mistral", {"rope_parameters": DYNAMIC, "max_position_embeddings": 48}),
    "gemma3, dynamic in one kind of layer": ("gemma3_text", {
        "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN},
        "layer_types": ["full_attention", "sliding_attention", "full_attention"], "max_position_embeddings": 48,
        "sliding_window": 9, "head_dim": 16}),
}  # fmt: skip


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(7, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def empty_pool(decoder: Decoder, num_pages: int = 64) -> KVPool:
    pool = KVPool(decoder.shape, num_pages, 4, decoder.dtype)
    for tensor in (*pool.kv.k, *pool.kv.v):
        tensor.fill_(float("nan"))
    return pool


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


@pytest.mark.parametrize("name", BOUNDED)
def test_a_branch_does_not_see_how_long_its_neighbours_are(name: str, tmp_path: Path) -> None:
    kind, options = BOUNDED[name]
    model = tiny_model(kind, **options)
    with pytest.warns(UserWarning, match=r"rope type dynamic.* beyond 48 tokens.* context ends there"):
        decoder = load_decoder(save_checkpoint(tmp_path, model))
    assert (decoder.shape.max_length, decoder.shape.switch) == (48, None)
    short, long = text(10), text(80, 1)
    assert (eager(model, [*short, *long])[:10] - eager(model, short)).abs().max() > 1e-2, "the scaling does nothing"
    pool = empty_pool(decoder)
    branches = [pool.forest.add_root(), pool.forest.add_root()]
    for begin, end in ((0, 6), (6, 10)):  # the second time, the long one is in its cache
        logits = decoder.logits(pool.pack(branches, [short[begin:end], long[begin * 8 : end * 8]]), pool.kv)
        assert near(logits[: end - begin], eager(model, short)[begin:end])
    assert logits[-1].isnan().all(), "beyond its context"
    within = decoder.logits(pool.pack([pool.forest.add_root()], [long[:48]]), pool.kv)
    assert near(within, eager(model, long[:48]))


@pytest.mark.parametrize("name", SWITCHING)
def test_branches_on_both_sides_of_a_switch_have_logits_of_their_own(name: str, tmp_path: Path) -> None:
    """Random growth, forks and cuts of branches of up to 70 tokens, whose factors change beyond 48."""
    kind, options = SWITCHING[name]
    model = tiny_model(kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = load_decoder(save_checkpoint(tmp_path, model))
    assert (decoder.shape.max_length, decoder.shape.switch) == (192, 48)
    long = text(80, 1)
    assert not near(eager(model, long)[:10], eager(model, long[:10])), "the scaling does nothing"
    rng = random.Random(0)
    pool = empty_pool(decoder, 2000)
    texts: dict[int, list[int]] = {pool.forest.add_root(): []}
    crossed = 0
    for _ in range(14):
        for parent in rng.sample(list(texts), min(2, len(texts))):
            child = pool.forest.fork([parent])[0]
            texts[child] = texts[parent][: rng.choice((len(texts[parent]), 47, 48, 49))]
            pool.forest.truncate(child, len(texts[child]))
        grown = [branch for branch in texts if len(texts[branch]) < 70 and rng.random() < 0.6]
        if not grown:
            continue
        new = [text(rng.choice((1, 2, 11)), rng.randrange(10**6)) for _ in grown]
        whole = pool.renewed(grown, new)
        rows = decoder.logits(pool.pack(grown, whole), pool.kv).split([len(each) for each in whole])
        for branch, tokens, read, got in zip(grown, new, whole, rows, strict=True):
            texts[branch] += tokens
            assert near(got, eager(model, texts[branch])[-len(read) :]), (len(texts[branch]), len(tokens))
            crossed += read == texts[branch] != tokens
    assert crossed


@pytest.mark.parametrize("name", ["phi3", "phimoe", "llama, dynamic"])
@pytest.mark.filterwarnings("ignore:.*context ends there")
def test_a_model_with_its_own_attention_is_as_it_was(name: str) -> None:
    kind, options = (SWITCHING | BOUNDED)[name]
    model = tiny_model(kind, **options)
    before = eager(copy.deepcopy(model), text(60))
    adapter.TransformersDecoder(model)
    assert torch.equal(eager(model, text(60)), before)


@pytest.mark.filterwarnings("ignore:.*context ends there")
def test_steps_end_with_the_context(tmp_path: Path) -> None:
    """At temperature 0 a policy writes what the model generates, up to there."""
    kind, options = BOUNDED["llama, dynamic"]
    model = tiny_model(kind, **options)
    policy = HFPolicy(save_checkpoint(tmp_path, model, chat=False))
    policy.begin(0, "2+2?")
    ((step,),) = policy.expand([greedy(0, 99)])
    wanted = generated(model, policy, 0, 48)
    assert (step.reason, step.num_tokens) == ("length", len(wanted))
    assert policy.tokenizer.decode(wanted, skip_special_tokens=True).startswith(step.text)


@pytest.mark.parametrize("pages", [200, 16])
@pytest.mark.parametrize("name", ["phi3", "phimoe"])
def test_steps_go_on_beyond_a_switch(name: str, pages: int, tmp_path: Path) -> None:
    """Three problems in flight pass it at different times, in a pool with room for all and in one for two of them."""
    kind, options = SWITCHING[name]
    model = tiny_model(kind, **options)
    path = save_checkpoint(tmp_path, model, chat=False)
    shape = load_decoder(path).shape
    policy = HFPolicy(path, kv_memory=pages * 16 * shape.kv_bytes(torch.float32))
    policy._eos = frozenset()
    problems = ["2+2?", "What is the sum of 1 and 2?", "Find x."]
    for number, problem in enumerate(problems):
        policy.begin(number, problem)
    steps = policy.expand([greedy(number, 50) for number in range(3)])
    (again,) = policy.expand([greedy(0, 30, branch=1, children=(2, 3), text=steps[0][0].text)])
    for number in range(3):
        (step,) = steps[number]
        wanted = generated(model, policy, number, 50 + len(policy._problems[number].root.tokens))
        assert step.num_tokens == 50
        assert policy.tokenizer.decode(wanted, skip_special_tokens=True).startswith(step.text)
    longer = generated(model, policy, 0, 80 + len(policy._problems[0].root.tokens))
    whole = policy.tokenizer.decode(longer, skip_special_tokens=True)
    assert all(whole.startswith(steps[0][0].text + step.text) for step in again)


def test_samples_of_one_prompt_pass_a_switch_together(tmp_path: Path) -> None:
    """Their prompt is read a second time, for all of them, and each one's draws are those that it has alone."""
    kind, options = SWITCHING["phi3"]
    path = save_checkpoint(tmp_path, tiny_model(kind, **options), chat=False)
    params = StepParams(temperature=1.0, max_tokens=60, delimiter=None)
    prompt = "1+1+1+1+1+1+1+1?"

    def sampled(seeds: tuple[int, ...]) -> Any:
        policy = HFPolicy(path)
        policy._eos = frozenset()
        policy.begin(0, prompt)
        ((*steps,),) = policy.expand([Expand(0, 0, tuple(range(1, 1 + len(seeds))), (), seeds, params)])
        return [step.text for step in steps], policy.end(0)

    together, cost = sampled((3, 4, 5))
    assert together == [sampled((seed,))[0][0] for seed in (3, 4, 5)]
    assert len(set(together)) == 3
    # The prompt, once more with what the first one to pass had written, and what the others had.
    assert cost.recomputed_tokens == 48 + 2 * (48 - cost.prefill_tokens)


def greedy(problem: int, tokens: int, branch: int = 0, children: tuple[int, ...] = (1,), text: str = "") -> Expand:
    params = StepParams(temperature=0.0, max_tokens=tokens, delimiter=None)
    return Expand(problem, branch, children, (text,) if text else (), tuple(children), params)


def generated(model: PreTrainedModel, policy: HFPolicy, problem: int, length: int) -> list[int]:
    """What a model's own `generate` writes behind a problem's prompt, up to a length of both."""
    prompt = policy._problems[problem].root.tokens
    model.generation_config.eos_token_id = None
    ids = model.generate(torch.tensor([prompt]), max_length=length, do_sample=False, pad_token_id=0)
    new: list[int] = ids[0, len(prompt) :].tolist()
    return new


@pytest.mark.filterwarnings("ignore:.*context ends there")
def test_generation_ends_with_the_context() -> None:
    kind, options = BOUNDED["llama, dynamic"]
    model = tiny_model(kind, **options)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([text(20)])
    settings = {"do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, max_length=48, **settings)
    assert torch.equal(model.generate(ids, max_length=48, custom_generate=generate_over_forest, **settings), wanted)
    for length in (50, 90):
        with pytest.raises(ValueError, match="at most 48 tokens"):
            model.generate(ids, max_length=length, custom_generate=generate_over_forest, **settings)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 1}, {"prompt_lookup_num_tokens": 4}])
def test_generation_goes_on_beyond_a_switch(options: dict[str, Any]) -> None:
    kind, sizes = SWITCHING["phi3"]
    model = tiny_model(kind, **sizes)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([text(20)])
    settings = {"do_sample": False, "pad_token_id": 0, "max_length": 90, **options}
    wanted = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, custom_generate=generate_over_forest, **settings), wanted)


def test_a_pool_without_room_to_read_a_text_again_is_as_it_was() -> None:
    adapter.register()
    kind, options = SWITCHING["llama, longrope"]
    model = tiny_model(kind, **options)
    model.set_attn_implementation(adapter.ATTENTION)
    decoder = adapter.TransformersDecoder(model)
    pool = KVPool(decoder.shape, 4)
    root = pool.forest.add_root()
    decoder.logits(pool.pack([root], [text(47)]), pool.kv)
    before = pool.forest.stats()
    with pytest.raises(tk.OutOfPages, match="texts of 1 branches again"):
        pool.pack([root], [text(2)])
    assert (pool.forest.stats(), pool.forest.length(root)) == (before, 47)


def test_rotary_embeddings_of_several_kinds_are_refused() -> None:
    for other in (DYNAMIC, {**LONG, "original_max_position_embeddings": 32}):
        model = tiny_model(
            "gemma3_text",
            rope_parameters={"full_attention": LONG, "sliding_attention": other},
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            head_dim=16,
        )
        with pytest.raises(ValueError, match="rotary embeddings"):
            adapter.TransformersDecoder(model)


def test_contexts_are_those_of_vllm() -> None:
    def context(**rope: Any) -> int:
        config = AutoConfig.for_model("llama", max_position_embeddings=1000)
        config.rope_parameters = {"rope_theta": 10000.0, **rope}
        return context_of(config)

    assert context(rope_type="default") == 1000
    assert context(rope_type="linear", factor=3.0) == 3000
    assert context(rope_type="yarn", factor=4.0, original_max_position_embeddings=300) == 1200
    assert context(rope_type="yarn", factor=4.0) == 4000
    assert context(rope_type="llama3", factor=8.0, original_max_position_embeddings=125) == 1000
    assert context(full_attention={"rope_type": "linear", "factor": 8.0}) == 1000
    assert context_of(AutoConfig.for_model("gpt2", n_positions=77)) == 77
    assert context_of(object()) == 2**17


@pytest.mark.parametrize("decoder", ["lean", "transformers"])
def test_a_text_beyond_the_length_before_yarn(decoder: Any, tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_model("qwen2", rope_parameters=yarn, max_position_embeddings=32, use_sliding_window=False)
    loaded = load_decoder(save_checkpoint(tmp_path, model), decoder=decoder)
    assert loaded.shape.max_length == 128
    pool = empty_pool(loaded)
    logits = loaded.logits(pool.pack([pool.forest.add_root()], [text(128)]), pool.kv)
    wanted = eager(model, text(128))
    assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()


SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
LLAMA4 = {
    **GROUPED, "intermediate_size_mlp": 96, "layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 0],
    "moe_layers": [], "num_local_experts": 2, "attn_temperature_tuning": True,
}  # fmt: skip
# Kinds that cannot be followed, and what is said of them.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon": ("falcon", {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
               "AttentionInterface"),
    "gptj": ("gptj", {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
             "AttentionInterface"),
    "gpt_neo": ("gpt_neo", {"vocab_size": 128, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
                            "attention_types": [[["global", "local"], 1]]}, "AttentionInterface"),
    "gemma4": ("gemma4_text", {**GROUPED, "hidden_size_per_layer_input": 0}, "head_dim"),
    "nemotron": ("nemotron", GROUPED, "NemotronAttention"),
    "doge": ("doge", GROUPED, "mat1 and mat2"),
    "diffllama": ("diffllama", GROUPED, "of 2 layers"),
    "bert that looks ahead": ("bert", SIZES, "causal mask"),
    "roberta": ("roberta", {**SIZES, "is_decoder": True}, "hidden states differ"),
    "camembert": ("camembert", {**SIZES, "is_decoder": True}, "hidden states differ"),
    "xlm-roberta": ("xlm-roberta", {**SIZES, "is_decoder": True}, "hidden states differ"),
    "llama4, tuned early": ("llama4_text", {**LLAMA4, "floor_scale": 4, "attn_scale": 0.5}, "hidden states differ"),
    "llama4, tuned late": ("llama4_text", {**LLAMA4, "floor_scale": 8192, "attn_scale": 0.5,
                                           "max_position_embeddings": 65536}, "hidden states differ"),
}  # fmt: skip


def saved(folder: Path, kind: str, options: dict[str, Any]) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    kind, options, reason = REFUSED[name]
    path = saved(tmp_path, kind, options)
    with pytest.raises(ValueError, match=f"^{path}: models of type '{kind}' do not run over a forest: .*{reason}"):
        load_decoder(path)


@pytest.mark.parametrize("kind", ["falcon", "roberta"])
def test_generation_refuses_them_too(kind: str) -> None:
    _, options, reason = REFUSED[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), attn_implementation="eager").eval()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"models of type '{kind}' do not run over a forest: .*{reason}"):
            model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, custom_generate=generate_over_forest)
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("opt", {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64}),
        ("gpt2", {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}),
        ("bert", {**SIZES, "is_decoder": True}),
        ("cohere2", {**GROUPED, "sliding_window": 9}),
        ("llama4_text", {**LLAMA4, "attn_temperature_tuning": False}),
        ("mixtral", {**GROUPED, "num_local_experts": 4}),
        ("gpt_neox", SIZES),
        ("gpt_oss", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9}),
        ("granite_swa", {**GROUPED, "sliding_window": 9}),
    ],
)  # fmt: skip
def test_what_can_be_followed_is_not_refused(kind: str, options: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    assert load_decoder(saved(tmp_path, kind, options), dtype=dtype).dtype == getattr(torch, dtype)


def test_the_test_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options, _ = REFUSED["roberta"]
    assert load_decoder(saved(tmp_path, kind, options), self_test=False).shape.num_layers == 2
    path = save_checkpoint(tmp_path / "llama", tiny_model())
    asked = []
    monkeypatch.setattr("tts_search.models.loading.check_decoder", lambda *args: asked.append(args))
    HFPolicy(path, self_test=False)
    assert not asked
    HFPolicy(path)
    assert len(asked) == 1


def _tree_attention(change: dict[str, Any]) -> Any:
    plain = adapter.tk.tree_attention
    return lambda *args, **options: plain(*args, **{**options, **change})


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma2"])
@pytest.mark.parametrize("change", [{"scale": 0.26}, {"window": 6}, {"softcap": 3.0}])
def test_a_wrong_attention_is_found(
    kind: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(tmp_path, tiny_model(kind))
    monkeypatch.setattr(adapter.tk, "tree_attention", _tree_attention(change))
    with pytest.raises(ValueError, match=f"type '{kind}' .* differ"):
        load_decoder(path, decoder="transformers")


@pytest.mark.parametrize(
    ("kind", "options"), [("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}), ("granite_swa", {})]
)
def test_attention_sinks_are_those_of_the_model(
    kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each head's own, in a window and without one; left out, they are missed."""
    model = tiny_model(kind, sliding_window=9, head_dim=16, **options)
    layers = [layer.self_attn for layer in model.model.layers]
    for number, attention in enumerate(layers):
        attention.sinks.data = torch.linspace(-3, 3, 4) + number
    path = save_checkpoint(tmp_path, model)
    decoder = load_decoder(path)
    pool = empty_pool(decoder)
    root = pool.forest.add_root()
    first = decoder.logits(pool.pack([root], [text(30)[:17]]), pool.kv)
    left, right = pool.forest.fork([root, root])
    second = decoder.logits(pool.pack([left, right], [text(30)[17:], text(5, 1)]), pool.kv)
    assert near(torch.cat([first, second[:13]]), eager(model, text(30)))
    assert near(second[13:], eager(model, [*text(30)[:17], *text(5, 1)])[17:])
    monkeypatch.setattr(adapter.tk, "tree_attention", _tree_attention({"sinks": None}))
    with pytest.raises(ValueError, match=f"type '{kind}' .* differ"):
        load_decoder(path)


@pytest.mark.parametrize("part", ["cos_sin", "eps", "windows"])
def test_a_wrong_lean_decoder_is_found(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from tts_search.models import loading

    plain = loading.llama_config

    def changed(model: PreTrainedModel) -> Any:
        config = plain(model)
        wrong = {"cos_sin": config.cos_sin.roll(1, 0), "eps": 0.1, "windows": (8, *config.windows[1:])}
        return replace(config, **{part: wrong[part]})

    monkeypatch.setattr(loading, "llama_config", changed)
    with pytest.raises(ValueError, match="differ"):
        load_decoder(save_checkpoint(tmp_path, tiny_model("mistral")), decoder="lean")


def test_short_contexts_are_tested_within_them(tmp_path: Path) -> None:
    for length in (4, 7, 23):
        model = tiny_model(
            "opt", max_position_embeddings=length, num_key_value_heads=4, word_embed_proj_dim=64, ffn_dim=64
        )
        assert load_decoder(save_checkpoint(tmp_path / str(length), model)).shape.max_length == length


def test_texts_avoid_special_tokens_and_leave_a_window() -> None:
    model = tiny_model("mistral", sliding_window=30, vocab_size=12, bos_token_id=3)
    common, (short, long) = selftest._texts(model, 512)
    assert not {0, 2, 3} & {*short, *long}
    assert short[:common] == long[:common]
    assert common < len(short) < len(long)
    assert len(long) > 30 + 16
    assert len(selftest._texts(tiny_model("mistral", sliding_window=4096), 512)[1][1]) < 40


def test_models_with_constant_factors_warn_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_decoder(save_checkpoint(tmp_path, tiny_model("llama")))


@pytest.mark.parametrize("name", ["phi3", "phimoe"])
def test_the_test_goes_beyond_a_switch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without having it read thousands of tokens: it moves the switch for the time that it takes."""
    kind, options = SWITCHING[name]
    path = save_checkpoint(tmp_path, tiny_model(kind, **options))
    sizes = []
    plain = adapter.TransformersDecoder.hidden

    def hidden(decoder: adapter.TransformersDecoder, batch: Batch, *args: Any) -> torch.Tensor:
        sizes.append((len(batch.tokens), 0 if batch.far is None else int(batch.far.sum())))
        return plain(decoder, batch, *args)

    monkeypatch.setattr(adapter.TransformersDecoder, "hidden", hidden)
    decoder = load_decoder(path)
    assert sizes == [(12, 0), (5 + 23 + 2, 23 + 2), (2, 1)]
    assert decoder.shape.switch == 48
    monkeypatch.setattr("tts_search.models.decoder.KVPool.renewed", lambda *args: args[-1])
    with pytest.raises(ValueError, match="hidden states differ"):
        load_decoder(path)


def test_a_rotary_embedding_that_sees_its_neighbours_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = SWITCHING["phi3"]
    path = save_checkpoint(tmp_path, tiny_model(kind, **options))
    monkeypatch.setattr(adapter, "follow_rotary", lambda *_: None)
    with pytest.raises(ValueError, match="differ"):
        load_decoder(path)
