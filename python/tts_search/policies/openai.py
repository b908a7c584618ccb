"""A policy over any server that speaks OpenAI's API: vLLM, SGLang, llama.cpp, OpenAI itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, TypeVar
from weakref import WeakKeyDictionary

from tts_search.errors import ServerError, require
from tts_search.policies.text import TextPolicy
from tts_search.search.protocol import Expand
from tts_search.search.types import Step, StepRequest

__all__ = ["OpenAIPolicy"]

T = TypeVar("T")
# The field in which vLLM and SGLang report the text at which a choice stopped. At the end of the answer it is null or a
# token. Other servers report "stop" in both cases.
_STOPPED_AT: Final = ("stop_reason", "matched_stop")
_SEED_BITS: Final = 31  # some servers keep seeds in 32 bits
_CONTINUE: Final = {"continue_final_message": True, "add_generation_prompt": False}


class OpenAIPolicy(TextPolicy):
    r"""Samples steps from a server with OpenAI's API.

    The children of a branch are the samples of one request (``n``). All requests of a round are sent at the same time,
    and the server finds their common prefix in its cache. In an engine, a problem continues when its own requests are
    answered, even if other problems wait. A search that is cancelled closes its connections.

    A step ends at the delimiter (``stop``). If a server does not report whether it stopped there or at the end of the
    answer, the policy reads the text as it is generated, with one request for each child, and closes the connection at
    the delimiter.

    Chat templates such as Llama 3's trim a message. Then the delimiter at the end of the steps so far does not reach
    the model, and the model writes it again. At the first step that begins with the delimiter, the policy asks the
    server (``/tokenize``) whether it trims. If the server cannot answer, the policy assumes that it does. From then on
    it reads each child's text as it is generated, and removes the repeated delimiter. A `template` with
    ``endpoint="completions"`` avoids this, and is faster.

    Requests that fail for reasons that may pass (no connection, a timeout, status 408, 409, 429 or 5xx, an answer that
    is cut or garbled) are sent again, with exponential backoff or when the server says. A request that fails for good
    only fails its own problem.

    Parameters
    ----------
    model : str
        The model's name on the server.
    base_url : str or None
        Address such as ``"http://localhost:8000/v1"``; by default OpenAI's own.
    endpoint : {"chat", "completions"}
        ``"chat"`` sends messages, with the steps so far as the beginning of the assistant's message. ``"completions"``
        sends `template` and the steps.
    system_prompt : str or None
        The system message; with ``"completions"`` put it into the template.
    template : str or callable
        For ``"completions"``: text in which ``{problem}`` is replaced, or a function from a problem to a prompt (a
        tokenizer's ``apply_chat_template``, say).
    api_key_env : str
        The environment variable that holds the key; many own servers need none.
    concurrency : int
        The largest number of requests at the same time.
    timeout : float
        Seconds that one try of a request may take.
    max_retries : int
        Number of tries after the first.
    samples_per_request : int or None
        The largest number of samples in one request. Each request has the seed of its first child, so 1 gives every
        child its own seed. By default all children of a branch are in one request.
    logprobs : bool
        Ask for log-probabilities. They fill in ``Step.logprob`` and count tokens. Without them, the tokens of a step
        are counted by the server's usage if its request has one sample, and as 0 otherwise.
    extra_body : mapping or None
        Further fields of every request.
    continue_body : mapping
        Further fields of a chat request whose last message is to be continued; those of vLLM and SGLang by default.

    Raises
    ------
    MissingExtraError
        Without the package openai.
    ValueError
        If an option is not possible, or a key is needed and missing.

    Examples
    --------
    >>> policy = OpenAIPolicy("Qwen/Qwen2.5-1.5B-Instruct", base_url="http://localhost:8000/v1")  # doctest: +SKIP
    """

    is_concurrent: Final = True

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        endpoint: Literal["chat", "completions"] = "chat",
        system_prompt: str | None = None,
        template: str | Callable[[str], str] = "{problem}\n\n",
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 64,
        timeout: float = 600.0,
        max_retries: int = 4,
        samples_per_request: int | None = None,
        logprobs: bool = True,
        extra_body: Mapping[str, Any] | None = None,
        continue_body: Mapping[str, Any] = _CONTINUE,
    ) -> None:
        super().__init__(self._answer)
        if endpoint not in ("chat", "completions"):
            raise ValueError(f'endpoint: expected "chat" or "completions", got {endpoint!r}')
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("max_retries", max_retries, 0),
            ("samples_per_request", 1 if samples_per_request is None else samples_per_request, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
        self._openai = require("openai", "openai")
        key = os.environ.get(api_key_env)
        if not key and base_url is None:
            raise ValueError(f"api_key_env: expected a key in the environment variable {api_key_env}, found none")
        self.model = model
        self.endpoint = endpoint
        self.system_prompt = system_prompt
        self.template = template
        self.samples_per_request = samples_per_request
        self.logprobs = logprobs
        self.max_retries = max_retries
        self.extra_body = dict(extra_body or {})
        self.continue_body = dict(continue_body)
        self._new_client = partial(
            self._openai.AsyncOpenAI,
            api_key=key or "none",
            base_url=base_url,
            timeout=timeout,
            max_retries=max_retries,
        )
        self._server = str(self._new_client().base_url)
        self._concurrency = concurrency
        self._lines: WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = WeakKeyDictionary()
        self._says_where: bool | None = None  # whether the server reports what it stopped at; None: not known yet
        self._trims: bool | None = None  # whether it trims a delimiter at a message's end; None: not known yet
        self._streams = True  # whether the server sends text while it is generated

    async def answer(self, requests: Sequence[Expand]) -> list[Any]:
        """Answer requests, all at the same time: a list of steps for each request, or its error."""
        return self._counted(requests, await self._answer([self._asked(request) for request in requests]))

    async def hang_up(self) -> None:
        """Close the connections of the running event loop."""
        if (line := self._lines.pop(asyncio.get_running_loop(), None)) is not None:
            await line.client.close()

    @property
    def _line(self) -> _Line:
        """The client and locks of the running event loop, to which they are bound."""
        loop = asyncio.get_running_loop()
        if loop not in self._lines:
            self._lines[loop] = _Line(self._new_client(), asyncio.Semaphore(self._concurrency), asyncio.Lock())
        return self._lines[loop]

    async def _answer(self, requests: list[StepRequest]) -> list[Any]:
        """The function of a `TextPolicy`: a list of steps for each request, or its error."""
        return await _together(self._children(request) for request in requests)

    async def _children(self, request: StepRequest) -> list[Step] | ServerError:
        width = self.samples_per_request or request.num_samples
        parts = [request.seeds[i : i + width] for i in range(0, request.num_samples, width)]
        try:
            steps = await _together(self._samples(request, seeds) for seeds in parts)
        except ServerError as error:
            return error
        return [step for part in steps for step in part]

    async def _samples(self, request: StepRequest, seeds: tuple[int, ...]) -> list[Step]:
        """A step for each seed."""
        trimmed = bool(self._trims) and self._may_be_trimmed(request)
        if not trimmed and (request.params.delimiter is None or self._says_where is not False):
            steps = await self._tried(partial(self._at_once, request, seeds))
            if steps is not None and not await self._were_trimmed(request, steps):
                missing = seeds[len(steps) :]  # a server may not know n
                rest = await _together(self._samples(request, (seed,)) for seed in missing)
                return [*steps, *(step for part in rest for step in part)]
        return await _together(self._tried(partial(self._read, request, seed)) for seed in seeds)

    def _may_be_trimmed(self, request: StepRequest) -> bool:
        so_far = "".join(request.steps)
        return self.endpoint == "chat" and so_far != so_far.rstrip()

    async def _ask_whether_it_trims(self) -> bool | None:
        """Whether "a" and "a" with a blank line after it are the same message; None if the server cannot tell."""
        url = f"{self._server.rstrip('/').removesuffix('/v1')}/tokenize"
        tokens: list[Any] = []
        for content in ("a", "a\n\n"):
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
            body = {"model": self.model, "messages": messages, **self.continue_body}
            try:
                answer = await self._line.client.post(url, cast_to=object, body=body, options={"max_retries": 0})
            except self._openai.OpenAIError:
                return None
            tokens.append(answer.get("tokens") if isinstance(answer, Mapping) else None)
        return None if None in tokens else tokens[0] == tokens[1]

    async def _were_trimmed(self, request: StepRequest, steps: Sequence[Step]) -> bool:
        """Whether steps begin with a repeated delimiter because the server trims. The server is asked once."""
        if not self._may_be_trimmed(request) or self._trims is False:
            return False
        so_far = "".join(request.steps)
        if not any(step.text.startswith(so_far[len(so_far.rstrip()) :]) for step in steps):
            return False
        async with self._line.asking:
            if self._trims is None:
                answer = await self._ask_whether_it_trims()
                self._trims = True if answer is None else answer
        return self._trims

    async def _at_once(self, request: StepRequest, seeds: tuple[int, ...]) -> list[Step] | None:
        """The steps of one request; None if the server does not report where they stopped."""
        async with self._line.slots:
            response = await self._create(request, seeds[0], n=len(seeds), stop=request.params.delimiter)
        choices = sorted(response.choices, key=lambda choice: choice.index)[: len(seeds)]
        if not choices:
            raise ValueError("an answer without choices")
        stopped = [self._stopped(choice, request.params.delimiter) for choice in choices]
        if None in stopped:
            self._says_where = False
            return None
        usage = response.usage.completion_tokens if response.usage and len(choices) == 1 else 0
        return [
            _step(self._text(choice), at, choice.finish_reason, *_counted(choice, usage), request.params.delimiter)
            for choice, at in zip(choices, stopped, strict=True)
        ]

    async def _read(self, request: StepRequest, seed: int) -> Step:
        """One step, read as it is generated. It ends at the delimiter, or at the end of the answer."""
        async with self._line.slots:
            return await self._read_stream(request, seed)

    async def _read_stream(self, request: StepRequest, seed: int) -> Step:
        text, reason, tokens, logprob = "", None, 0, 0.0
        delimiter = request.params.delimiter
        try:
            async with aclosing(self._parts(request, seed)) as parts:
                async for choice in parts:
                    text += self._text(choice)
                    reason = choice.finish_reason or reason
                    count, own = _counted(choice, 1 if self._text(choice) else 0)
                    tokens, logprob = tokens + count, logprob + (own or 0.0)
                    at = -1 if delimiter is None else text.find(delimiter, len(text) - len(text.lstrip()) + 1)
                    if delimiter is not None and at >= 0:
                        known = logprob if self.logprobs else None
                        return Step(self._own(request, text[: at + len(delimiter)]), False, tokens, known, "stop")
        except self._openai.APIConnectionError as error:  # which the client does not try again by itself
            raise ConnectionError(f"the stream broke off: {error}") from error
        if reason is None:
            raise ConnectionError("the stream ended without a finish_reason")
        return _step(self._own(request, text), False, reason, tokens, logprob if self.logprobs else None, None)

    async def _parts(self, request: StepRequest, seed: int) -> AsyncGenerator[Any, None]:
        """The parts of a text as they are generated; all at once from a server that does not stream."""
        if self._streams:
            stream = await self._create(request, seed, n=1, stop=None, stream=True)
            received = False
            async with stream:
                async for chunk in stream:
                    received = True
                    if chunk.choices:
                        yield chunk.choices[0]
            if received or self._trims is not True:
                return
            self._streams = False
        response = await self._create(request, seed, n=1, stop=None)
        yield response.choices[0]

    def _own(self, request: StepRequest, text: str) -> str:
        """A step's text. If the server trims the steps so far, the repeated delimiter at its beginning is removed."""
        return text.lstrip() if self._trims and self._may_be_trimmed(request) else text

    async def _create(self, request: StepRequest, seed: int, *, stop: str | None, **options: Any) -> Any:
        """Send one request, in the form of the endpoint."""
        params = request.params
        so_far = "".join(request.steps)
        body = dict(self.extra_body)
        if params.top_k:
            body["top_k"] = params.top_k
        options.update(
            model=self.model,
            temperature=params.temperature,
            top_p=params.top_p,
            max_tokens=params.max_tokens,
            seed=seed % 2**_SEED_BITS,
        )
        if stop is not None:
            options["stop"] = [stop]
        if self.endpoint == "completions":
            if self.logprobs:
                options["logprobs"] = 0
            prompt = self._prompt(request.problem) + so_far
            return await self._line.client.completions.create(prompt=prompt, extra_body=body, **options)
        if self.logprobs:
            options["logprobs"] = True
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt is not None else []
        messages.append({"role": "user", "content": request.problem})
        if so_far:
            messages.append({"role": "assistant", "content": so_far})
            body = {**self.continue_body, **body}
        return await self._line.client.chat.completions.create(messages=messages, extra_body=body, **options)

    def _prompt(self, problem: str) -> str:
        return self.template.replace("{problem}", problem) if isinstance(self.template, str) else self.template(problem)

    async def _tried(self, send: Callable[[], Awaitable[T]]) -> T:
        """The result of ``send``. The client itself retries refused requests; here, broken connections are retried."""
        for attempt in range(self.max_retries + 1):
            try:
                return await send()
            except self._openai.APIStatusError as error:
                raise ServerError(f"{self._server}: status {error.status_code}: {_short(error)}") from error
            except self._openai.APIConnectionError as error:  # timeouts too
                tries = f"after {self.max_retries + 1} tries" if self.max_retries else "at the only try"
                raise ServerError(f"{self._server}: {_short(error)} {tries}") from error
            except ServerError:
                raise
            except Exception as error:
                if attempt == self.max_retries:
                    raise ServerError(
                        f"{self._server}: expected an answer of OpenAI's API, got {type(error).__name__}: "
                        f"{_short(error)}"
                    ) from error
                await asyncio.sleep(min(0.5 * 2**attempt, 8.0))
        raise AssertionError

    def _text(self, choice: Any) -> str:
        if self.endpoint == "completions":
            return choice.text or ""
        message = choice.delta if hasattr(choice, "delta") else choice.message
        return message.content or ""

    def _stopped(self, choice: Any, delimiter: str | None) -> bool | None:
        """Whether a choice stopped at the delimiter; None if the server does not say."""
        if choice.finish_reason != "stop" or delimiter is None:
            return False
        extra = choice.model_extra or {}
        if field := next((name for name in _STOPPED_AT if name in extra), None):
            self._says_where = True
            return bool(extra[field] == delimiter)
        return False if self._says_where else None


@dataclass(frozen=True, slots=True)
class _Line:
    """What is bound to one event loop.

    Attributes
    ----------
    client : openai.AsyncOpenAI
        Its connections.
    slots : Semaphore
        As many as requests may be under way.
    asking : Lock
        Held while the server is asked whether it trims.
    """

    client: Any
    slots: asyncio.Semaphore
    asking: asyncio.Lock


async def _together(each: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of coroutines that run at the same time; if one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in each]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _step(
    text: str, at_delimiter: bool | None, finish: str | None, tokens: int, logprob: float | None, delimiter: str | None
) -> Step:
    if at_delimiter:
        assert delimiter is not None
        return Step(text if text.endswith(delimiter) else text + delimiter, False, tokens, logprob, "stop")
    if finish == "stop":
        return Step(text, True, tokens, logprob, "eos")
    if finish == "length":
        return Step(text, not text, tokens, logprob, "length")
    raise ServerError(f'finish_reason: expected "stop" or "length", got {finish!r}')


def _counted(choice: Any, otherwise: int) -> tuple[int, float | None]:
    """The number of tokens of a choice and the sum of their log-probabilities, if the server reports them."""
    found = choice.logprobs
    values = None if found is None else getattr(found, "token_logprobs", None)
    if values is None and found is not None and getattr(found, "content", None) is not None:
        values = [token.logprob for token in found.content]
    if values is None:
        return otherwise, None
    return len(values), float(sum(value for value in values if value is not None))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
