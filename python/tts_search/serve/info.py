"""Information about the server, its models and its tokenizer."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field

from tts_search.serve.errors import ApiError
from tts_search.serve.schemas import ApiRequest, Conversation, Text, TokenIds
from tts_search.serve.service import Served, Service

__all__ = ["open_routes", "routes"]

open_routes = APIRouter()  # without a key
routes = APIRouter()
_STARTED = int(time.time())


@open_routes.get("/health")
@open_routes.get("/ping")
async def health(service: Served) -> Response:
    """Whether the engine works: an empty 200 or 503."""
    return Response(status_code=200 if service.engine.is_open else 503)


@open_routes.get("/version")
async def version_() -> dict[str, str]:
    """The version of the server."""
    return {"version": version("tts-kernels")}


@routes.get("/metrics")
async def metrics(service: Served) -> Response:
    """The counters, for Prometheus."""
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


@routes.get("/v1/models")
async def models(service: Served) -> dict[str, Any]:
    """The models, and searches that can be used like models, by name."""
    return {"object": "list", "data": [_entry(service, name) for name in service.model_names]}


@routes.get("/v1/models/{name:path}")
async def model(name: str, service: Served) -> dict[str, Any]:
    """One of the models."""
    if name not in service.model_names:
        raise ApiError(404, f"model: expected one of {', '.join(service.model_names)}, got {name:.80}", "model")
    return _entry(service, name)


def _entry(service: Service, name: str) -> dict[str, Any]:
    root = name.partition("@")[0]
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "tts_search",
        "root": root,
        "parent": root if root != name else None,
        "max_model_len": service.max_length(root),
        "permission": [],
    }


class Tokenize(ApiRequest):
    """A text or a conversation to encode."""

    prompt: Text | None = None
    messages: Conversation | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False


class Detokenize(ApiRequest):
    """Tokens to decode."""

    tokens: TokenIds = Field(max_length=1 << 20)


@routes.post("/tokenize")
async def tokenize(body: Tokenize, service: Served) -> dict[str, Any]:
    """The tokens of a text, or of a conversation."""
    texts = service.texts_of(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: expected either prompt or messages", "prompt")
    if body.messages is None:
        tokens = texts.encode(body.prompt or "", special=body.add_special_tokens is not False)
    else:
        tokens = texts.prompt(
            [each.model_dump(exclude_none=True) for each in body.messages],
            generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final=body.continue_final_message,
            special=body.add_special_tokens,
        )
    names = texts.names(tokens) if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": texts.max_length, "tokens": tokens, "token_strs": names}


@routes.post("/detokenize")
async def detokenize(body: Detokenize, service: Served) -> dict[str, str]:
    """The text of tokens."""
    return {"prompt": service.texts_of(body.model).decode(body.tokens, skip_special=False)}
