"""The tokenizer of the demo models: bytes, digits, the words of the arithmetic task, and a chat template.

A byte-level BPE tokenizer without merges: a piece of text that is a word of the vocabulary becomes one token, any
other piece is spelled in bytes. So every text can be encoded and decoded back exactly, a digit is always one token, and
so is a blank line, the step delimiter.

Run it to write the tokenizer's files: ``python examples/demo_models/tokenizer.py FOLDER``.
"""

from __future__ import annotations

import re
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, END, SYSTEM, USER, ASSISTANT, STEP = SPECIAL = (
    "<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|step|>",
)  # fmt: skip

# Words and phrases carry the space after them, so that a number never begins with one.
PHRASES = (
    "Start with ", ", add ", ", subtract ", ", multiply by ", ". What is the result modulo ",
    "The answer is ", "\\boxed{", "}.",
)  # fmt: skip
WORDS = ("\n\n", " + ", " - ", " * ", " = ", *PHRASES)

# Cuts a text into pieces and loses nothing: a phrase | blank line | operator | word | digit | sign | white space.
PIECES = "|".join([*map(re.escape, PHRASES), r"\n\n| [-+*=] |[A-Za-z]+ ?|[0-9]|[^\sA-Za-z0-9] ?|\s"])

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters that stand for bytes in byte-level BPE, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of all demo models."""
    alphabet = byte_alphabet()
    words = ["".join(alphabet[byte] for byte in word.encode()) for word in WORDS]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


if __name__ == "__main__":
    build_tokenizer().save_pretrained(sys.argv[1])
