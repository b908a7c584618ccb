"""Answers to prompts, as the engine generates them: the answers to one prompt are branches that share it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tts_search.engine.engine import Generation, together
from tts_search.errors import SearchError
from tts_search.search.protocol import Generate, Generated, GenerateParams
from tts_search.search.seeds import Seeds
from tts_search.serve.errors import ApiError
from tts_search.serve.guards import refusal
from tts_search.serve.schemas import SamplingRequest, fresh_seed
from tts_search.serve.service import Service
from tts_search.serve.texts import Texts

__all__ = ["LEAST", "Answers", "Prompt", "finish_reason", "stop_reason", "told", "told_of_prompt"]

LEAST: Final = -9999.0  # what is told of a token that cannot be drawn: JSON has no infinity


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to go on behind, and the text that seeds the draws with the request's seed."""

    tokens: list[int]
    seed_text: str | None = None


class Answers:
    """The answers to a request's prompts: `n` to the first one, then to the second, and so on.

    Parameters
    ----------
    service : Service
        Who answers.
    sampling : SamplingRequest
        How.
    prompts : sequence of Prompt
        To what.
    max_tokens : int or None
        Tokens of an answer; None: as many as there is room for.
    logprobs : int or None
        How many of the likeliest tokens to tell in the place of each; None: no log-probabilities at all.
    prompt_logprobs : int or None
        The same of the prompts' tokens; None: as `sampling` says.

    Attributes
    ----------
    seed : int
        The request's, or one that was drawn for it.
    num_tokens : int
        Tokens of the answers so far.

    Raises
    ------
    ApiError
        If a prompt is empty or too long, or there are too many answers.
    """

    def __init__(
        self,
        service: Service,
        sampling: SamplingRequest,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> None:
        most = service.settings.max_n
        if len(prompts) * sampling.n > most:
            raise ApiError(400, f"n: expected at most {most} answers in all, got {len(prompts) * sampling.n}", "n")
        for prompt in prompts:
            _check_length(prompt, service.texts.max_length)
        self.seed = fresh_seed(sampling.seed)
        self.num_tokens = 0
        self._cached = [0] * len(prompts)
        self._service = service
        self._sampling = sampling
        self._prompts = prompts
        self._params = GenerateParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=max(0, sampling.top_k),
            min_p=sampling.min_p,
            max_tokens=max_tokens,
            stop=tuple(sampling.stop),
            stop_ids=tuple(sampling.stop_token_ids),
            min_tokens=sampling.min_tokens,
            logprobs_of=tuple(sampling.logprob_token_ids) if logprobs is not None else (),
            prompt_logprobs=sampling.prompt_logprobs if prompt_logprobs is None else prompt_logprobs,
            ignore_eos=sampling.ignore_eos,
            keep_stop=sampling.include_stop_str_in_output,
            logprobs=logprobs,
            stream=sampling.stream,
        )

    def prompt_of(self, index: int) -> Prompt:
        """The prompt that an answer answers."""
        return self._prompts[index // self._sampling.n]

    async def parts(self) -> AsyncGenerator[list[Generated], None]:
        """Yield what has come, one part of an answer, `sample` being its number. Closing it frees what is on its way.

        Who reads slower than the model writes gets fewer and longer parts.

        Raises
        ------
        ApiError
            If the engine fails.
        """
        metrics, begun = self._service.metrics, time.monotonic()
        last: float | None = None
        metrics.width.observe(self._sampling.n)
        metrics.prompt_tokens.inc(sum(len(prompt.tokens) for prompt in self._prompts))
        running = self._begin()
        try:
            async for news in together(running):
                now = time.monotonic()
                if self._params.stream:
                    (metrics.first_token if last is None else metrics.between_tokens).observe(now - (last or begun))
                last = now
                parts = [self._part(number, own) for (number, _), own in _by_sample(news).items()]
                num_tokens = sum(len(part.tokens) for part in parts)
                self.num_tokens += num_tokens
                metrics.generation_tokens.inc(num_tokens)
                yield parts
            await asyncio.gather(*running)
            metrics.queried_tokens.inc(sum(len(prompt.tokens) for prompt in self._prompts))
            metrics.cached_tokens.inc(sum(self._cached))
            metrics.whole.observe(time.monotonic() - begun)
        except SearchError as error:
            raise refusal(error) from error
        finally:
            for generation in running:
                generation.cancel()

    async def whole(self) -> list[Generated]:
        """All answers, in order; raises as `parts` does."""
        parts: list[list[Generated]] = [[] for _ in range(len(self._prompts) * self._sampling.n)]
        async for news in self.parts():
            for part in news:
                parts[part.sample].append(part)
        answers = [Generated.joined(each) for each in parts]
        n = self._sampling.n  # what is told of a prompt came with the first answer to it
        return [replace(one, prompt=answers[index // n * n].prompt) for index, one in enumerate(answers)]

    def usage(self) -> dict[str, Any]:
        """What the request cost, as clients count it: a prompt counts once, however many answers it has."""
        prompt = sum(len(each.tokens) for each in self._prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }

    def _part(self, number: int, parts: Sequence[Generated]) -> Generated:
        """Parts of a sample of a prompt as one of an answer."""
        part = Generated.joined(parts)
        if part.reason is not None:
            self._service.metrics.finished(finish_reason(part) or "")
            self._cached[number] = part.cached_tokens
        return replace(part, sample=number * self._sampling.n + part.sample) if number else part

    def _begin(self) -> list[Generation]:
        try:
            return [self._service.engine.generate(self._request(prompt)) for prompt in self._prompts]
        except SearchError as error:
            raise refusal(error) from error

    def _request(self, prompt: Prompt) -> Generate:
        text = prompt.seed_text if prompt.seed_text is not None else " ".join(map(str, prompt.tokens))
        seeds = Seeds(self.seed, text)
        numbers = range(self._sampling.n)
        return Generate(tuple(prompt.tokens), self._params, len(numbers), tuple(seeds.of((one,)) for one in numbers))


def _check_length(prompt: Prompt, room: int) -> None:
    if not prompt.tokens:
        raise ApiError(400, "prompt: expected one of at least one token, got none", "prompt")
    if len(prompt.tokens) >= room:
        length = len(prompt.tokens)
        raise ApiError(400, f"prompt: expected fewer than {room} tokens, the model's context, got {length}", "prompt")


def _by_sample(news: Iterable[tuple[int, Generated]]) -> dict[tuple[int, int], list[Generated]]:
    """Parts by the number of their prompt and of their sample."""
    found: dict[tuple[int, int], list[Generated]] = {}
    for number, part in news:
        found.setdefault((number, part.sample), []).append(part)
    return found


def finish_reason(part: Generated) -> str | None:
    """Why an answer has ended, as OpenAI says it; None while it goes on."""
    return "stop" if part.reason == "eos" else part.reason


def stop_reason(part: Generated) -> str | int | None:
    """The text or the token that ended an answer; None where it ended by itself or at its limit."""
    return part.stop if part.reason == "stop" else None


def told(texts: Texts, part: Generated) -> list[dict[str, Any]]:
    """The tokens of a part and their log-probabilities as chats tell them."""
    tops = part.top or ((),) * len(part.tokens)
    return [
        {**_token(texts, token, logprob), "top_logprobs": [_token(texts, *other) for other in top]}
        for token, logprob, top in zip(part.tokens, part.logprobs, tops, strict=True)
    ]


def told_of_prompt(texts: Texts, tokens: Sequence[int], part: Generated) -> list[dict[str, Any] | None] | None:
    """The log-probabilities of a prompt's tokens as vLLM tells them, of the first one nothing; None without any."""
    if not part.prompt:
        return None
    places: list[dict[str, Any] | None] = [None]
    for token, (logprob, top) in zip(tokens[1:], part.prompt, strict=True):
        ranks = {other: rank for rank, (other, _) in enumerate(top, 1)}
        places.append(
            {
                str(other): {
                    "logprob": max(value, LEAST),
                    "rank": ranks.get(other),
                    "decoded_token": texts.decode([other], skip_special=False),
                }
                for other, value in {**dict(top), token: logprob}.items()
            }
        )
    return places


def _token(texts: Texts, token: int, logprob: float) -> dict[str, Any]:
    text = texts.decode([token], skip_special=False)
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(text.encode())}
