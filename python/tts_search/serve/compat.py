"""Routes of other frameworks' workers: FastChat's, which compute-optimal-tts and OpenR use, and SGLang's."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import Field

from tts_search.search.protocol import Generated
from tts_search.serve.errors import ApiError
from tts_search.serve.generation import Answers, Prompt, finish_reason, stop_reason
from tts_search.serve.guards import while_wanted
from tts_search.serve.schemas import ApiRequest, Conversation, SamplingRequest, Text, TokenIds
from tts_search.serve.service import Served, Service
from tts_search.serve.solutions import (
    Solution,
    read_all,
    solution_of_messages,
    solution_of_pair,
    solution_of_text,
)

__all__ = ["routes"]

routes = APIRouter()
_ANY = 4096  # the largest number of entries in a list


class WorkerGenerate(SamplingRequest):
    """A prompt, in the format of FastChat's workers."""

    prompt: Text
    max_new_tokens: int = Field(default=256, ge=1, lt=1 << 31)
    echo: bool = False
    logprobs: None = None


class Given(SamplingRequest):
    """Sampling parameters of SGLang's `/generate`."""

    max_new_tokens: int = Field(default=128, ge=1, lt=1 << 31)
    no_stop_trim: bool = False


class Generating(ApiRequest):
    """One or several prompts for SGLang's `/generate`."""

    text: Text | Annotated[list[Text], Field(min_length=1, max_length=256)] | None = None
    input_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    sampling_params: Given = Given()
    return_logprob: bool = False
    stream: bool = False


class WorkerReward(ApiRequest):
    """One or several solutions to score: texts, pairs of problem and solution, or conversations."""

    input_str: (
        Text
        | Annotated[
            list[Text | Annotated[list[Text], Field(min_length=2, max_length=2)] | Conversation],
            Field(min_length=1, max_length=_ANY),
        ]
    )


@routes.post("/worker_generate")
async def worker_generate(body: WorkerGenerate, service: Served, request: HttpRequest) -> dict[str, Any]:
    """Continue a prompt. Texts, lengths and log-probabilities of the answers are in separate lists."""
    tokens = service.texts.encode(body.prompt, special=True)
    answers = Answers(
        service, body.model_copy(update={"stream": False}), [Prompt(tokens, body.prompt)],
        max_tokens=body.max_new_tokens, logprobs=0,
    )  # fmt: skip
    parts = await while_wanted(request, answers.whole(), service.settings.timeout_s)
    echoed = body.prompt if body.echo else ""
    return {
        "text": [echoed + part.text for part in parts],
        "output_token_len": [len(part.tokens) for part in parts],
        "cumulative_logprob": [sum(part.logprobs) for part in parts],
        "finish_reason": [finish_reason(part) for part in parts],
        "usage": answers.usage(),
        "error_code": 0,
    }


@routes.post("/generate")
async def generate(body: Generating, service: Served, request: HttpRequest) -> list[dict[str, Any]] | dict[str, Any]:
    """Continue prompts as SGLang does. A single answer is not in a list."""
    if (body.text is None) == (body.input_ids is None):
        raise ApiError(400, "text: expected either text or input_ids", "text")
    if body.stream or body.return_logprob:
        raise ApiError(400, "stream, return_logprob: expected false; /v1/completions has both", "stream")
    given = body.sampling_params
    sampling = given.model_copy(update={"stream": False, "include_stop_str_in_output": given.no_stop_trim})
    prompts = _prompts(service, body)
    answers = Answers(service, sampling, prompts, max_tokens=given.max_new_tokens, logprobs=None)
    parts = await while_wanted(request, answers.whole(), service.settings.timeout_s)
    told = [_as_sglang(answers, part) for part in parts]
    return told[0] if len(told) == 1 and not isinstance(body.text, list) else told


def _prompts(service: Service, body: Generating) -> list[Prompt]:
    if body.input_ids is not None:
        service.texts.check(body.input_ids)
        return [Prompt(body.input_ids)]
    texts = [body.text] if isinstance(body.text, str) else body.text or []
    return [Prompt(service.texts.encode(text, special=True), text) for text in texts]


def _as_sglang(answers: Answers, part: Generated) -> dict[str, Any]:
    matched = stop_reason(part)
    return {
        "text": part.text,
        "meta_info": {
            "prompt_tokens": len(answers.prompt_of(part.sample).tokens),
            "completion_tokens": len(part.tokens),
            "finish_reason": {"type": finish_reason(part), **({} if matched is None else {"matched": matched})},
        },
    }


@routes.post("/worker_reward_inference")
async def worker_reward(body: WorkerReward, service: Served, request: HttpRequest) -> dict[str, Any]:
    """Score the steps of solutions."""
    several = [body.input_str] if isinstance(body.input_str, str) else body.input_str
    solutions = [_solution(service, each) for each in several]
    reading = await while_wanted(request, read_all(service, solutions), service.settings.timeout_s)
    return {"reward": [list(one.step_scores) for one in reading.completions]}


def _solution(service: Service, given: Any) -> Solution:
    if isinstance(given, str):
        return solution_of_text(service, given)
    if isinstance(given[0], str):
        if len(given) != 2:
            raise ApiError(
                400, f"input_str: expected pairs of problem and solution, got {len(given)} texts", "input_str"
            )
        return solution_of_pair(service, *given)
    return solution_of_messages(service, given)


@routes.post("/get_worker_address")
async def worker_address(request: HttpRequest) -> dict[str, str]:
    """The address of a model's server, as FastChat's controller returns it: it is this server."""
    return {"address": str(request.base_url).rstrip("/")}
