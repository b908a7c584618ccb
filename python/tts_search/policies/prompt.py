"""The tokens that a policy reads: the text before the first step, and text that it did not write itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from tts_search.search.types import Messages

__all__ = ["at_a_word", "continuation_ids", "prompt_ids", "prompt_of", "text_ids"]

# Texts that precede another text while it is encoded, so that the tokenizer does not see it as the beginning of a text.
_FRONTS: Final = ("a", "\n", ".", "a ", "1")
_CONTEXT: Final = 8  # how many tokens before a continuation are encoded with it


def prompt_of(problem: str | Messages, system_prompt: str | None, tokenizer: Any) -> str:
    """Return a problem in the tokenizer's chat template, up to where the answer begins.

    Without a template, this is the system prompt and the problem, each followed by a blank line. In a conversation the
    system prompt comes first, unless the conversation has a system message of its own.
    """
    messages = [{"role": "user", "content": problem}] if isinstance(problem, str) else [dict(each) for each in problem]
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    if tokenizer.chat_template is None:
        return "".join(f"{each['content']}\n\n" for each in messages if each["content"])
    prompt: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """The tokens of a prompt from `prompt_of`. Special tokens come from the template, or else from the tokenizer."""
    return text_ids(prompt, tokenizer, special=tokenizer.chat_template is None)


def text_ids(text: str, tokenizer: Any, *, special: bool) -> list[int]:
    """The tokens of a text that will be continued.

    With ``special`` they are those of ``tokenizer(text)``: with the special tokens that it adds at the beginning, and
    without those at the end. The special tokens are added as ids. As text they would change the tokens of the next text
    for some tokenizers, which see only the very beginning as the beginning of a word.
    """
    encoded = tokenizer(text, add_special_tokens=special, return_special_tokens_mask=special)
    ids: list[int] = list(encoded["input_ids"])
    if special:
        end = len(ids) - _behind(tokenizer)
        return ids[:end]
    return ids


def _behind(tokenizer: Any) -> int:
    """How many special tokens a tokenizer adds at the end of a text."""
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return len(mask) - 1 - max((i for i, special in enumerate(mask) if not special), default=len(mask) - 1)


def continuation_ids(
    path: Sequence[int], text: str, encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str]
) -> list[int]:
    """The tokens of a text that follows other tokens.

    Some tokenizers put a space at the beginning of a text. So the text is encoded after the text before it, or else
    after a short text with which it shares no token, and the tokens of this other text are cut off. The first result
    that decodes to the text, at its place, is returned.

    Parameters
    ----------
    path
        The tokens before.
    text
        The text that follows.
    encode, decode
        Functions of the tokenizer, without adding special tokens.

    Returns
    -------
    list of int
        Tokens that decode to the text after ``path``, if one of these encodings gives such tokens; else the tokens of
        the text without context.
    """
    context, before = _whole_characters(path, decode)
    for ids in _encodings(before, text, encode):
        if decode([*context, *ids]) == before + text:
            return ids
    return encode(text)


def at_a_word(start: str, text: str) -> bool:
    """Whether a text begins with `start`, and no word is cut at its end, so that its tokens can be continued."""
    if not text.startswith(start):
        return False
    return not start or len(start) == len(text) or start[-1].isspace() or text[len(start)].isspace()


def _whole_characters(path: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[list[int], str]:
    """The last tokens and their text: `_CONTEXT` tokens, or more if these would begin within a character."""
    size = _CONTEXT
    while "\ufffd" in (before := decode(list(path[-size:]))) and size < len(path):
        size *= 2
    return list(path[-size:]), before


def _encodings(before: str, text: str, encode: Callable[[str], list[int]]) -> Iterator[list[int]]:
    """Tokens of a text, from encodings after other texts with which it shares no token."""
    for front in (before, *_FRONTS):
        known, both = encode(front), encode(front + text)
        if known and both[: len(known)] == known:
            yield both[len(known) :]
