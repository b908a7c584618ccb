"""`/v1/completions`: continues texts or tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from itertools import accumulate
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from tts_search.search.protocol import Generated
from tts_search.serve.errors import ApiError
from tts_search.serve.generation import LEAST, Answers, Prompt, finish_reason, stop_reason, told_of_prompt
from tts_search.serve.guards import while_wanted
from tts_search.serve.schemas import SamplingRequest, Text, TokenIds
from tts_search.serve.service import Served, Service
from tts_search.serve.streams import event, new_id, now, streamed

__all__ = ["routes"]

routes = APIRouter()
_SHORT = 16  # default number of tokens, as in OpenAI's API


class CompletionRequest(SamplingRequest):
    """One or several prompts to continue."""

    prompt: (
        Text
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(min_length=1, max_length=256)]
    )
    max_tokens: int | None = Field(default=None, ge=0, lt=1 << 31)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    add_special_tokens: bool = True


@routes.post("/v1/completions")
async def complete(body: CompletionRequest, service: Served, request: HttpRequest) -> Response:
    """Continue prompts. The answers to the first prompt come first."""
    service.check_model(body.model)
    tells_echo = body.echo and body.logprobs is not None
    if tells_echo and body.stream:
        raise ApiError(400, "echo: expected false in a stream with logprobs", "echo")
    only_prompt = body.max_tokens == 0
    if only_prompt and (body.stream or not body.echo):
        raise ApiError(400, "max_tokens: expected at least 1, or echo and no stream", "max_tokens")
    prompts = _prompts(service, body)
    answers = Answers(
        service,
        body,
        prompts,
        max_tokens=_SHORT if body.max_tokens is None else max(1, body.max_tokens),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if tells_echo and body.prompt_logprobs is None else None,
    )
    timeout_s = service.settings.timeout_s
    if body.stream:
        return streamed(_chunks(service, body, answers), timeout_s)
    parts = await while_wanted(request, answers.whole(), timeout_s)
    if only_prompt:  # the forward needs one new token, which is dropped
        parts, answers.num_tokens = [_without_answer(part) for part in parts], 0
    return JSONResponse(
        {
            **_head(service, body, answers),
            "choices": [_choice(service, body, answers, part, first=True) for part in parts],
            "usage": answers.usage(),
        }
    )


def _without_answer(part: Generated) -> Generated:
    return Generated(part.sample, "", reason="length", cached_tokens=part.cached_tokens, prompt=part.prompt)


def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """The prompts, given as texts or as tokens."""
    prompt = body.prompt
    several: Sequence[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    found = []
    for each in several:
        if isinstance(each, str):
            found.append(Prompt(service.texts.encode(each, special=body.add_special_tokens), each))
        else:
            service.texts.check(each)
            found.append(Prompt(list(each)))
    return found


def _head(service: Service, body: CompletionRequest, answers: Answers) -> dict[str, Any]:
    return {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": now(),
        "model": body.model or service.name,
        "seed": answers.seed,
    }


def _choice(
    service: Service, body: CompletionRequest, answers: Answers, part: Generated, *, first: bool, offset: int = 0
) -> dict[str, Any]:
    """A part of an answer. If the prompt is echoed, the `first` part begins with it."""
    tokens = answers.prompt_of(part.sample).tokens
    echoed = service.texts.decode(tokens) if body.echo and first else ""
    told = None
    if body.logprobs is not None:
        told = _logprobs(service, part, offset + len(echoed))
        if echoed:
            told = _echoed_logprobs(service, tokens, part, body.logprobs, told)
    return {
        "index": part.sample,
        "text": echoed + part.text,
        "logprobs": told,
        "finish_reason": finish_reason(part),
        "stop_reason": stop_reason(part),
        "token_ids": list(part.tokens) if body.return_token_ids else None,
        "prompt_token_ids": tokens if body.return_token_ids and first else None,
        "prompt_logprobs": told_of_prompt(service.texts, tokens, part) if body.prompt_logprobs is not None else None,
    }


def _logprobs(service: Service, part: Generated, offset: int) -> dict[str, Any]:
    """The log-probabilities of the tokens of a part. Its text begins at this character."""
    names = [service.texts.decode([token], skip_special=False) for token in part.tokens]
    tops = part.top or ((),) * len(part.tokens)
    return {
        "tokens": names,
        "token_logprobs": [max(value, LEAST) for value in part.logprobs],
        "top_logprobs": [
            {
                service.texts.decode([other], skip_special=False): max(value, LEAST)
                for other, value in (*top, (token, logprob))
            }
            for token, logprob, top in zip(part.tokens, part.logprobs, tops, strict=True)
        ],
        "text_offset": list(accumulate(map(len, names), initial=offset))[: len(names)],
    }


def _echoed_logprobs(
    service: Service, prompt: Sequence[int], part: Generated, most: int, new: dict[str, Any]
) -> dict[str, Any]:
    """The log-probabilities of an echoed prompt's tokens (None for the first), then of the new tokens."""
    values, tops = tuple(value for value, _ in part.prompt), tuple(top[:most] for _, top in part.prompt)
    old = _logprobs(service, Generated(part.sample, "", tuple(prompt[1:]), values, tops), 0)
    first = service.texts.decode(prompt[:1], skip_special=False)
    offsets = accumulate((len(service.texts.decode([token])) for token in prompt), initial=0)
    return {
        "tokens": [first, *old["tokens"], *new["tokens"]],
        "token_logprobs": [None, *old["token_logprobs"], *new["token_logprobs"]],
        "top_logprobs": [None, *old["top_logprobs"], *new["top_logprobs"]],
        "text_offset": [*list(offsets)[: len(prompt)], *new["text_offset"]],
    }


async def _chunks(service: Service, body: CompletionRequest, answers: Answers) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream."""
    head = _head(service, body, answers)
    told: dict[int, int] = {}  # number of characters sent of each answer
    async for parts in answers.parts():
        events = []
        for part in parts:
            first = part.sample not in told
            choice = _choice(service, body, answers, part, first=first, offset=told.get(part.sample, 0))
            told[part.sample] = told.get(part.sample, 0) + len(choice["text"])
            events.append(event({**head, "choices": [choice]}))
        yield b"".join(events)
    if body.stream_options.include_usage:
        yield event({**head, "choices": [], "usage": answers.usage()})
    yield event("[DONE]")
