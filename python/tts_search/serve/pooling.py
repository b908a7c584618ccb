"""The verifier as a process reward model over HTTP: `/pooling` and `/score`, as vLLM speaks them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import AliasChoices, Field, model_validator

from tts_search.serve.errors import ApiError
from tts_search.serve.generation import Answers, Prompt
from tts_search.serve.guards import while_wanted
from tts_search.serve.schemas import ApiRequest, Conversation, SamplingRequest, Text, TokenIds
from tts_search.serve.service import Served, Service
from tts_search.serve.solutions import (
    ScoredSolutions,
    Solution,
    read_all,
    scores_tokens,
    solution_of_input,
    solution_of_messages,
    solution_of_pair,
)
from tts_search.serve.streams import new_id, now
from tts_search.serve.texts import Texts

__all__ = ["routes"]

routes = APIRouter()
OneOrMoreTexts = Text | Annotated[list[Text], Field(min_length=1, max_length=4096)]


class Pooling(ApiRequest):
    """One or several solutions whose steps are scored. Without a format of steps: any texts.

    If there is a format, it decides how a text becomes tokens. Otherwise `add_special_tokens` does, and for messages
    also the other two options.
    """

    messages: Conversation | Annotated[list[Conversation], Field(min_length=1, max_length=4096)] | None = None
    input: (
        Text
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=4096)]
        | Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(min_length=1, max_length=4096)]
        | None
    ) = None
    task: Literal["token_classify"] = "token_classify"
    encoding_format: Literal["float"] = "float"
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Pooling:
        if (self.messages is None) == (self.input is None):
            raise ValueError("expected messages or input, one of both")
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("add_generation_prompt: expected false with continue_final_message")
        return self


class Scoring(ApiRequest):
    """Problems and solutions to score as a whole."""

    queries: OneOrMoreTexts = Field(validation_alias=AliasChoices("queries", "query", "text_1", "data_1"))
    documents: OneOrMoreTexts = Field(validation_alias=AliasChoices("documents", "items", "text_2", "data_2"))
    aggregate: Literal["last", "min", "prod", "mean", "max", "sum"] = "last"


class GenerativeScoring(ApiRequest):
    """A query, items, and the label tokens by which the policy scores each item."""

    query: Text | TokenIds
    items: OneOrMoreTexts | Annotated[list[TokenIds], Field(min_length=1, max_length=4096)]
    label_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=128)]
    apply_softmax: bool = True
    item_first: bool = False


@routes.post("/pooling")
@routes.post("/v1/pooling")
async def pooling(body: Pooling, service: Served, request: HttpRequest) -> dict[str, Any]:
    """Score the steps of solutions. For each step or token: the scores of the bad class and of the good class."""
    service.check_model(body.model, service.settings.verifier_names)
    solutions = _solutions(service, body)
    reading = await while_wanted(request, read_all(service, solutions), service.settings.timeout_s)
    data = [
        {"index": index, "object": "pooling", "data": [_both_classes(service, score) for score in one.step_scores]}
        for index, one in enumerate(reading.completions)
    ]
    return _reply(service, "pool", data, reading)


def _solutions(service: Service, body: Pooling) -> list[Solution]:
    if body.messages is not None:
        conversations: Any = body.messages if isinstance(body.messages[0], list) else [body.messages]
        if scores_tokens(service):
            return [solution_of_input(service, _tokens_of(service, each, body)) for each in conversations]
        return [solution_of_messages(service, each) for each in conversations]
    given: Any = body.input
    texts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    if scores_tokens(service):
        texts = [_tokens_of(service, each, body) if isinstance(each, str) else each for each in texts]
    return [solution_of_input(service, each) for each in texts]


def _tokens_of(service: Service, given: Any, body: Pooling) -> list[int]:
    """The tokens of a text or a conversation for a verifier that scores all of them."""
    texts = service.texts_of(service.settings.verifier_names[0])
    special = body.add_special_tokens
    if isinstance(given, str):
        tokens = texts.encode(given, special=special is not False)
    else:
        tokens = texts.prompt(
            [each.model_dump() for each in given],
            generation_prompt=body.add_generation_prompt,
            continue_final=body.continue_final_message,
            special=special,
        )
    if not tokens:
        raise ApiError(400, "input: expected a text of at least one token, got an empty one", "input")
    return tokens


@routes.post("/score")
@routes.post("/v1/score")
async def score(body: Scoring, service: Served, request: HttpRequest) -> dict[str, Any]:
    """Score solutions: the aggregate of the scores of their steps."""
    service.check_model(body.model, service.settings.verifier_names)
    solutions = [solution_of_pair(service, *pair) for pair in _pairs(body.queries, body.documents)]
    reading = await while_wanted(request, read_all(service, solutions, body.aggregate), service.settings.timeout_s)
    data = [{"index": index, "object": "score", "score": one.score} for index, one in enumerate(reading.completions)]
    return _reply(service, "score", data, reading)


@routes.post("/generative_scoring")
@routes.post("/v1/generative_scoring")
async def generative_scoring(body: GenerativeScoring, service: Served, request: HttpRequest) -> dict[str, Any]:
    """Score each item by the probability that the policy continues the query and the item with the first label."""
    service.check_model(body.model)
    texts = service.texts
    items: Sequence[str | list[int]] = [body.items] if isinstance(body.items, str) else body.items
    pieces = [[_ids(texts, part) for part in (body.query, item)] for item in items]
    prompts = [Prompt([*second, *first] if body.item_first else [*first, *second]) for first, second in pieces]
    texts.check(body.label_token_ids)
    sampling = SamplingRequest(temperature=0.0, seed=0, logprob_token_ids=body.label_token_ids)
    answers = Answers(service, sampling, prompts, max_tokens=1, logprobs=0)
    parts = await while_wanted(request, answers.whole(), service.settings.timeout_s)
    scores = [_label_score([value for _, value in part.top[0]], normalised=body.apply_softmax) for part in parts]
    return {
        "id": new_id("generative-scoring"),
        "object": "list",
        "created": now(),
        "model": service.name,
        "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
        "usage": answers.usage(),
    }


def _ids(texts: Texts, part: str | list[int]) -> list[int]:
    if isinstance(part, str):
        return texts.encode(part, special=False)
    texts.check(part)
    return part


def _label_score(logprobs: Sequence[float], *, normalised: bool) -> float:
    """The first label's probability: among the labels, or among all tokens."""
    if not normalised:
        return math.exp(logprobs[0])
    highest = max(logprobs)
    weights = [math.exp(value - highest) for value in logprobs] if highest > -math.inf else [1.0] * len(logprobs)
    return weights[0] / sum(weights)


def _both_classes(service: Service, score: float) -> list[float]:
    """A probability as vLLM's scores of two classes, the good class last. Any other score stays a single number.

    A token has one number for each class of the head.
    """
    entry = getattr(service.verifier, "format", None)
    if entry is not None and entry.score_at == "token" and entry.head == "scalar":
        return [score]
    is_probability = entry is not None and entry.head != "log_ratio" and entry.activation == "sigmoid"
    return [1.0 - score, score] if is_probability else [score]


def _pairs(queries: str | list[str], documents: str | list[str]) -> list[tuple[str, str]]:
    """Pairs of a query and a document: one query for each document, or one for all."""
    first = [queries] if isinstance(queries, str) else queries
    second = [documents] if isinstance(documents, str) else documents
    if len(first) not in (1, len(second)):
        raise ApiError(400, f"queries: expected 1 or {len(second)}, as many as documents, got {len(first)}", "queries")
    return list(zip(first * (len(second) if len(first) == 1 else 1), second, strict=True))


def _reply(service: Service, kind: str, data: list[dict[str, Any]], reading: ScoredSolutions) -> dict[str, Any]:
    tokens = reading.tokens + reading.cached_tokens
    return {
        "id": new_id(kind),
        "object": "list",
        "created": now(),
        "model": service.settings.verifier_names[0],
        "data": data,
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": reading.cached_tokens},
        },
    }
