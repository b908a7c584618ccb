"""A policy over vLLM in the same process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tts_search.errors import require
from tts_search.models.known import KnownBranches
from tts_search.policies.prompt import at_a_word, continuation_ids, prompt_ids, prompt_of
from tts_search.search.checks import unused
from tts_search.search.protocol import Expand, Usage
from tts_search.search.types import Messages, Step

__all__ = ["VLLMPolicy"]


class VLLMPolicy:
    r"""Samples steps with vLLM's engine.

    A round is one call of the engine. It has one request for each branch, with the children as ``n`` samples. A branch
    is continued from the generated tokens, not from its text, so vLLM's prefix cache holds all of it except the last,
    partly filled block. The engine manages its own memory and does not know which branches are released: it evicts the
    least recently used blocks.

    Parameters
    ----------
    model : str or vllm.LLM
        Folder or hub id of a checkpoint, or a running engine.
    system_prompt : str or None
        The system message before the problem; by default none.
    **engine
        Options of ``vllm.LLM`` (``dtype=``, ``gpu_memory_utilization=``, ``max_model_len=``, ...). Prefix caching is on
        unless it is switched off here. On a CPU chunked prefill is off (0.32 fails there on a chunk with a seed).

    Raises
    ------
    MissingExtraError
        Without vllm.
    TypeError
        If engine options are given with a running engine.

    Notes
    -----
    The children of a branch are drawn from the first child's seed, so a search is as repeatable as vLLM's logits. A
    step ends where vLLM finds the delimiter. The last token may have more characters than the step's text; the branch
    continues after the whole token.

    Examples
    --------
    >>> policy = VLLMPolicy("Qwen/Qwen2.5-1.5B-Instruct", gpu_memory_utilization=0.5)  # doctest: +SKIP
    """

    def __init__(self, model: Any, *, system_prompt: str | None = None, **engine: Any) -> None:
        self._vllm = require("vllm", "vllm")
        if isinstance(model, str):
            model = self._vllm.LLM(model, **{"enable_prefix_caching": True, **_for_platform(), **engine})
        elif engine:
            raise TypeError(f"{', '.join(engine)}: expected no options of the engine beside one that runs already")
        self.engine = model
        self.system_prompt = system_prompt
        self.tokenizer = model.get_tokenizer()
        self.max_length: int = model.llm_engine.model_config.max_model_len
        self._problems: dict[int, _Problem] = {}

    def begin(self, problem: int, text: str | Messages) -> None:
        """Announce a problem. Its prompt is read with the first step.

        Raises
        ------
        ValueError
            If the number belongs to a problem in flight.
        """
        unused(problem, self._problems, self)
        self._problems[problem] = _Problem(self._read(self._prompt(text)))

    def expand(self, requests: Sequence[Expand]) -> list[list[Step] | Exception]:
        """Answer requests of any number of problems by one call of the engine.

        If a branch leaves no room in the model's context, the answer to its request is an exception.
        """
        answers: list[list[Step] | Exception] = [[] for _ in requests]
        prompts: list[list[int]] = []
        sent: list[int] = []
        for index, request in enumerate(requests):
            tokens = self._tokens(request)
            if len(tokens) >= self.max_length:
                answers[index] = ValueError(
                    f"a branch of {len(tokens)} tokens leaves no room in the model's context of {self.max_length}"
                )
            elif request.children:
                prompts.append(tokens)
                sent.append(index)
        if not sent:
            return answers
        params = [self._params(requests[i], len(prompt)) for i, prompt in zip(sent, prompts, strict=True)]
        outputs = self.engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        for index, prompt, output in zip(sent, prompts, outputs, strict=True):
            answers[index] = self._steps(requests[index], prompt, output)
        return answers

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Forget branches."""
        self._problems[problem].known.drop(branches)

    def end(self, problem: int) -> Usage:
        """Forget the problem; return its cost, as far as the engine reports it."""
        usage = self.usage(problem)
        del self._problems[problem]
        return usage

    def usage(self, problem: int) -> Usage:
        """Return the cost of the problem so far, as far as the engine reports it."""
        state = self._problems[problem]
        return Usage(
            tokens=state.sampled,
            prefill_tokens=min(state.read, len(state.prompt)),
            recomputed_tokens=max(0, state.read - len(state.prompt)),
        )

    def _prompt(self, text: str | Messages) -> str:
        return prompt_of(text, self.system_prompt, self.tokenizer)

    def _read(self, prompt: str) -> list[int]:
        """The tokens of a prompt. A tokenizer that is not transformers' does not tell which special tokens it adds."""
        if callable(self.tokenizer):
            return prompt_ids(prompt, self.tokenizer)
        begin = "" if self.tokenizer.chat_template else self.tokenizer.bos_token or ""
        return self._encode(begin + prompt)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _continued(self, path: Sequence[int], text: str) -> list[int]:
        if callable(self.tokenizer):
            return continuation_ids(path, text, self._encode, self._decode)
        return self._encode(text)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def _tokens(self, request: Expand) -> list[int]:
        """The tokens to continue: those that this policy generated, then those of the rest of the steps' text."""
        state = self._problems[request.problem]
        text = "".join(request.steps)
        start, tokens = state.known.longest(request.branch, text)
        if start != text:
            tokens = tokens + self._continued(state.prompt + tokens, text[len(start) :])
            state.known.put(request.branch, text, tokens)
        return state.prompt + tokens

    def _params(self, request: Expand, length: int) -> Any:
        params = request.params
        return self._vllm.SamplingParams(
            n=len(request.children),
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=min(params.max_tokens, self.max_length - length),
            stop=None if params.delimiter is None else [params.delimiter],
            include_stop_str_in_output=True,
            seed=request.seeds[0] % 2**62,
            logprobs=0,
        )

    def _steps(self, request: Expand, prompt: list[int], output: Any) -> list[Step] | Exception:
        state = self._problems[request.problem]
        state.read += len(prompt) - (output.num_cached_tokens or 0)
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        if len(samples) != len(request.children):
            return RuntimeError(f"vLLM: expected {len(request.children)} samples, got {len(samples)}")
        steps = [self._step(request, len(prompt), sample) for sample in samples]
        own = prompt[len(state.prompt) :]
        for child, step, sample in zip(request.children, steps, samples, strict=True):
            state.sampled += step.num_tokens
            if not step.finished:
                state.known.put(child, "".join(request.steps) + step.text, [*own, *sample.token_ids])
        return steps

    def _step(self, request: Expand, length: int, sample: Any) -> Step:
        text, count = sample.text, len(sample.token_ids)
        if sample.finish_reason == "length":
            full = length + count >= self.max_length
            return Step(text, full or not text, count, sample.cumulative_logprob, "length")
        at_delimiter = request.params.delimiter is not None and sample.stop_reason == request.params.delimiter
        return Step(text, not at_delimiter, count, sample.cumulative_logprob, "stop" if at_delimiter else "eos")


def _for_platform() -> dict[str, Any]:
    """On a CPU, prompts are read whole: vLLM cannot undo the draw for a part of a prompt from a seeded generator."""
    return {"enable_chunked_prefill": False} if require("vllm.platforms", "vllm").current_platform.is_cpu() else {}


@dataclass(slots=True)
class _Problem:
    """A problem in flight.

    Attributes
    ----------
    prompt : list of int
        Its tokens.
    known : KnownBranches
        For each branch: the tokens after the prompt.
    sampled, read : int
        How many tokens were sampled, and how many were read because the prefix cache did not hold them.
    """

    prompt: list[int]
    known: KnownBranches[str, list[int]] = field(init=False)
    sampled: int = 0
    read: int = 0

    def __post_init__(self) -> None:
        self.known = KnownBranches("", [], at_a_word)
