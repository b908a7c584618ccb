"""Fields that several kinds of requests share, with the names of vLLM and OpenAI. Unknown fields are ignored."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

__all__ = [
    "ApiRequest",
    "Chat",
    "Conversation",
    "Message",
    "SamplingRequest",
    "StopTexts",
    "StreamOptions",
    "Text",
    "TokenIds",
    "fresh_seed",
]

Text = Annotated[str, StringConstraints(max_length=1 << 22)]
TokenIds = list[Annotated[int, Field(ge=0, lt=1 << 31)]]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopTexts = Annotated[list[Stop], Field(max_length=16)]

# Fields that would change the sampling in ways that this server does not support, with the values that have no effect.
_UNKNOWN: Final[dict[str, tuple[Any, ...]]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "prompt_embeds": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (-1,),
    "cache_salt": (),
    "functions": ([],),
    "audio": (),
    "modalities": (["text"],),
}


class ApiRequest(BaseModel):
    """A request to a model. A field that is null counts as missing."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)

    model: Annotated[str, StringConstraints(max_length=512)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Message(BaseModel):
    """A message in a conversation. Its content may be a list of parts with texts."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text = ""

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if content is None:
            return ""
        if not isinstance(content, list):
            return content
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("expected a text, or parts of type text")
        return "".join(texts)  # type: ignore[arg-type]  # they were checked


Conversation = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class StreamOptions(BaseModel):
    """What a stream reports besides its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingRequest(ApiRequest):
    """How answers are drawn, what ends them, and what is reported about them."""

    n: int = Field(default=1, ge=1, le=1 << 16)
    max_tokens: int | None = Field(default=None, ge=1, lt=1 << 31)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, lt=1 << 31)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: StopTexts = []
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    min_tokens: int = Field(default=0, ge=0, lt=1 << 31)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    logprob_token_ids: Annotated[TokenIds, Field(max_length=128)] = []

    @field_validator("prompt_logprobs", mode="before")
    @classmethod
    def _counted(cls, wanted: Any) -> Any:
        return (1 if wanted else None) if isinstance(wanted, bool) else wanted

    @model_validator(mode="after")
    def _possible(self) -> SamplingRequest:
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: expected none in a stream")
        return self

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        for name, neutral in _UNKNOWN.items():
            if isinstance(data, dict) and data.get(name) is not None and data[name] not in neutral:
                raise ValueError(f"{name}: this server does not know it; expected none")
        return data


class Chat(SamplingRequest):
    """A conversation to answer or continue."""

    messages: Conversation
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=1 << 31)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template: Text | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    search: dict[str, Any] | None = None
    budget: int | None = Field(default=None, ge=1, le=1000)
    return_response_only: bool = True


def fresh_seed(seed: int | None) -> int:
    """The seed of a request, or a new one."""
    return secrets.randbits(32) if seed is None else seed
