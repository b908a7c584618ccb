"""Searches that are requested as chats: by `search` in the body, by a model's name, or by its_hub's budget."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from tts_search.search.result import SearchResult
from tts_search.search.types import Completion, Messages
from tts_search.serve.errors import ApiError
from tts_search.serve.guards import while_wanted
from tts_search.serve.results import finite
from tts_search.serve.schemas import Chat, fresh_seed
from tts_search.serve.searching import config_of_request, found, problem_of, usage_of, vote_of
from tts_search.serve.service import Service
from tts_search.serve.streams import event, new_id, now, streamed

__all__ = ["chat_of_search", "search_asked_for"]


def search_asked_for(
    search: Mapping[str, Any] | None, named: Mapping[str, Any], budget: int | None
) -> dict[str, Any] | None:
    """The fields of the search that a chat asks for; None if it asks for none. A budget is that of best-of-N."""
    if search is None and not named and budget is None:
        return None
    by_budget = {} if budget is None else {"method": "best_of_n", "n": budget}
    return {**by_budget, **named, **(search or {})}


async def chat_of_search(service: Service, request: HttpRequest, body: Chat, fields: Mapping[str, Any]) -> Response:
    """Answer a conversation by a search: with the best completion, or with the `n` best ones."""
    if body.continue_final_message or body.stop or body.stop_token_ids or body.logprobs:
        raise ApiError(400, "search: expected no stop, no logprobs and no continue_final_message beside it", "search")
    own = {name: value for name, value in fields.items() if name not in ("vote", "tree")}
    config = config_of_request(service, {**_sampling(body), "seed": fresh_seed(body.seed), **own})
    if body.n > config.n:
        raise ApiError(400, f"n: expected at most {config.n} of the search's answers, got {body.n}", "n")
    asked = _Asked(body, vote_of(service, fields.get("vote")), bool(fields.get("tree")))
    work = found(service, _problem(body), config)
    timeout_s = service.settings.timeout_s
    if body.stream:
        return streamed(_chunks(service, asked, work), timeout_s)
    result = await while_wanted(request, work, timeout_s)
    return JSONResponse(await asyncio.to_thread(_reply, service, asked, result))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A chat that asks for a search, the vote that elects its answer, and whether the tree is returned."""

    body: Chat
    vote: str
    tree: bool


def _sampling(body: Chat) -> dict[str, Any]:
    """The sampling parameters that a chat sets."""
    said: dict[str, Any] = {
        name: getattr(body, name) for name in ("temperature", "top_p", "top_k") if name in body.model_fields_set
    }
    limit = body.max_completion_tokens or body.max_tokens
    return {**said, **({} if limit is None else {"max_tokens": limit})}


def _problem(body: Chat) -> str | Messages:
    """The problem for the engine. A single message becomes a text, so that the search is that of the text."""
    return body.messages[0].content if len(body.messages) == 1 else problem_of(body.messages)


def _elected(result: SearchResult, vote: str) -> tuple[list[Completion], str]:
    """The completions, the elected one first and then the best ones, and the elected answer."""
    answer = result.answer(vote)
    first = result.best
    if vote != "prm_max":
        first = next((one for one in result.completions if answer and one.answer == answer), first)
    others = [one for one in result.completions if one is not first]
    scored = not math.isnan(result.best.score)
    return [first, *(sorted(others, key=lambda one: -one.score) if scored else others)], answer


def _reply(service: Service, asked: _Asked, result: SearchResult) -> dict[str, Any]:
    body = asked.body
    completions, answer = _elected(result, asked.vote)
    reply = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": now(),
        "model": body.model or service.name,
        "seed": result.config.seed,
        "choices": [_choice(index, one) for index, one in enumerate(completions[: body.n])],
        "usage": usage_of(result),
        "search": {"answer": answer, "vote": asked.vote, **_told(result, asked)},
    }
    if not body.return_response_only:
        reply["metadata"] = _metadata(result, completions[0])
    return reply


def _choice(index: int, one: Completion) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": one.text},
        "logprobs": None,
        "finish_reason": "stop" if one.finished else "length",
        "stop_reason": None,
        "score": finite(one.score),
        "step_scores": finite(one.step_scores),
    }


def _told(result: SearchResult, asked: _Asked) -> dict[str, Any]:
    told = {
        "completions": [{"answer": one.answer, "score": one.score} for one in result.completions],
        "config": result.config.as_dict(),
        "stats": asdict(result.stats),
    }
    if asked.tree:
        told["tree"] = json.loads(result.tree.to_json())
    plain: dict[str, Any] = finite(told)
    return plain


def _metadata(result: SearchResult, chosen: Completion) -> dict[str, Any]:
    """The additional data that its_hub's gateway returns."""
    scored = not math.isnan(result.best.score)
    return {
        "algorithm": "best-of-n" if scored else "self-consistency",
        "all_responses": [{"role": "assistant", "content": one.text} for one in result.completions],
        "response_counts": dict(Counter(one.answer for one in result.completions)),
        "selected_index": next(i for i, one in enumerate(result.completions) if one is chosen),
    }


async def _chunks(
    service: Service, asked: _Asked, work: Coroutine[Any, Any, SearchResult]
) -> AsyncGenerator[bytes, None]:
    """Yield the answer as a stream. All of the text comes at the end."""
    reply = await asyncio.to_thread(_reply, service, asked, await work)
    head = {name: reply[name] for name in ("id", "created", "model", "seed")} | {"object": "chat.completion.chunk"}
    for choice in reply["choices"]:
        ended = {name: value for name, value in choice.items() if name != "message"}
        yield event(
            {**head, "choices": [{"index": choice["index"], "delta": choice["message"], "finish_reason": None}]}
        )
        yield event({**head, "choices": [{**ended, "delta": {}}]})
    if asked.body.stream_options.include_usage:
        yield event({**head, "choices": [], "usage": reply["usage"]})
    yield event("[DONE]")
