"""huggingface/search-and-learn on our policy and verifier: a :class:`PRM`, an :class:`LLM`, and its three searches.

Its ``best_of_n``, ``beam_search`` and ``dvts`` run unchanged with ``llm=LLM(...)`` and ``prm=PRM(...)``. They submit
whole texts in each round, and only the new tokens are processed. The functions of the same names in this module take
the same arguments, return the same columns and decide the same, as one search of ours over all problems of the batch.

Written against commit 6f81cac. Its modules import vLLM; if vLLM is not installed, call :func:`stand_in_for_vllm` before
importing them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final

from tts_search.adapters.stateless import Continuation, StepSampler, StepScorer, before_delimiter
from tts_search.api import search
from tts_search.policies.hf import HFPolicy
from tts_search.search.config import SearchConfig
from tts_search.search.protocol import Score, Usage, Verifier
from tts_search.search.result import SearchResult
from tts_search.search.types import Step, StepParams
from tts_search.verifiers.hf import HFVerifier

__all__ = [
    "LLM",
    "PRM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "beam_search",
    "best_of_n",
    "dvts",
    "stand_in_for_vllm",
]

_OPTIONS: Final = (
    "n", "beam_width", "num_iterations", "lookahead", "agg_strategy", "filter_duplicates", "sort_completed",
    "temperature", "top_p", "max_tokens", "seed",
)  # fmt: skip
# Further options of vLLM's SamplingParams, with the values that have no effect.
_NOT_ASKED: Final[dict[str, tuple[Any, ...]]] = {
    "presence_penalty": (0.0,), "frequency_penalty": (0.0,), "repetition_penalty": (1.0,), "min_p": (0.0,),
    "stop_token_ids": (None, []), "bad_words": (None, []), "logit_bias": (None,), "logprobs": (None,),
    "prompt_logprobs": (None,), "min_tokens": (0,), "ignore_eos": (False,), "structured_outputs": (None,),
    "logits_processors": (None,),
}  # fmt: skip


@dataclass
class SamplingParams:
    """The sampling parameters of search-and-learn, named as in vLLM. vLLM's own class works, too."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = 16
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False


@dataclass
class CompletionOutput:
    """One sample. `stop_reason` is the stop string that ended it; None at the end of the answer, or at the token limit.

    `token_ids` are the tokens of the text, encoded again.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    finish_reason: str
    stop_reason: str | None


@dataclass
class RequestOutput:
    """The samples of one prompt."""

    prompt: str
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


class LLM:
    """Replaces the ``vllm.LLM`` of search-and-learn.

    Parameters
    ----------
    model : str or HFPolicy
        A checkpoint, or a policy made with ``chat=False``, because prompts already have their template applied.
    seed : int
        Fixes every draw. A sample depends on its prompt and on how often this was sampled before, not on the batch.
    gpu_memory_utilization, enable_prefix_caching, tensor_parallel_size
        Accepted but ignored, so that the script runs unchanged.
    options
        Options of :class:`~tts_search.HFPolicy`.

    Raises
    ------
    TypeError
        If options are given with a loaded policy.
    ValueError
        If the policy renders prompts itself.

    Examples
    --------
    >>> llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct", kv_memory="1GiB")  # doctest: +SKIP
    >>> llm.generate(["Once"], SamplingParams(max_tokens=8))[0].outputs[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | HFPolicy,
        *,
        seed: int = 0,
        gpu_memory_utilization: float | None = None,  # noqa: ARG002
        enable_prefix_caching: bool | None = None,  # noqa: ARG002
        tensor_parallel_size: int | None = None,  # noqa: ARG002
        **options: Any,
    ) -> None:
        if isinstance(model, str):
            model = HFPolicy(model, chat=False, **options)
        elif options:
            raise TypeError(f"options: expected none with a policy that is loaded, got {', '.join(options)}")
        if getattr(model, "chat", True):
            raise ValueError("model: expected a policy made with chat=False, since prompts come with their template")
        self.policy = model
        self._sampler = StepSampler(model, seed=seed)

    def get_tokenizer(self) -> Any:
        """Return the policy's tokenizer."""
        return self.policy.tokenizer

    def generate(
        self, prompts: str | Sequence[str], sampling_params: Any = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Continue prompts in one batch. A step's last token is not cut, so its text may extend beyond the stop string.

        Raises
        ------
        ValueError
            If the parameters ask for something that a policy cannot do.
        SearchError
            If a prompt does not fit the model's context.
        """
        del use_tqdm
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        asked = SamplingParams() if sampling_params is None else sampling_params
        params = _step_params(asked)
        continuations = [Continuation(*self._sampler.split(prompt), params, asked.n) for prompt in prompts]
        samples = self._sampler.sample(continuations)
        cut = not asked.include_stop_str_in_output
        return [
            RequestOutput(prompt, [self._output(index, step, params, cut) for index, step in enumerate(steps)])
            for prompt, steps in zip(prompts, samples, strict=True)
        ]

    def close(self) -> Usage:
        """Forget all prompts, and return the cost since the last call."""
        return self._sampler.close()

    def _output(self, index: int, step: Step, params: StepParams, cut: bool) -> CompletionOutput:
        text = before_delimiter(step.text, params.delimiter) if cut else step.text
        ids: list[int] = self.policy.tokenizer(step.text, add_special_tokens=False)["input_ids"]
        if step.reason == "eos":
            ids = [*ids, self.policy.tokenizer.eos_token_id]
        reason = "length" if step.reason == "length" else "stop"
        stop = params.delimiter if step.reason == "stop" and not step.finished else None
        return CompletionOutput(index, text, ids, step.logprob, reason, stop)


class PRM:
    """Replaces a PRM of search-and-learn. Returns one score for each step of a completion, except blank steps.

    Parameters
    ----------
    model : str or HFVerifier or Verifier
        A checkpoint, or a verifier.
    options
        Options of :class:`~tts_search.HFVerifier`.

    Raises
    ------
    TypeError
        If options are given with a loaded verifier.
    """

    def __init__(self, model: str | Verifier, **options: Any) -> None:
        if isinstance(model, str):
            model = HFVerifier(model, **options)
        elif options:
            raise TypeError(f"options: expected none with a verifier that is loaded, got {', '.join(options)}")
        self.verifier = model
        self._scorer = StepScorer(model)

    def score(self, questions: Sequence[str], outputs: Sequence[Sequence[str]]) -> list[list[list[float]]]:
        """Score the steps of each question's completions: [question][completion][step]; [0.0] for a blank completion.

        Raises
        ------
        ValueError
            If there are not as many lists of completions as questions.
        SearchError
            If a text does not fit the model's context.
        """
        if isinstance(questions, str) or len(questions) != len(outputs):
            raise ValueError(f"outputs: expected a list for each of {len(questions)} questions, got {len(outputs)}")
        items = [(question, text) for question, texts in zip(questions, outputs, strict=True) for text in texts]
        scores = iter(self._scorer.score(items))
        return [[next(scores) or [0.0] for _ in texts] for texts in outputs]

    def close(self) -> Usage:
        """Forget all questions, and return the cost since the last call."""
        return self._scorer.close()


def best_of_n(x: dict[str, Any], config: Any, llm: LLM, prm: PRM) -> dict[str, Any]:
    """Do what search-and-learn's ``best_of_n`` does: add its columns to a batch and return it."""
    x.update(_columns(_run("best_of_n", x, config, llm, prm)))
    return x


def beam_search(examples: Mapping[str, Any], config: Any, llm: LLM, prm: PRM) -> dict[str, list[Any]]:
    """Do what search-and-learn's ``beam_search`` does, for batches of any size."""
    return _columns(_run("beam_search", examples, config, llm, prm))


def dvts(examples: Mapping[str, Any], config: Any, llm: LLM, prm: PRM) -> dict[str, list[Any]]:
    """Do what search-and-learn's ``dvts`` does."""
    return _columns(_run("dvts", examples, config, llm, prm))


def stand_in_for_vllm() -> None:
    """Make ``from vllm import LLM, SamplingParams`` import these classes, if vLLM is not installed.

    Raises
    ------
    RuntimeError
        If vLLM is installed, because the rest of the program could not use it any more.
    """
    if "vllm" not in sys.modules and importlib.util.find_spec("vllm") is not None:
        raise RuntimeError("vllm is installed: search-and-learn needs no stand-in for it")
    module = sys.modules.setdefault("vllm", ModuleType("vllm"))
    module.__dict__.update(LLM=LLM, SamplingParams=SamplingParams)


class _Questions:
    """A verifier that reads the question if the policy reads the prompt made from it."""

    def __init__(self, verifier: Verifier, questions: Mapping[str, str]) -> None:
        self._verifier = verifier
        self._questions = questions

    def begin(self, problem: int, text: str) -> None:
        self._verifier.begin(problem, self._questions[text])

    def score(self, requests: Sequence[Score]) -> Sequence[Sequence[float] | Exception]:
        return self._verifier.score(requests)

    def release(self, problem: int, branches: Sequence[int]) -> None:
        self._verifier.release(problem, branches)

    def end(self, problem: int) -> Usage:
        return self._verifier.end(problem)


def _run(approach: str, examples: Mapping[str, Any], config: Any, llm: LLM, prm: PRM) -> list[SearchResult]:
    options = {name: getattr(config, name) for name in _OPTIONS}
    preset = SearchConfig.search_and_learn(approach, **options)
    tokenizer = llm.get_tokenizer()
    if config.custom_chat_template is not None:
        tokenizer.chat_template = config.custom_chat_template
    questions = list(examples["problem"])
    conversations = [
        [{"role": "system", "content": config.system_prompt}, {"role": "user", "content": question}]
        for question in questions
    ]
    prompts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    verifier = _Questions(prm.verifier, dict(zip(prompts, questions, strict=True)))
    return search(prompts, llm.policy, verifier, preset, progress=False)


def _columns(results: Sequence[SearchResult]) -> dict[str, list[Any]]:
    """The columns that search-and-learn adds to a data set. Its beam search and DVTS do not add `completion_tokens`."""
    return {
        "completions": [[one.text for one in result.completions] for result in results],
        "scores": [[list(one.step_scores) or [0.0] for one in result.completions] for result in results],
        "pred": [result.best.text for result in results],
        "completion_tokens": [[one.num_tokens for one in result.completions] for result in results],
    }


def _step_params(asked: Any) -> StepParams:
    """Parameters of a step from vLLM's sampling parameters."""
    for name, nothing in _NOT_ASKED.items():
        if (value := getattr(asked, name, nothing[0])) not in nothing:
            raise ValueError(f"{name}: expected {nothing[0]!r}, which is all that a policy can do, got {value!r}")
    if not isinstance(asked.n, int) or asked.n < 1:
        raise ValueError(f"n: expected an int >= 1, got {asked.n!r}")
    stops = [asked.stop] if isinstance(asked.stop, str) else list(asked.stop or ())
    if len(stops) > 1:
        raise ValueError(f"stop: expected at most one text, got {stops!r}")
    limit = asked.max_tokens if asked.max_tokens is not None else 1 << 30
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"max_tokens: expected an int >= 1 or None, got {limit!r}")
    return StepParams(asked.temperature, asked.top_p, max(0, asked.top_k), limit, stops[0] if stops else None)
