"""Turns problems and steps into tokens, as a format says."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from tts_search.verifiers.formats import NUMBER, PROBLEM, STEP, STEPS, VerifierFormat

__all__ = ["TOKENS", "Reader", "Tail", "TokenReader"]

TOKENS: Final = "\ue0f0tokens\ue0f1"
"""The problem's text if tokens are scored instead of steps. No other problem has this text."""

# Place holders for the steps while a chat template is rendered. No template and no problem contains them.
_MARK: Final = "\ue0f0steps\ue0f1"
_NEXT: Final = "\ue0f0next\ue0f1"
_PIECES, _SHORT = 4096, 1024  # pieces in the cache, and the longest one in characters


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a text, from a place where its tokens do not depend on the text before.

    ``token`` is the index of its first token in the whole text; ``closing`` is the text after the steps.
    """

    text: str
    token: int
    tokens: list[int]
    closing: str = ""


class Reader:
    """Encodes the text of a format step by step.

    With ``encoding="text"`` the tokens are those of the whole text. When a step is added, only the end of the text is
    encoded again: from the last special token on, where every tokenizer splits a text. The tokens that differ are read.

    Raises
    ------
    ValueError
        If the format does not fit the tokenizer's chat template, or is scored after its steps but has no text there.
    """

    def __init__(self, tokenizer: Any, entry: VerifierFormat) -> None:
        self.tokenizer = tokenizer
        self.format = entry
        self._encoded = lru_cache(_PIECES)(lambda text: tuple(self.encode(text)))
        if missing := [token for token in entry.tokens if token not in tokenizer.get_vocab()]:
            tokenizer.add_special_tokens({"additional_special_tokens": missing})
        self._front = _beginning(tokenizer, entry)
        *prompt, closing = self._template()
        self.boundary, self.separator = self._turn() if entry.reply else (entry.boundary, entry.separator)
        if entry.score_at == "closing" and not self._closing(closing, "", 1):
            raise ValueError(f"format {entry.name!r}: expected text behind {STEPS} to score at, got none")
        added = tokenizer.added_tokens_decoder
        fixed = "".join((*prompt, closing, self.boundary, self.separator))
        tag = self.boundary.strip()
        forgeable = {token.content for token in added.values() if token.special or token.content in fixed}
        forgeable |= {tag} if re.search(r"\w", tag) and not any(each in tag for each in forgeable) else set()
        longest_first = sorted(forgeable, key=len, reverse=True)
        self._forged = re.compile("|".join(map(re.escape, longest_first))) if forgeable else None
        self._number = re.compile(re.escape(entry.numbered.strip()).replace(re.escape(NUMBER), r"\d+"))
        self._cuts = frozenset(
            number for number, token in added.items() if token.special and not (token.lstrip or token.single_word)
        )

    def prompt(self, problem: str) -> tuple[list[int], Tail]:
        """The tokens before the first step."""
        problem = self._harmless(problem)
        if self.format.encoding == "pieces":
            before, between, closing = self._template()
            parts = [before, problem, between]
        else:
            before, between, closing = self._template(problem)
            parts = [before + between]
        _, tokens, tail = self._extend(Tail("", len(self._front), [], closing), parts)
        return [*self._front, *tokens], tail

    def step(self, tail: Tail, step: str, number: int) -> tuple[int, list[int], Tail]:
        """Add a step. Return how many earlier tokens stay, the tokens after these, and the new end.

        Step ``number`` counts from 1. The tokens end with the step's boundary.

        Raises
        ------
        ValueError
            If the step is empty, or has only characters without tokens.
        """
        parts = ["" if number == 1 else self.separator, self._clean(step, number), self.boundary]
        start, tokens, end = self._extend(tail, parts)
        if not tokens:
            raise ValueError(f"step {number} is empty to the tokenizer, which has no tokens for {step!r:.50}")
        return start, tokens, end

    def closing(self, tail: Tail, step: str = "", number: int = 1) -> tuple[int, list[int], Tail]:
        """The same for the text after the steps. ``step`` is the judged step, if it stands in this text."""
        if step:
            step = self._clean(step, number)
        return self._extend(tail, [self._closing(tail.closing, step, number)])

    def continued(self, tail: Tail, text: str) -> tuple[int, list[int], Tail]:
        """The same for any text that is not a user's."""
        return self._extend(tail, [text])

    def parsed(self, tokens: Sequence[int]) -> tuple[str, tuple[str, ...]]:
        """The problem and the steps of a whole text in the format, given as tokens.

        Raises
        ------
        ValueError
            If the format is not scored at boundaries, or if encoding the problem and the steps again gives other
            tokens, up to the last boundary.
        """
        name = self.format.name
        if self.format.score_at != "boundary" or not self.boundary.strip():
            raise ValueError(f"format {name!r} has no mark behind each step, so a text alone does not say its steps")
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        before, between, _ = self._template()
        problem, found, solution = text.partition(before)[2].partition(between)
        *steps, _ = solution.split(self.boundary.strip())
        if before in text and found and problem and steps:
            whole, tail = self.prompt(problem)
            for number, step in enumerate(steps, 1):
                start, new, tail = self.step(tail, step, number)
                whole[start:] = new
            if whole == list(tokens[: len(whole)]):
                return problem, tuple(steps)
        raise ValueError(f"expected a text in format {name!r}, with {self.boundary!r} behind each step")

    def encode(self, text: str) -> list[int]:
        """The tokens of a text without context."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def _piece(self, text: str) -> Sequence[int]:
        """The same for a piece, with a cache: boundaries and steps come again in each longer text."""
        return self._encoded(text) if len(text) <= _SHORT else self.encode(text)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _clean(self, step: str, number: int) -> str:
        """The text of a step as the model reads it."""
        entry = self.format
        text = step.strip() if entry.strip else step
        if entry.numbered and (found := self._number.match(text)):
            text = text[found.end() :].lstrip() or text  # a step may be nothing but a heading
        for old, new in entry.replace:
            while old in text:
                text = text.replace(old, new)
        if not text.strip():
            raise ValueError(f"step {number} is empty: {step!r:.50}")
        return self._harmless(entry.numbered.replace(NUMBER, str(number)) + text)

    def _closing(self, text: str, step: str, number: int) -> str:
        judge = self.format.judge
        if judge is None:
            return text
        none = judge.no_steps if number == 1 else ""
        return none + text + judge.question.replace(NUMBER, str(number)).replace(STEP, step)

    def _extend(self, tail: Tail, parts: Sequence[str]) -> tuple[int, list[int], Tail]:
        if self.format.encoding != "text":
            tokens = [token for part in parts if part for token in self._piece(part)]
            return tail.token, tokens, Tail("", tail.token + len(tokens), [], tail.closing)
        text = tail.text + "".join(parts)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = encoded["input_ids"]
        same = _common(tail.tokens, tokens)
        cut = next((i for i in range(len(tokens) - 1, 0, -1) if tokens[i] in self._cuts), 0)
        begin = encoded["offset_mapping"][cut][0] if cut else 0
        return tail.token + same, tokens[same:], Tail(text[begin:], tail.token + cut, tokens[cut:], tail.closing)

    def _harmless(self, text: str) -> str:
        """The text without special tokens: a space breaks up text that would be encoded as one of them."""
        return text if self._forged is None else self._forged.sub(_broken, text)

    def _template(self, problem: str | None = None) -> tuple[str, str, str]:
        """Three pieces of the prompt: before the problem, before the steps, after them.

        If ``problem`` is given, it stands between the first two. A chat template is rendered with the problem in it,
        because it may trim a message.
        """
        entry = self.format
        text = self._render(self._chat(problem or PROBLEM)) if entry.chat else entry.prompt.replace(STEPS, _MARK)
        before, found, closing = text.partition(_MARK)
        if problem is not None and entry.chat:
            present, between = problem.strip() in before, ""
        else:
            before, mark, between = before.partition(PROBLEM)
            before, present = before + (problem or ""), bool(mark)
        if not (found and present):
            raise ValueError(f"format {entry.name!r}: the chat template leaves {PROBLEM} or {STEPS} out of {text!r}")
        return before, between, closing

    def _chat(self, problem: str) -> list[tuple[str, str]]:
        return [(role, text.replace(STEPS, _MARK).replace(PROBLEM, problem)) for role, text in self.format.chat]

    def _turn(self) -> tuple[str, str]:
        """Boundary and separator of a format with a reply: the texts before and after the reply."""
        entry = self.format
        opened = self._render(self._chat(PROBLEM)).partition(_MARK)[2]
        turns = [*self._chat(PROBLEM), ("assistant", entry.reply), ("user", _NEXT)]
        whole = self._render(turns, generation_prompt=False).partition(_MARK)[2].partition(_NEXT)[0]
        if not whole.startswith(opened + entry.reply):
            raise ValueError(
                f"format {entry.name!r}: expected a chat template with {opened!r} before an answer, got {whole!r}"
            )
        return opened, whole[len(opened) :]

    def _render(self, turns: Sequence[tuple[str, str]], generation_prompt: bool | None = None) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(f"format {self.format.name!r} needs a chat template, which this tokenizer does not have")
        if generation_prompt is None:
            generation_prompt = self.format.generation_prompt and turns[-1][0] != "assistant"
        text: str = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            add_generation_prompt=generation_prompt,
            tokenize=False,
        )
        if self.format.generation_prompt or not (end := self.tokenizer.eos_token):
            return text
        return text.removesuffix("\n").removesuffix(end) if text.removesuffix("\n").endswith(end) else text


class TokenReader(Reader):
    """Takes tokens instead of steps: each step is a token, written as its id in digits. The problem is `TOKENS`."""

    def __init__(self, tokenizer: Any, entry: VerifierFormat) -> None:
        self.tokenizer = tokenizer
        self.format = entry

    def prompt(self, problem: str) -> tuple[list[int], Tail]:
        """No tokens: all tokens are steps.

        Raises
        ------
        ValueError
            If there is a problem: this reader cannot encode its steps.
        """
        if problem != TOKENS:
            raise ValueError("this verifier scores tokens: it has no format in which a problem and its steps stand")
        return [], Tail("", 0, [])

    def step(self, tail: Tail, step: str, number: int) -> tuple[int, list[int], Tail]:
        """Add a token."""
        return number - 1, [int(step)], tail

    def parsed(self, tokens: Sequence[int]) -> tuple[str, tuple[str, ...]]:
        """The tokens."""
        return TOKENS, tuple(map(str, tokens))


def _beginning(tokenizer: Any, entry: VerifierFormat) -> list[int]:
    """The special tokens before the prompt, as ids: as text they could change how the next text is encoded."""
    if entry.chat or entry.bos is False:
        return []
    if entry.bos:
        return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = tokenizer("a", return_special_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1], pairs)]


def _broken(found: re.Match[str]) -> str:
    text = found[0]
    return f"{text[0]} {text[1:]}" if len(text) > 1 else " "


def _common(old: Sequence[int], new: Sequence[int]) -> int:
    """How many leading tokens are equal, so that at least one new token is left to read."""
    limit = min(len(old), len(new) - 1)
    return next((i for i in range(limit) if old[i] != new[i]), max(limit, 0))
