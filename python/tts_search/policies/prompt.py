"""The tokens that a policy reads: the text before the first step, and text that it did not write itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from tts_search.search.types import Messages

__all__ = ["at_a_word", "continuation_ids", "prompt_ids", "prompt_of", "text_ids"]

# Texts that stand in front of another one while it is encoded, so that a tokenizer does not take it for a beginning.
_FRONTS: Final = ("a", "\n", ".", "a ", "1")
_CONTEXT: Final = 8  # tokens before a continuation that are looked at


def prompt_of(problem: str | Messages, system_prompt: str | None, tokenizer: Any) -> str:
    """Return a problem as the tokenizer's chat template has it, up to where the answer begins.

    Without a template it is the system prompt and the problem, each followed by a blank line. In a conversation the
    system prompt stands in front, unless it has a system message of its own.
    """
    messages = [{"role": "user", "content": problem}] if isinstance(problem, str) else [dict(each) for each in problem]
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    if tokenizer.chat_template is None:
        return "".join(f"{each['content']}\n\n" for each in messages if each["content"])
    prompt: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """The tokens of what `prompt_of` returns: a template writes its special tokens, else the tokenizer adds its own."""
    return text_ids(prompt, tokenizer, special=tokenizer.chat_template is None)


def text_ids(text: str, tokenizer: Any, *, special: bool) -> list[int]:
    """The tokens of a text that is to be continued.

    With ``special`` they are those of ``tokenizer(text)``: with the special tokens that it puts in front, and without
    those that it puts behind. Those are added as ids: a token that is written as text changes the text next to it for
    some tokenizers, which take only the very beginning for the beginning of a word.
    """
    encoded = tokenizer(text, add_special_tokens=special, return_special_tokens_mask=special)
    ids: list[int] = list(encoded["input_ids"])
    if special:
        end = len(ids) - _behind(tokenizer)
        return ids[:end]
    return ids


def _behind(tokenizer: Any) -> int:
    """How many special tokens a tokenizer puts behind a text."""
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return len(mask) - 1 - max((i for i, special in enumerate(mask) if not special), default=len(mask) - 1)


def continuation_ids(
    path: Sequence[int], text: str, encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str]
) -> list[int]:
    """The tokens of a text that follows others.

    A text by itself is a beginning, in front of which some tokenizers put a space. So it is encoded behind what comes
    before it, else behind a short text that does not grow together with it, whose tokens are cut off; the first tokens
    that decode to the text, in their place, are taken.

    Parameters
    ----------
    path
        The tokens before.
    text
        What follows.
    encode, decode
        Of the tokenizer, without adding special tokens.

    Returns
    -------
    list of int
        They decode to the text behind ``path``, if any tokens of these encodings do; else the text's by itself.
    """
    context, before = _whole_characters(path, decode)
    for ids in _encodings(before, text, encode):
        if decode([*context, *ids]) == before + text:
            return ids
    return encode(text)


def at_a_word(start: str, text: str) -> bool:
    """Whether a text begins with another one that ends where no word is cut: its tokens can be continued."""
    if not text.startswith(start):
        return False
    return not start or len(start) == len(text) or start[-1].isspace() or text[len(start)].isspace()


def _whole_characters(path: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[list[int], str]:
    """The last tokens and their text: `_CONTEXT` of them, or more where those would begin within a character."""
    size = _CONTEXT
    while "\ufffd" in (before := decode(list(path[-size:]))) and size < len(path):
        size *= 2
    return list(path[-size:]), before


def _encodings(before: str, text: str, encode: Callable[[str], list[int]]) -> Iterator[list[int]]:
    """Tokens of a text, from encodings behind others with which it does not grow together."""
    for front in (before, *_FRONTS):
        known, both = encode(front), encode(front + text)
        if known and both[: len(known)] == known:
            yield both[len(known) :]
