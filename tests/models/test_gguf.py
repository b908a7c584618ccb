"""GGUF files: every type of weights against the same weights in transformers; tokenizers; refused files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

gguf = pytest.importorskip("gguf")

from gguf_files import LARGE, PLAIN, SMALL, WIDTH, dequantised, quantised, wide_model, with_state, write  # noqa: E402
from test_llama_decoder import empty_pool  # noqa: E402
from tiny import save_checkpoint, tiny_tokenizer  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import LlamaTokenizer  # noqa: E402
from tts_search import HFPolicy, HFVerifier, SearchConfig, search  # noqa: E402
from tts_search.models import transformers as adapter  # noqa: E402
from tts_search.models.formats.gguf import GGUFCheckpoint  # noqa: E402
from tts_search.models.formats.gguf_blocks import blocks  # noqa: E402
from tts_search.models.llama import LlamaDecoder  # noqa: E402
from tts_search.models.loading import load_decoder  # noqa: E402
from tts_search.models.quantised import Quantised, join, nearest, pack, with_minimum  # noqa: E402

import tts_kernels as tk  # noqa: E402

IDS = list(range(10, 40))
KEPT = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4", "Q5_0": "int8", "Q5_1": "int8", "Q4_K": "int4", "Q5_K": "int8"}


def logits_of(decoder: Any) -> Tensor:
    pool = empty_pool(decoder)
    out: Tensor = decoder.logits(pool.pack([pool.forest.add_root()], [IDS]), pool.kv)
    return out


def distance(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("kind", [*PLAIN, *SMALL, *LARGE])
def test_blocks_say_what_gguf_says(kind: str) -> None:
    raw = quantised(torch.randn(20, 2 * WIDTH), kind)
    found = blocks(torch.from_numpy(raw.copy()).view(torch.uint8), kind)
    want = dequantised(raw, kind)
    if not isinstance(found, Quantised):
        assert torch.equal(found.float(), want)
        return
    assert found.kind == KEPT[kind]
    for got in (found.dequantised(torch.float32), pack(found).unpack()):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=want.abs().max().item() * 1e-6)


FILES = [("llama", kind) for kind in (*PLAIN, *SMALL, *LARGE)]
FILES += [(family, kind) for family in ("qwen2", "qwen3") for kind in ("F16", "Q4_1", "Q6_K")]


@pytest.mark.parametrize(("family", "kind"), FILES)
def test_logits_are_those_of_the_weights_in_transformers(family: str, kind: str, tmp_path: Path) -> None:
    tied = kind in ("Q8_0", "F16", "Q4_K")
    model = wide_model(family, tie_word_embeddings=tied, attention_bias=family == "llama" and kind == "F32")
    state = write(tmp_path / "m.gguf", model, kind)
    decoder = load_decoder(str(tmp_path / "m.gguf"), dtype="float32")
    want = with_state(model, state)(torch.tensor([IDS])).logits[0]
    # Rows of x become 8 bits where weights have few, and Q6_K gets new numbers.
    assert distance(logits_of(decoder), want) < (1e-5 if kind in PLAIN else 0.06)
    assert isinstance(decoder, LlamaDecoder)
    layer = decoder.layers.layers[1]
    packed = {"q": (layer.qkv, 0, "self_attn.q"), "o": (layer.o, 0, "self_attn.o"), "down": (layer.down, 0, "mlp.down")}
    for got, first, name in packed.values():
        expected = state[f"model.layers.1.{name}_proj.weight"]
        part = got.unpack()[first : first + len(expected)]
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-6 if kind != "Q6_K" else 1e-3)
        assert (got.quantize, got.group_size) == ((KEPT.get(kind, "int8"), 32) if kind not in PLAIN else (None, None))


def test_one_file_of_many_types(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As "Q4_K_M" has it: what has no common form of few bits is joined in more of them."""
    model = wide_model()
    kinds = {"v_proj": "Q6_K", "down_proj": "Q6_K", "lm_head": "Q6_K", "layers.1.mlp.up": "F16", "embed": "Q5_0"}
    state = write(tmp_path / "m.gguf", model, "Q4_K", kinds)
    with caplog.at_level(logging.INFO, logger="tts_search"):
        decoder = load_decoder(str(tmp_path / "m.gguf"), dtype="float32")
    assert "weights in F16, Q4_K, Q5_0, Q6_K; Q6_K is quantised anew" in caplog.text
    assert distance(logits_of(decoder), with_state(model, state)(torch.tensor([IDS])).logits[0]) < 0.06
    assert isinstance(decoder, LlamaDecoder)
    forms = [[p.quantize for p in (one.qkv, one.o, one.gate_up, one.down)] for one in decoder.layers.layers]
    assert forms == [["int8", "int4", "int4", "int8"], ["int8", "int4", None, "int8"]]


def test_what_is_not_quantised_can_be(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", wide_model(), "Q4_0", {"o_proj": "F16"})
    decoder = load_decoder(str(tmp_path / "m.gguf"), quantize="int8")
    assert isinstance(decoder, LlamaDecoder)
    layer = decoder.layers.layers[0]
    assert [(p.quantize, p.group_size) for p in (layer.qkv, layer.o)] == [("int4", 32), ("int8", None)]


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q4_0", "bfloat16")])
def test_the_type_is_the_files(kind: str, dtype: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", wide_model(), kind)
    assert load_decoder(str(tmp_path / "m.gguf")).dtype == getattr(torch, dtype)


def test_frequencies_of_llama_3(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = wide_model(rope_parameters=rope, max_position_embeddings=16384)
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2).float() / 64)
    divisors = plain / model.model.rotary_emb.inv_freq
    assert divisors.max() > 7.9
    state = write(tmp_path / "m.gguf", model, "F32", extra={"rope_freqs.weight": divisors.numpy()})
    decoder = load_decoder(str(tmp_path / "m.gguf"))
    assert distance(logits_of(decoder), with_state(model, state)(torch.tensor([IDS])).logits[0]) < 1e-5
    write(tmp_path / "m.gguf", model, "F32", extra={"rope_freqs.weight": (divisors * 1.01).numpy()})
    with pytest.raises(ValueError, match=r"m\.gguf: rope_freqs\.weight are not those of Llama 3"):
        load_decoder(str(tmp_path / "m.gguf"))


def test_the_model_can_be_used(tmp_path: Path) -> None:
    """Policy and verifier answer as on the same weights in a folder, where rounding is all that differs."""
    model = wide_model()
    path = tmp_path / "m.gguf"
    state = write(path, model, "F32")
    folder = save_checkpoint(tmp_path / "folder", with_state(model, state))
    adapter.load_tokenizer(str(path)).save_pretrained(folder)
    config = SearchConfig(method="beam_search", n=4, expand=2, max_steps=2, max_step_tokens=6)

    def run(place: str) -> tuple[list[str], list[float]]:
        policy, verifier = HFPolicy(place, kv_memory="1MiB"), HFVerifier(place, format="yes_no", kv_memory="1MiB")
        result = search(["one and two?"], policy, verifier, config, progress=False)[0]
        return [one.text for one in result.completions], [one.score for one in result.completions]

    (texts, scores), (expected, wanted) = run(str(path)), run(folder)
    assert texts == expected
    assert scores == pytest.approx(wanted, abs=1e-5)


def test_heads_read_rows_of_few_bits(tmp_path: Path) -> None:
    state = write(tmp_path / "m.gguf", wide_model(), "Q4_0")
    checkpoint = GGUFCheckpoint(str(tmp_path / "m.gguf"))
    assert torch.equal(checkpoint.tensor("lm_head.weight", [5, 2]), state["lm_head.weight"][[5, 2]])
    whole = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(whole, state["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(FileNotFoundError, match=r"a GGUF file has no v_head\.safetensors"):
        checkpoint.tensors_of("v_head.safetensors")


TEXTS = ["the 1234 is", "Yes\n\nNo. the\n", "<|user|>hi<|end|>", " a  b\t é π ∑ 12.5", ""]


def test_byte_level_tokenizers(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", wide_model(), "Q8_0")
    tokenizer = adapter.load_tokenizer(str(tmp_path / "m.gguf"))
    expected = tiny_tokenizer()
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == expected(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    for name in ("bos_token", "eos_token", "pad_token", "chat_template"):
        assert getattr(tokenizer, name) == getattr(expected, name)
    assert adapter.eos_tokens(str(tmp_path / "m.gguf"), tokenizer) == {expected.eos_token_id}


SPLITS = {
    "gpt-2": ["the", " 1234", " isn", "'t"],
    "smollm": ["the", " ", "1", "2", "3", "4", " isn", "'t"],
    "qwen2": ["the", " ", "1", "2", "3", "4", " isn", "'t"],
    "llama-bpe": ["the", " ", "123", "4", " isn", "'t"],
}


@pytest.mark.parametrize("pre", SPLITS)
def test_text_is_cut_as_the_file_says(pre: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", wide_model(), "Q8_0", pre=pre)
    tokenizer = adapter.load_tokenizer(str(tmp_path / "m.gguf")).backend_tokenizer
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("the 1234 isn't")]
    assert [piece.replace("Ġ", " ") for piece in pieces] == SPLITS[pre]


def test_sentence_piece_tokenizers(tmp_path: Path) -> None:
    """A vocabulary whose scores are the ranks of its merges, as SentencePiece's are."""
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("1", "2"), ("i", "s"), ("▁", "is")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thei s12.\n".replace(" ", "")]
    letters = dict.fromkeys(tokens[259:], 0.0)
    scores = [0.0] * 259 + [-1000.0] * len(letters)
    tokens = [*tokens[:259], *letters, *(a + b for a, b in merges)]
    scores += [-float(rank) for rank in range(len(merges))]
    model = wide_model(vocab_size=len(tokens), pad_token_id=None)
    lists = {"tokens": tokens, "scores": scores, "token_types": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]}
    write(tmp_path / "m.gguf", model, "Q8_0", sentence_piece=lists)
    tokenizer = adapter.load_tokenizer(str(tmp_path / "m.gguf"))
    expected = LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    for text in ["the 12 is", "is\n\nthe.", "é π"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == 1
        assert ids[1:] == expected(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert isinstance(tokenizer.backend_tokenizer, Tokenizer)
    assert isinstance(tokenizer.backend_tokenizer.model, models.BPE)
    assert isinstance(tokenizer.backend_tokenizer.decoder, decoders.Sequence)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"general.architecture": "gemma2"}, "got general.architecture 'gemma2'"),
    "experts": ({"llama.expert_count": 8}, "mixtures of experts"),
    "parts": ({"split.count": 3}, "one of several files"),
    "rope": ({"llama.rope.scaling.type": "longrope"}, "type 'longrope' is not supported"),
    "partial": ({"llama.rope.dimension_count": 16}, "a part of each head"),
    "context": ({"llama.context_length": 2**31}, "context_length from 1 to 2097152"),
    "none": ({"llama.context_length": None}, "expected llama.context_length as int, got None"),
    "heads": ({"llama.attention.head_count": "4"}, "head_count as int, got '4'"),
    "layers": ({"llama.block_count": 3}, "found 2 of 3 layers"),
    "width": ({"llama.feed_forward_length": 512}, r"mlp\.gate_proj\.weight of shape \[512, 256\], got \[256, 256\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name: str, tmp_path: Path) -> None:
    changes, reason = REFUSED[name]
    write(tmp_path / "m.gguf", wide_model(), "Q8_0", changes=changes)
    with pytest.raises(ValueError, match=rf"m\.gguf.*{reason}"):
        load_decoder(str(tmp_path / "m.gguf"))


def test_types_and_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    path = str(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", wide_model(), "F32", {"k_proj": "TQ2_0"})
    with pytest.raises(ValueError, match=r"m\.gguf: .*blk\.0\.attn_k\.weight' is TQ2_0; read are F32, .*BF16"):
        load_decoder(path)
    write(tmp_path / "m.gguf", wide_model(), "Q8_0", pre="chameleon")
    with pytest.raises(ValueError, match=r"m\.gguf: expected tokenizer\.ggml\.pre to be one of gpt-2, .*'chameleon'"):
        adapter.load_tokenizer(path)
    write(tmp_path / "m.gguf", wide_model(), "Q8_0", extra={"blk.0.ffn_gate_exps.weight": torch.zeros(32, 32).numpy()})
    with pytest.raises(ValueError, match=r"m\.gguf: tensor 'blk\.0\.ffn_gate_exps\.weight' belongs to no model"):
        load_decoder(path)
    write(tmp_path / "m.gguf", wide_model(), "Q8_0")
    with pytest.raises(ValueError, match=r"^decoder: expected 'auto' or 'lean' .*m\.gguf, got 'transformers'"):
        load_decoder(path, decoder="transformers")
    with pytest.raises(FileNotFoundError, match=r"expected a GGUF file, got '.*none\.gguf'"):
        HFPolicy(str(tmp_path / "none.gguf"))


def test_weights_without_a_scale_are_their_minimum() -> None:
    numbers = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    scale, minimum = torch.tensor([[0.0, 0.5]] * 3), torch.tensor([[-2.0, 1.0]] * 3)
    found = with_minimum(numbers, scale, minimum, 32)
    want = torch.cat([torch.full((3, 32), -2.0), numbers[:, 32:] * 0.5 + 1], 1)
    assert torch.equal(found.dequantised(torch.float32), want)
    assert torch.equal(pack(found).unpack(), want)


def test_joined_weights_are_exact() -> None:
    eight = nearest(torch.randn(5, 64), 32)
    four = Quantised(torch.randint(0, 16, (3, 64), dtype=torch.uint8), torch.rand(3, 2), None, 32)
    floats = torch.randn(2, 64)
    for parts in ([eight, four], [four, eight, four], [four, four], [floats, four], [floats, floats]):
        joined = join(parts)
        assert isinstance(joined, Quantised) == all(isinstance(part, Quantised) for part in parts)
        whole = [part.dequantised(torch.float32) if isinstance(part, Quantised) else part for part in parts]
        got = joined.dequantised(torch.float32) if isinstance(joined, Quantised) else joined
        assert torch.equal(got, torch.cat(whole))
    rows = [3, 0, 4]
    assert torch.equal(eight[torch.tensor(rows)].dequantised(torch.float32), eight.dequantised(torch.float32)[rows])


def test_panels_are_packed_some_rows_at_a_time() -> None:
    weight = torch.randn(5000, 40)
    packed, whole = pack(weight, "int4", 32), tk.pack_linear(weight, quantize="int4", group_size=32)
    assert torch.equal(packed.unpack(), whole.unpack())
    assert packed.weight.shape == whole.weight.shape
