"""The tokenizer of a GGUF file as one of transformers: its vocabulary, merges, special tokens and chat template.

The file has only a name for the way in which text is cut before merging (``tokenizer.ggml.pre``). An unknown name is
refused: if digits were grouped in another way, for example, every number would silently become other tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tts_search.models.formats.gguf_header import GGUFHeader

__all__ = ["end_tokens", "gguf_tokenizer"]

_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_SPACE: Final = "▁"  # SentencePiece's
_GPT2: Final = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> Any:
    parts = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


def _words(numbers: str) -> str:
    """The split into words of Llama 3 and its followers, which group digits in different ways."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA3: Final = _split(_words(r"\p{N}{1,3}"))
_QWEN2: Final = _split(_words(r"\p{N}"))
_DIGITS: Final = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])
_PRE: Final = {
    "gpt-2": _GPT2, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3, "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2, "smollm": _DIGITS,
}  # fmt: skip


def gguf_tokenizer(header: GGUFHeader) -> Any:
    """The tokenizer of a file.

    Raises
    ------
    ValueError
        If the file has no tokenizer, or one that is unknown or inconsistent; the message names the file.
    """
    from transformers import PreTrainedTokenizerFast

    says = _Says(header)
    kind = says.get("model", str)
    if kind not in _KINDS:
        raise ValueError(f"{header.path}: expected a tokenizer of {', '.join(_KINDS)}, got {kind!r}")
    try:
        tokenizer = _KINDS[kind](says)
        _add_special(tokenizer, says)
        special = {
            f"{name}_token": says.tokens[number]
            for name, stored in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if (number := says.token(f"{stored}_token_id")) is not None
        }
        if says.get("add_bos_token", bool, kind == "llama") and "bos_token" in special:
            tokenizer.post_processor = _with_beginning(special["bos_token"], says)
    except ValueError:
        raise
    except Exception as error:  # the library raises bare ones
        raise ValueError(f"{header.path}: a tokenizer that does not fit together: {error}") from error
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    template = header.metadata.get("tokenizer.chat_template")
    fast.chat_template = template if isinstance(template, str) else None
    return fast


def end_tokens(header: GGUFHeader) -> set[int]:
    """Tokens that end a text or a turn."""
    says = _Says(header)
    found = (says.token(f"{name}_token_id") for name in ("eos", "eot", "eom"))
    return {number for number in found if number is not None}


class _Says:
    """The part of the metadata that describes the tokenizer, with types and ranges checked."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self.tokens: list[str] = self.texts("tokens")

    def get(self, key: str, of: type, default: Any = None) -> Any:
        value = self.header.metadata.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not of:
            raise ValueError(f"{self.header.path}: expected tokenizer.ggml.{key} as {of.__name__}, got {value!r:.80}")
        return value

    def texts(self, key: str) -> list[str]:
        values: list[str] = self.get(key, list)
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self.header.path}: expected texts in tokenizer.ggml.{key}")
        return values

    def numbers(self, key: str, of: type, default: list[Any] | None = None) -> list[Any]:
        values: list[Any] = self.get(key, list, default)
        if len(values) != len(self.tokens) or not all(type(value) is of for value in values):
            raise ValueError(f"{self.header.path}: expected tokenizer.ggml.{key} to be a number for each token")
        return values

    def token(self, key: str) -> int | None:
        number: int | None = self.header.metadata.get(f"tokenizer.ggml.{key}")
        if number is not None and (type(number) is not int or not 0 <= number < len(self.tokens)):
            raise ValueError(
                f"{self.header.path}: expected tokenizer.ggml.{key} below {len(self.tokens)}, got {number!r}"
            )
        return number


def _byte_level(says: _Says) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    pre = says.get("pre", str, "none")
    if pre not in _PRE:
        raise ValueError(f"{says.header.path}: expected tokenizer.ggml.pre to be one of {', '.join(_PRE)}, got {pre!r}")
    vocab = {token: number for number, token in enumerate(says.tokens)}
    merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in says.texts("merges"))]
    if not all(second for _, second in merges):
        raise ValueError(f"{says.header.path}: expected two parts in each of tokenizer.ggml.merges")
    # Llama 3 keeps a word that is a token. Qwen first composes characters.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=_PRE[pre] is _LLAMA3))
    if _PRE[pre] is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(says: _Says) -> Tokenizer:
    """SentencePiece's BPE, as in Llama 2 and Mistral: the score of a token ranks the merges that make it."""
    vocab = {token: number for number, token in enumerate(says.tokens)}
    scores = says.numbers("scores", float)
    pairs = [
        (scores[number], vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for number, token in enumerate(says.tokens)
        if len(token) <= _LONGEST_TOKEN
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    unknown = says.token("unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(pair[3], pair[4]) for pair in pairs],
            unk_token=None if unknown is None else says.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    front = [normalizers.Prepend(_SPACE)] if says.get("add_space_prefix", bool, True) else []
    tokenizer.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if front else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


_LONGEST_TOKEN: Final = 64  # longest token, in characters, that is searched for pairs
_KINDS: Final[dict[str, Callable[[_Says], Tokenizer]]] = {"gpt2": _byte_level, "llama": _sentence_piece}


def _add_special(tokenizer: Tokenizer, says: _Says) -> None:
    """Add the tokens that a text may contain as they are: control tokens, and tokens defined by users."""
    kinds = says.numbers("token_type", int, [1] * len(says.tokens))
    named = [(token, kind) for token, kind in zip(says.tokens, kinds, strict=True) if token]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in named if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in named if k == _USER_DEFINED])


def _with_beginning(token: str, says: _Says) -> Any:
    """Adds the token before a text. The template has another name for it, as some signs have a meaning there."""
    return processors.TemplateProcessing(
        single=["<bos>", "$A"],
        pair=["<bos>", "$A", "$B"],
        special_tokens=[{"id": "<bos>", "ids": [says.token("bos_token_id")], "tokens": [token]}],
    )
