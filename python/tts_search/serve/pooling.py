"""The verifier as a process reward model over HTTP: `/pooling` and `/score`, as vLLM speaks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import AliasChoices, Field

from tts_search.search.result import SearchResult
from tts_search.serve.errors import ApiError
from tts_search.serve.guards import while_wanted
from tts_search.serve.schemas import Conversation, Request, Text
from tts_search.serve.service import Served, Service
from tts_search.serve.solutions import read_all, solution_of_messages, solution_of_pair
from tts_search.serve.streams import new_id, now

__all__ = ["routes", "scores_of"]

routes = APIRouter()
Texts = Text | Annotated[list[Text], Field(min_length=1, max_length=4096)]


class Pooling(Request):
    """A solution, or several, whose steps are to be scored."""

    messages: Conversation | Annotated[list[Conversation], Field(min_length=1, max_length=4096)]
    task: Literal["token_classify"] = "token_classify"
    encoding_format: Literal["float"] = "float"


class Scoring(Request):
    """Problems and solutions that are to be scored as a whole."""

    queries: Texts = Field(validation_alias=AliasChoices("queries", "query", "text_1", "data_1"))
    documents: Texts = Field(validation_alias=AliasChoices("documents", "items", "text_2", "data_2"))
    aggregate: Literal["last", "min", "prod", "mean", "max", "sum"] = "last"


@routes.post("/pooling")
@routes.post("/v1/pooling")
async def pooling(body: Pooling, service: Served, request: HttpRequest) -> dict[str, Any]:
    """Score the steps of solutions: for each step what speaks against it and for it."""
    service.check_model(body.model, service.settings.verifier_names)
    conversations = body.messages if isinstance(body.messages[0], list) else [body.messages]
    solutions = [solution_of_messages(service, each) for each in conversations]
    results = await while_wanted(request, read_all(service, solutions), service.settings.timeout_s)
    data = [
        {"index": index, "object": "pooling", "data": [_both_classes(service, score) for score in scores_of(result)]}
        for index, result in enumerate(results)
    ]
    return _reply(service, "pool", data, results)


@routes.post("/score")
@routes.post("/v1/score")
async def score(body: Scoring, service: Served, request: HttpRequest) -> dict[str, Any]:
    """Score solutions: the aggregate of the scores of their steps."""
    service.check_model(body.model, service.settings.verifier_names)
    solutions = [solution_of_pair(service, *pair) for pair in _pairs(body.queries, body.documents)]
    results = await while_wanted(request, read_all(service, solutions, body.aggregate), service.settings.timeout_s)
    data = [
        {"index": index, "object": "score", "score": result.best.score} for index, result in enumerate(results)
    ]  # fmt: skip
    return _reply(service, "score", data, results)


def scores_of(result: SearchResult) -> Sequence[float]:
    """The scores of the steps of a solution that was read."""
    return result.best.step_scores


def _both_classes(service: Service, score: float) -> list[float]:
    """A probability as vLLM gives those of two classes, the good one last; another score alone."""
    entry = getattr(service.verifier, "format", None)
    is_probability = entry is not None and entry.head != "log_ratio" and entry.activation == "sigmoid"
    return [1.0 - score, score] if is_probability else [score]


def _pairs(queries: str | list[str], documents: str | list[str]) -> list[tuple[str, str]]:
    """One query for each document, or one for all."""
    first = [queries] if isinstance(queries, str) else queries
    second = [documents] if isinstance(documents, str) else documents
    if len(first) not in (1, len(second)):
        raise ApiError(400, f"queries: expected 1 or {len(second)}, as many as documents, got {len(first)}", "queries")
    return list(zip(first * (len(second) if len(first) == 1 else 1), second, strict=True))


def _reply(service: Service, kind: str, data: list[dict[str, Any]], results: Sequence[SearchResult]) -> dict[str, Any]:
    tokens = sum(result.stats.verifier_tokens for result in results)
    return {
        "id": new_id(kind),
        "object": "list",
        "created": now(),
        "model": service.settings.verifier_names[0],
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }
