"""Searches over HTTP: `/v1/search`, and code for other routes that search."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Annotated, Any, Final

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from tts_search.engine.engine import Search
from tts_search.errors import ConfigError, SearchError
from tts_search.search.config import METHODS, SearchConfig
from tts_search.search.result import SearchResult
from tts_search.search.types import Messages
from tts_search.search.voting import VOTES
from tts_search.serve.errors import ApiError
from tts_search.serve.guards import refusal, while_wanted
from tts_search.serve.results import best_node, node_as_dict, result_as_dict
from tts_search.serve.schemas import ApiRequest, Conversation, Text, fresh_seed
from tts_search.serve.service import Served, Service
from tts_search.serve.streams import event, new_id, streamed

__all__ = ["config_of_request", "found", "problem_of", "routes", "split_name", "usage_of", "vote_of"]

routes = APIRouter()
_FIELDS: Final = frozenset(one.name for one in fields(SearchConfig))
_SIZES: Final = {"max_steps": 4096, "lookahead": 64, "expand": 4096}  # the largest values that a request may set
_CONFIG: Final = TypeAdapter(SearchConfig)
_DEFAULT: Final = SearchConfig()


class Budget(BaseModel):
    """A limit on the cost of a search: sampled tokens, or floating-point operations of both models."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    tokens: int | None = Field(default=None, ge=1, lt=1 << 53)
    flops: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.tokens is None) == (self.flops is None):
            raise ValueError("expected either tokens or flops")
        return self

    def in_tokens(self, service: Service) -> int:
        """The limit as a number of sampled tokens."""
        if self.tokens is not None:
            return self.tokens
        assert self.flops is not None
        shapes = [
            getattr(getattr(model, "decoder", None), "shape", None) for model in (service.policy, service.verifier)
        ]
        if shapes[0] is None:
            raise ApiError(501, "budget: the policy of this server is no local model: it counts no flops", "budget")
        each = sum(shape.flops(1, shape.max_length, 1) for shape in shapes if shape is not None)
        return max(1, int(self.flops / each))


class SearchRequest(ApiRequest):
    """A problem, or a conversation, and the fields of a :class:`~tts_search.SearchConfig`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, hide_input_in_errors=True)

    problem: Text | None = None
    messages: Conversation | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    vote: Annotated[str, StringConstraints(max_length=64)] | None = None
    tree: bool = False
    stream: bool = False


_BUDGET: Final = TypeAdapter(Budget)


@routes.post("/v1/search")
async def search(body: SearchRequest, service: Served, request: HttpRequest) -> Response:
    """Search a problem. Return the result; with `stream`, first send the events as they happen."""
    base, named = split_name(service, body.model)
    service.check_model(base)
    if (body.problem is None) == (body.messages is None):
        raise ApiError(400, "problem: expected either problem or messages", "problem")
    problem = problem_of(body.messages) if body.problem is None else body.problem
    config = config_of_request(service, {**named, **(body.model_extra or {}), "seed": fresh_seed(body.seed)})
    vote = vote_of(service, body.vote)
    timeout_s = service.settings.timeout_s
    if body.stream:
        return streamed(_told(service, problem, config, vote), timeout_s, error_name="error")
    result = await while_wanted(request, found(service, problem, config), timeout_s)
    return JSONResponse(await _answer(service, result, vote, tree=body.tree))


def problem_of(messages: Sequence[Any] | None) -> Messages:
    """A conversation in the engine's form."""
    return [{"role": each.role, "content": each.content} for each in messages or ()]


def split_name(service: Service, name: str | None) -> tuple[str | None, dict[str, Any]]:
    """Split a name such as ``policy@beam_search-16`` into the model's name and the fields of the search."""
    if name is None or "@" not in name or name in service.settings.names:
        return name, {}
    base, _, rest = name.rpartition("@")
    method, _, size = rest.rpartition("-")
    if method not in METHODS or not (size.isascii() and size.isdigit() and len(size) < 6):
        raise ApiError(404, "model: expected NAME@METHOD-N, as in policy@beam_search-16", "model")
    return base, {"method": method, "n": int(size)}


def config_of_request(service: Service, values: Mapping[str, Any]) -> SearchConfig:
    """A config with these fields.

    Raises
    ------
    ApiError
        If a field does not exist, or has an invalid value. Only built-in methods are allowed: a request cannot name
        code.
    """
    values = _within_budget(service, values)
    if unknown := sorted(set(values) - _FIELDS):
        raise ApiError(400, f"{unknown[0]:.80}: expected a field of SearchConfig", unknown[0][:80])
    if values.get("method", METHODS[1]) not in METHODS:
        raise ApiError(400, f"method: expected one of {', '.join(METHODS)}", "method")
    for name, most in {**_SIZES, "n": service.settings.max_n}.items():
        if isinstance(values.get(name), int) and values[name] > most:
            raise ApiError(400, f"{name}: expected at most {most}, got {values[name]:.3g}", name)
    try:
        return _CONFIG.validate_python(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{place}: {message}" if place else message, place or message.partition(":")[0]) from None
    except ConfigError as error:
        raise ApiError(400, error.message, error.message.partition(":")[0]) from None


def _within_budget(service: Service, values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the `budget` of a search by limits of its own fields.

    Tokens are sampled tokens. FLOPs are converted to tokens by the largest cost of a token in both models, with a full
    context, so the search costs less than the limit. Best-of-N samples everything at once, so the limit bounds its n.
    """
    own = {name: value for name, value in values.items() if name != "budget"}
    if (budget := values.get("budget")) is None:
        return own
    try:
        tokens = _BUDGET.validate_python(budget).in_tokens(service)
    except ValidationError as error:
        raise ApiError(400, f"budget: {error.errors(include_url=False)[0]['msg']}", "budget") from None
    if own.get("method", "best_of_n") != "best_of_n":
        return {**own, "budget_tokens": tokens}
    each = next((own[name] for name in ("max_tokens", "max_step_tokens") if own.get(name)), _DEFAULT.max_step_tokens)
    if not isinstance(each, int) or tokens < each:
        raise ApiError(
            400, f"budget: expected room for a completion of max_tokens={each}, got {tokens} tokens", "budget"
        )
    size = own.get("n", service.settings.max_n)
    return {**own, "n": min(size, tokens // each) if isinstance(size, int) else size}


def vote_of(service: Service, vote: str | None) -> str:
    """The vote that elects the answer."""
    scored = service.verifier is not None
    vote = vote or ("prm_max" if scored else "majority")
    if vote not in VOTES or not (scored or vote == "majority"):
        raise ApiError(400, f"vote: expected one of {', '.join(VOTES if scored else ['majority'])}", "vote")
    return vote


async def found(service: Service, problem: str | Messages, config: SearchConfig) -> SearchResult:
    """Return the engine's result. If the caller is cancelled while it waits, the search is cancelled.

    Raises
    ------
    ApiError
        If it fails.
    """
    running = _submitted(service, problem, config)
    try:
        result = await running
    except SearchError as error:
        raise refusal(error) from error
    finally:
        service.metrics.waited([running])
    _count(service, result)
    return result


def _submitted(service: Service, problem: str | Messages, config: SearchConfig) -> Search:
    try:
        return service.engine.submit(problem, config)
    except SearchError as error:
        raise refusal(error) from error


def _count(service: Service, result: SearchResult) -> None:
    metrics, stats = service.metrics, result.stats
    metrics.searches.inc()
    metrics.generation_tokens.inc(stats.policy_tokens)
    metrics.prompt_tokens.inc(stats.policy_prefill_tokens)
    metrics.verifier_tokens.inc(stats.verifier_tokens)
    metrics.unique_kv_tokens.inc(stats.peak_unique_kv_tokens)
    metrics.logical_kv_tokens.inc(stats.peak_logical_kv_tokens)
    metrics.finished("stop" if result.best.finished else "length")


async def _told(
    service: Service, problem: str | Messages, config: SearchConfig, vote: str
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a search, then its result."""
    running = _submitted(service, problem, config)
    try:
        async for happened in running:
            nodes = [node_as_dict(node) for node in happened.nodes]
            usage = asdict(happened.usage)
            yield event({"round": happened.round, "nodes": nodes, "usage": usage}, happened.kind)
        try:
            result = await running
        except SearchError as error:
            raise refusal(error) from error
        _count(service, result)
        yield event(await _answer(service, result, vote, tree=True), "result")
    finally:
        service.metrics.waited([running])
        running.cancel()


async def _answer(service: Service, result: SearchResult, vote: str, *, tree: bool) -> dict[str, Any]:
    """The answer for a result. Votes compare answers, which may take some time."""
    data = await asyncio.to_thread(result_as_dict, result, vote, tree=tree)
    return {
        "id": new_id("search"),
        "object": "search",
        "model": service.name,
        "seed": result.config.seed,
        "finish_reason": "stop" if result.best.finished else "length",
        "best_node": best_node(result),
        **data,
        "usage": usage_of(result),
    }


def usage_of(result: SearchResult) -> dict[str, Any]:
    """The cost of a search in both models, as clients count it."""
    stats = result.stats
    return {
        "prompt_tokens": stats.policy_prefill_tokens,
        "completion_tokens": stats.policy_tokens,
        "total_tokens": stats.policy_prefill_tokens + stats.policy_tokens,
        "verifier_tokens": stats.verifier_tokens,
    }
