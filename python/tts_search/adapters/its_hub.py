"""its_hub on our policy and verifier: its language model, its process reward model, its outcome reward model.

The algorithms of its_hub submit whole conversations and whole candidate texts in each round; only the new tokens are
processed. Written against its_hub 1.2.0 and its actual calls: ``BeamSearch`` and the particle methods call
``ascore(prompt, [text of each candidate])`` and expect one number for each candidate, although the parameter is called
`steps`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from tts_search.adapters.stateless import Continuation, StepSampler, StepScorer, before_delimiter
from tts_search.search.protocol import Policy, Usage, Verifier
from tts_search.search.types import Step, StepParams
from tts_search.search.voting import AGGREGATES

try:
    from its_hub.api import AbstractLanguageModel, AbstractOutcomeRewardModel, AbstractProcessRewardModel
except ImportError:  # these classes are used by their methods, not by their type
    AbstractLanguageModel = AbstractOutcomeRewardModel = AbstractProcessRewardModel = object

__all__ = ["LanguageModel", "OutcomeRewardModel", "ProcessRewardModel"]

_WINDOW: Final = 0.005  # seconds that a single request waits for others to join its batch
_ASKED_ELSEWHERE: Final = ("tools", "tool_choice", "response_format")


class LanguageModel(AbstractLanguageModel):  # type: ignore[misc]
    r"""Generates steps and answers for its_hub.

    A list of conversations is one batch. Single requests that come at the same time become one batch, too: its
    orchestrator sends a request for each sample.

    Parameters
    ----------
    policy : Policy
        If the policy takes problems, a conversation must be a user's message, followed by an assistant's message to
        continue. With an ``HFPolicy(..., chat=False)`` any conversation is possible: the tokenizer's template renders
        it.
    seed : int
        Fixes every draw.
    max_tokens : int
        Tokens of a step or an answer, if the caller sets no number.
    temperature : float
        The temperature, if the caller sets none.

    Raises
    ------
    ValueError
        If `max_tokens` is no int of at least 1.

    Examples
    --------
    >>> lm = LanguageModel(HFPolicy("HuggingFaceTB/SmolLM2-135M-Instruct"))  # doctest: +SKIP
    >>> BeamSearch(StepGeneration(16, step_token="\n\n"), prm, beam_width=4).infer(lm, problem, 16)  # doctest: +SKIP
    """

    def __init__(self, policy: Policy, *, seed: int = 0, max_tokens: int = 2048, temperature: float = 0.8) -> None:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"max_tokens: expected an int >= 1, got {max_tokens!r}")
        self.policy = policy
        self.max_tokens = max_tokens
        self.temperature = temperature
        self._sampler = StepSampler(policy, seed=seed)
        self._waiting: list[tuple[Continuation, asyncio.Future[Step]]] = []
        self._flush: asyncio.Task[None] | None = None

    async def agenerate(self, messages: Any, stop: str | None = None, **options: Any) -> dict[str, Any] | list[Any]:
        """Continue a conversation, or each of a list of them: ``{"role": "assistant", "content": ...}``.

        Options are those that its_hub passes: `temperature` (a number, or one for each conversation), `max_tokens` or
        `max_completion_tokens`, `include_stop_str_in_output`, `usage_accumulator`.

        Raises
        ------
        ValueError
            If tools or a response format are requested, or the policy cannot continue a conversation.
        SearchError
            If a conversation does not fit the model's context.
        """
        messages = list(messages)
        if messages and not isinstance(messages[0], list):
            return await self.agenerate_single(messages, stop, **options)
        temperature = options.pop("temperature", None)
        each = temperature if isinstance(temperature, list) else [temperature] * len(messages)
        if len(each) != len(messages):
            raise ValueError(
                f"temperature: expected {len(messages)} numbers, one for each conversation, got {len(each)}"
            )
        asked = [
            self._continuation(conversation, stop, one, options)
            for conversation, one in zip(messages, each, strict=True)
        ]
        samples = await asyncio.to_thread(self._sampler.sample, asked)
        return [self._response(steps[0], stop, options) for steps in samples]

    async def agenerate_single(self, messages: Any, stop: str | None = None, **options: Any) -> dict[str, Any]:
        """Continue one conversation, in a batch with others of the same time."""
        continuation = self._continuation(messages, stop, options.pop("temperature", None), options)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Step] = loop.create_future()
        self._waiting.append((continuation, future))
        if self._flush is None or self._flush.done():
            self._flush = loop.create_task(self._serve())
        return self._response(await future, stop, options)

    def close(self) -> Usage:
        """Forget all conversations, and return the cost since the last call."""
        return self._sampler.close()

    async def _serve(self) -> None:
        """Answer waiting requests, batch after batch. Requests that come during a batch form the next one."""
        while True:
            count = -1
            while count != len(self._waiting):  # more are coming
                count = len(self._waiting)
                await asyncio.sleep(_WINDOW)
            batch, self._waiting = self._waiting, []
            try:
                samples = await asyncio.to_thread(self._sampler.sample, [continuation for continuation, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), steps in zip(batch, samples, strict=True):
                    if not future.done():
                        future.set_result(steps[0])
            if not self._waiting:
                return

    def _continuation(
        self, messages: Any, stop: Any, temperature: float | None, options: dict[str, Any]
    ) -> Continuation:
        for name in _ASKED_ELSEWHERE:
            if options.get(name) is not None:
                raise ValueError(
                    f"{name}: expected None, since a policy generates text alone, got {options[name]!r:.200}"
                )
        if stop is not None and (not isinstance(stop, str) or not stop):
            raise ValueError(f"stop: expected a text that is not empty, or None, got {stop!r}")
        limit = options.get("max_completion_tokens") or options.get("max_tokens") or self.max_tokens
        temperature = self.temperature if temperature is None else temperature
        params = StepParams(temperature=temperature, max_tokens=limit, delimiter=stop)
        return Continuation(*self._conversation(messages), params)

    def _conversation(self, messages: Any) -> tuple[str, str]:
        """The problem of a conversation, and the beginning of the assistant's answer."""
        told = [(_of(message, "role"), _text(message)) for message in messages]
        text = told.pop()[1] if told and told[-1][0] == "assistant" else ""
        if not told:
            raise ValueError("messages: expected a user's message, got none")
        if getattr(self.policy, "chat", True):
            if len(told) != 1 or told[0][0] != "user":
                roles = ", ".join(role for role, _ in told)
                raise ValueError(
                    f"messages: expected one of a user's, and an assistant's to continue, got {roles}; an "
                    "HFPolicy(..., chat=False) takes any conversation"
                )
            return told[0][1], text
        conversation = [{"role": role, "content": content} for role, content in told]
        tokenizer = self.policy.tokenizer  # type: ignore[attr-defined]  # an HFPolicy
        return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True), text

    def _response(self, step: Step, stop: str | None, options: dict[str, Any]) -> dict[str, Any]:
        if (accumulator := options.get("usage_accumulator")) is not None:
            accumulator.add(0, step.num_tokens)
        content = step.text if options.get("include_stop_str_in_output") else before_delimiter(step.text, stop)
        return {"role": "assistant", "content": content}


class ProcessRewardModel(AbstractProcessRewardModel):  # type: ignore[misc]
    """Scores candidate texts for its_hub, each by the scores of its steps.

    Parameters
    ----------
    verifier : Verifier
        Scores steps.
    delimiter : str
        The text between the steps of a candidate.
    aggregate : str
        How the scores of its steps become one score: ``"last"``, ``"min"``, ``"prod"``, ``"mean"``, ...

    Raises
    ------
    ValueError
        If `aggregate` is unknown, or the delimiter is empty.
    """

    def __init__(self, verifier: Verifier, *, delimiter: str = "\n\n", aggregate: str = "last") -> None:
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate: expected one of {', '.join(AGGREGATES)}, got {aggregate!r}")
        self.verifier = verifier
        self.aggregate = aggregate
        self._scorer = StepScorer(verifier, delimiter=delimiter)

    def score(self, prompt_or_messages: Any, steps: str | Sequence[str]) -> float | list[float]:
        """Score whole candidate texts, with one number each (a single text: one number). A blank text has 0.0.

        Raises
        ------
        SearchError
            If a text does not fit the model's context.
        """
        problem = _problem(prompt_or_messages)
        texts = [steps] if isinstance(steps, str) else list(steps)
        combine = AGGREGATES[self.aggregate]
        scores = [
            combine(scores) if scores else 0.0 for scores in self._scorer.score([(problem, text) for text in texts])
        ]
        return scores[0] if isinstance(steps, str) else scores

    async def ascore(self, prompt_or_messages: Any, steps: str | Sequence[str]) -> float | list[float]:
        """Do the same in a thread."""
        return await asyncio.to_thread(self.score, prompt_or_messages, steps)

    def close(self) -> Usage:
        """Forget all prompts, and return the cost since the last call."""
        return self._scorer.close()


class OutcomeRewardModel(AbstractOutcomeRewardModel):  # type: ignore[misc]
    """Scores whole conversations for its_hub's ``BestOfN``, by the process reward model's score of the last answer."""

    def __init__(self, prm: ProcessRewardModel) -> None:
        self.prm = prm

    def score(self, messages: Any, **_: Any) -> float | list[float]:
        """Score a conversation, or each of a list of them, whose last message is the assistant's.

        Raises
        ------
        ValueError
            If a conversation does not end with the assistant's answer.
        """
        single = not isinstance(messages, list) or not messages or not isinstance(messages[0], list)
        conversations = [list(_messages(messages))] if single else messages
        scores = []
        for conversation in conversations:
            if not conversation or _of(conversation[-1], "role") != "assistant":
                raise ValueError("messages: expected conversations that end with the assistant's answer")
            scores.append(self.prm.score(conversation[:-1], _text(conversation[-1])))
        return scores[0] if single else scores  # type: ignore[return-value]

    async def ascore(self, messages: Any, orchestrator: Any = None, **_: Any) -> float | list[float]:  # noqa: ARG002
        """Do the same in a thread."""
        return await asyncio.to_thread(self.score, messages)


def _of(message: Any, name: str) -> Any:
    return message.get(name) if isinstance(message, dict) else getattr(message, name)


def _text(message: Any) -> str:
    """The text of a message. If it has several parts, they are joined as in its_hub."""
    content = _of(message, "content")
    if content is None or isinstance(content, str):
        return content or ""
    return " ".join(part.get("text", "") for part in content if part.get("type") == "text")


def _messages(prompt_or_messages: Any) -> Sequence[Any]:
    convert = getattr(prompt_or_messages, "to_chat_messages", None)
    messages: Sequence[Any] = convert() if convert is not None else prompt_or_messages
    return messages


def _problem(prompt_or_messages: Any) -> str:
    """The text of a prompt: its user's message, or all messages with their roles, as its_hub writes them."""
    if isinstance(prompt_or_messages, str):
        return prompt_or_messages
    messages = _messages(prompt_or_messages)
    if len(messages) == 1:
        return _text(messages[0])
    return "\n".join(f"{_of(message, 'role')}: {_text(message)}" for message in messages)
