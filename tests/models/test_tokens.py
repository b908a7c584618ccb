"""Texts as tokens: special tokens are ids, and a text after others is encoded as their continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast
from tts_search import HFPolicy, HFVerifier, StepParams
from tts_search.policies.prompt import continuation_ids, prompt_ids, prompt_of, text_ids
from tts_search.search.protocol import Expand, Score
from tts_search.verifiers import FORMATS, VerifierFormat
from tts_search.verifiers.reader import Reader

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *(chr(c) for c in range(33, 127)), "▁", "к",
          "и", "th", "the", "▁the", "▁+", "▁-", "ки", "▁ки", "▁W", "▁a", "▁i", "▁▁", "Wait"]  # fmt: skip
VOCAB = {piece: i for i, piece in enumerate(dict.fromkeys(PIECES))}
MERGES = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "+"), ("▁", "-"), ("к", "и"), ("▁", "ки"), ("▁", "W"),
          ("▁", "a"), ("▁", "i"), ("▁", "▁")]  # fmt: skip


def metaspace(scheme: str) -> Tokenizer:
    """SentencePiece as tokenizers has it today: the space in front of a text is the pre-tokenizer's."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCAB, merges=MERGES, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def prepended() -> Tokenizer:
    """SentencePiece as converted before: the space is the normalizer's."""
    tokenizer = metaspace("always")
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def fast(tokenizer: Tokenizer, template: str = "<s> $A") -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS: dict[str, Any] = {
    "llama, legacy": LlamaTokenizer(vocab=VOCAB, merges=MERGES, legacy=True, add_bos_token=True),
    "llama": LlamaTokenizer(vocab=VOCAB, merges=MERGES, legacy=False, add_bos_token=True),
    "a space in front of the first word": fast(metaspace("first")),
    "a space in front of every part": fast(metaspace("always")),
    "no space in front": fast(metaspace("never")),
    "a space by the normalizer": fast(prepended()),
    "no special tokens": fast(metaspace("first"), "$A"),
    "special tokens around": fast(metaspace("first"), "<s> $A </s>"),
    "bytes": tiny_tokenizer(chat=False),
}
TEXTS = [
    "What is the sum",
    "(a) 4",
    "\nWait",
    "</think>",
    " the",
    "  two",
    "a",
    "ки",
    "é",
    "1",
    "\n\n",
    "the\n+",
    "Wait,",
]


def whole(tokenizer: Any, text: str) -> list[int]:
    """What the tokenizer makes of a text, up to where it would go on."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("problem", TEXTS)
def test_prompts_without_a_template_are_the_tokenizers(name: str, problem: str) -> None:
    tokenizer = TOKENIZERS[name]
    for system in (None, "Think."):
        prompt = prompt_of(problem, system, tokenizer)
        assert prompt == ("" if system is None else "Think.\n\n") + problem + "\n\n"
        assert prompt_ids(prompt, tokenizer) == whole(tokenizer, prompt)


def test_a_template_writes_its_special_tokens_itself() -> None:
    tokenizer = fast(metaspace("first"))
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "What is"}]
    wanted = tokenizer.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
    assert prompt_ids(prompt_of("What is", None, tokenizer), tokenizer) == wanted
    assert wanted.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("boundary", [" ки", "\n", "+"])
def test_a_verifier_reads_the_tokens_of_the_whole_text(name: str, bos: bool | None, boundary: str) -> None:
    tokenizer = TOKENIZERS[name]
    entry = VerifierFormat(
        "test", head="label_pair", prompt="{problem} {steps}", boundary=boundary, separator="\n", bos=bos
    )
    reader = Reader(tokenizer, entry)
    path, tail = reader.prompt("What is the sum")
    text = "What is the sum "
    for number, step in enumerate(("the a", "i", "Wait"), 1):
        start, tokens, tail = reader.step(tail, step, number)
        path = [*path[:start], *tokens]
        text += ("\n" if number > 1 else "") + step + boundary
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted = {None: whole(tokenizer, text), True: [tokenizer.bos_token_id, *plain], False: plain}
        assert path == wanted[bos]


@pytest.mark.parametrize("name", sorted(name for name, entry in FORMATS.items() if not entry.chat and not entry.judge))
@pytest.mark.parametrize("kind", ["llama", "a space in front of the first word", "llama, legacy"])
def test_published_formats_with_a_prompt_begin_as_the_tokenizer_does(name: str, kind: str) -> None:
    tokenizer, entry = TOKENIZERS[kind], FORMATS[name]
    tokens, _ = Reader(tokenizer, entry).prompt("What is the sum")
    before, _, after = entry.prompt.partition("{steps}")[0].partition("{problem}")
    first = before + "What is the sum" + (after if entry.encoding == "text" else "")
    wanted = tokenizer(first.rstrip(), add_special_tokens=False)["input_ids"]
    if entry.bos is not False:
        wanted = [tokenizer.bos_token_id, *wanted]
    assert tokens[: len(wanted)] == wanted


def decoder(tokenizer: Any) -> Any:
    return lambda tokens: tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(texts=["é"] * 4 + ["\n", "é"])  # the last eight tokens begin within a character
@example(texts=["é"] * 20 + ["\n", "é"])
@given(texts=st.lists(st.one_of(st.sampled_from(TEXTS), st.text(alphabet="ath +-\n(1к</", min_size=1)), min_size=1))
def test_what_follows_decodes_to_its_text(name: str, texts: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    decode = decoder(tokenizer)
    path = text_ids("What is\n", tokenizer, special=True)
    text = decode(path)
    for each in texts:
        path += continuation_ids(path, each, lambda text: text_ids(text, tokenizer, special=False), decode)
        text += each
        assert decode(path) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("others", [("(a) 4",), ("\nWait",), ("</think>", " the"), ("the", "\n\n", "Wait")])
def test_a_branch_reads_prompt_and_steps(name: str, others: tuple[str, ...], tmp_path: Path) -> None:
    """Of texts that came from elsewhere, behind the prompt and behind what was sampled."""
    tokenizer = TOKENIZERS[name]
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = HFPolicy(str(tmp_path))
    policy.begin(0, "What is 2+2?")
    assert policy.prompt_tokens("What is 2+2?") == whole(tokenizer, "What is 2+2?\n\n")
    params = StepParams(max_tokens=4, delimiter=None)
    (sampled,) = policy.expand([Expand(0, 0, (1,), (), (7,), params)])
    for branch, steps in enumerate((others, (sampled[0].text, *others)), 10):
        policy.expand([Expand(0, branch, (branch + 10,), steps, (1,), StepParams(max_tokens=1))])
        read = policy._decode(policy._problems[0].known.longest(branch, "".join(steps))[1].path())
        assert read == "What is 2+2?\n\n" + "".join(steps)


def test_scores_are_those_of_the_tokenizers_ids(tmp_path: Path) -> None:
    """math_shepherd on a tokenizer of today's Llama kind, which cuts the first word otherwise behind a text "<s>"."""
    tokenizer = TOKENIZERS["llama"]
    config = AutoConfig.for_model(
        "mistral", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    verifier = HFVerifier(str(tmp_path), format="math_shepherd")
    verifier.begin(0, "What is the sum")
    (got,) = verifier.score([Score(0, 1, ("the a", "i i"), 0)])
    ids = tokenizer("What is the sum the a ки\ni i ки")["input_ids"]
    labels = [tokenizer.convert_tokens_to_ids(label) for label in ("▁+", "▁-")]
    with torch.inference_mode():
        good = torch.softmax(model(torch.tensor([ids])).logits[0][:, labels], -1)[:, 0]
    tag = tokenizer.convert_tokens_to_ids("▁ки")
    assert got == pytest.approx([good[i].item() for i, token in enumerate(ids) if token == tag], abs=1e-5)
    assert ids[1] == tokenizer.convert_tokens_to_ids("▁W")
