"""The texts and tokens of a model, and the prompts of conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tts_search.policies.prompt import continuation_ids, text_ids
from tts_search.serve.errors import ApiError

__all__ = ["Texts"]

_MARK: Final = "\ue0f0message\ue0f1"  # stands for the message that is continued; no client writes it


class Texts:
    """The tokenizer of a model, as a server needs it.

    Parameters
    ----------
    tokenizer : tokenizer of transformers
        A fast tokenizer.
    max_length : int
        The number of tokens in the model's context.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The tokens of a text; with `special`, also those that the tokenizer adds at the beginning."""
        return text_ids(text, self.tokenizer, special=special)

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of tokens.

        Raises
        ------
        ApiError
            If a token does not exist.
        """
        self.check(tokens)
        text: str = self.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=skip_special)
        return text

    def check(self, tokens: Sequence[int]) -> None:
        """Raise an error for tokens that do not exist."""
        size = len(self.tokenizer)
        if wrong := next((token for token in tokens if not 0 <= token < size), None):
            raise ApiError(400, f"tokens: expected ids from 0 to {size - 1}, got {wrong}", "tokens")

    def names(self, tokens: Sequence[int]) -> list[str]:
        """The names of tokens in the vocabulary."""
        self.check(tokens)
        names: list[str] = self.tokenizer.convert_ids_to_tokens(tokens)
        return names

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generation_prompt: bool = True,
        continue_final: bool = False,
        special: bool | None = None,
        template: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The tokens of a conversation.

        With `continue_final` they end where the last message ends. The text of this message is not changed: white space
        at its end, which a template might trim, is part of the text to continue.

        Raises
        ------
        ApiError
            If the template refuses the messages.
        """
        if special is None:
            special = self.tokenizer.chat_template is None and template is None
        if not continue_final:
            return self.encode(self._render(messages, generation_prompt, template, options), special=special)
        *before, last = messages
        marked = [*before, {**last, "content": _MARK}]
        head, found, _ = self._render(marked, False, template, options).partition(_MARK)
        if not found:
            raise ApiError(400, f"messages: the chat template leaves out the last one, of role {last['role']}")
        tokens = self.encode(head, special=special)
        return [*tokens, *self.continuation(tokens, str(last["content"]))]

    def continuation(self, tokens: Sequence[int], text: str) -> list[int]:
        """The tokens of a text that follows other tokens."""
        if not text:
            return []
        decode = self.tokenizer.backend_tokenizer.decode
        return continuation_ids(
            tokens,
            text,
            lambda part: text_ids(part, self.tokenizer, special=False),
            lambda ids: str(decode(ids, skip_special_tokens=False)),
        )

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation_prompt: bool,
        template: str | None,
        options: Mapping[str, Any] | None,
    ) -> str:
        if self.tokenizer.chat_template is None and template is None:
            return "\n\n".join([str(each["content"]) for each in messages] + [""] * generation_prompt)
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(each) for each in messages],
                tokenize=False,
                add_generation_prompt=generation_prompt,
                chat_template=template,
                **(options or {}),
            )
        except Exception as error:  # templates are programs, and raise any kind of error
            raise ApiError(400, f"messages: refused by the chat template: {error}", "messages") from error
        return text
