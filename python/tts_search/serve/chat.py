"""`/v1/chat/completions`: an answer, several, or the best that a search finds, in OpenAI's form."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from tts_search.search.protocol import Generated
from tts_search.serve.errors import ApiError
from tts_search.serve.generation import Answers, Prompt, finish_reason, stop_reason, told, told_of_prompt
from tts_search.serve.guards import while_wanted
from tts_search.serve.schemas import Chat
from tts_search.serve.searched import chat_of_search, search_asked_for
from tts_search.serve.searching import split_name
from tts_search.serve.service import Served, Service
from tts_search.serve.streams import event, new_id, now, streamed

__all__ = ["routes"]

routes = APIRouter()
_RESERVED: Final = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "return_dict",
    "tokenize",
}


@routes.post("/v1/chat/completions")
async def chat(
    body: Chat,
    service: Served,
    request: HttpRequest,
    x_its_budget: Annotated[int | None, Header(ge=1, le=1000)] = None,
) -> Response:
    """Answer or continue a conversation."""
    base, named = split_name(service, body.model)
    service.check_model(base)
    if (wanted := search_asked_for(body.search, named, x_its_budget or body.budget)) is not None:
        return await chat_of_search(service, request, body, wanted)
    answers = Answers(
        service,
        body,
        [Prompt(_prompt(service, body), _seed_text(body))],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=body.top_logprobs if body.logprobs else None,
    )
    timeout_s = service.settings.timeout_s
    if body.stream:
        return streamed(_chunks(service, body, answers), timeout_s)
    parts = await while_wanted(request, answers.whole(), timeout_s)
    return JSONResponse(
        {
            **_head(service, body, answers, "chat.completion"),
            "choices": [_choice(service, body, part) for part in parts],
            "usage": answers.usage(),
            "prompt_token_ids": answers.prompt_of(0).tokens if body.return_token_ids else None,
            "prompt_logprobs": told_of_prompt(service.texts, answers.prompt_of(0).tokens, parts[0]),
        }
    )


def _continues(body: Chat) -> bool:
    """Whether the last message is to be continued. vLLM's clients set this in the request, others in the message."""
    last = body.messages[-1]
    return body.continue_final_message or (last.role == "assistant" and (last.model_extra or {}).get("prefix") is True)


def _prompt(service: Service, body: Chat) -> list[int]:
    if body.continue_final_message and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
        raise ApiError(
            400, "continue_final_message: expected add_generation_prompt to be false", "add_generation_prompt"
        )
    if body.chat_template is not None and not service.settings.allow_chat_template:
        raise ApiError(400, "chat_template: this server takes none from requests", "chat_template")
    options: dict[str, Any] = {**body.chat_template_kwargs, **({"tools": body.tools} if body.tools else {})}
    if reserved := {"tokenize", "chat_template", "conversation", "return_dict", "continue_final_message"} & set(
        options
    ):
        raise ApiError(400, f"chat_template_kwargs: {min(reserved)} is not one of them", "chat_template_kwargs")
    return service.texts.prompt(
        [each.model_dump(exclude_none=True) for each in body.messages],
        generation_prompt=body.add_generation_prompt and not _continues(body),
        continue_final=_continues(body),
        special=body.add_special_tokens,
        template=body.chat_template,
        options=options,
    )


def _seed_text(body: Chat) -> str | None:
    """The seed text for a single problem is the problem, as in a search. So the answers are those of best-of-N."""
    return body.messages[0].content if len(body.messages) == 1 else None


def _head(service: Service, body: Chat, answers: Answers, kind: str) -> dict[str, Any]:
    return {
        "id": new_id("chatcmpl"),
        "object": kind,
        "created": now(),
        "model": body.model or service.name,
        "seed": answers.seed,
    }


def _choice(service: Service, body: Chat, part: Generated) -> dict[str, Any]:
    return {
        "index": part.sample,
        "message": {"role": "assistant", "content": _echoed(body) + part.text},
        "logprobs": {"content": told(service.texts, part)} if body.logprobs else None,
        "finish_reason": finish_reason(part),
        "stop_reason": stop_reason(part),
        "token_ids": list(part.tokens) if body.return_token_ids else None,
    }


def _delta(service: Service, body: Chat, part: Generated) -> dict[str, Any]:
    choice = _choice(service, body, part)
    del choice["message"]
    return {**choice, "delta": {"content": part.text} if part.text else {}}


def _echoed(body: Chat) -> str:
    return body.messages[-1].content if body.echo and _continues(body) else ""


async def _chunks(service: Service, body: Chat, answers: Answers) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream."""
    head = _head(service, body, answers, "chat.completion.chunk")
    for index in range(body.n):
        delta = {"role": "assistant", "content": _echoed(body)}
        yield event({**head, "choices": [{"index": index, "delta": delta, "finish_reason": None}]})
    async for parts in answers.parts():
        yield b"".join(event({**head, "choices": [_delta(service, body, part)]}) for part in parts)
    if body.stream_options.include_usage:
        yield event({**head, "choices": [], "usage": answers.usage()})
    yield event("[DONE]")
