"""crucible-ttc on our policy and verifier: its ``PolicyModel`` and its ``ProcessVerifier``.

The strategies of crucible-ttc sample the children of one partial trace at a time, and score one trace at a time. Each
time they submit all earlier steps; only the new tokens are processed. Written against crucible-ttc 0.1.1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tts_search.adapters.stateless import Continuation, StepSampler, StepScorer, before_delimiter
from tts_search.errors import require
from tts_search.search.protocol import Policy, Usage, Verifier
from tts_search.search.steps import split_steps
from tts_search.search.types import StepParams

__all__ = ["PolicyModel", "ProcessVerifier"]

_DELIMITER = "\n\n"  # crucible joins the steps of a trace with it


def _prompt_of(problem: Any) -> str:
    prompt: str = problem.prompt
    return prompt


class PolicyModel:
    """Samples steps and whole traces for crucible.

    Parameters
    ----------
    policy : Policy
        Generates steps.
    seed : int
        Fixes every draw.
    max_step_tokens : int
        The largest number of tokens of a step, even if crucible's `max_tokens` is larger.
    prompt : callable
        Makes the policy's problem. By default it is crucible's problem unchanged, without an instruction.

    Raises
    ------
    MissingExtraError
        Without crucible-ttc, whose types it answers in.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        seed: int = 0,
        max_step_tokens: int = 512,
        prompt: Callable[[Any], str] = _prompt_of,
        name: str = "tts_search",
    ) -> None:
        if isinstance(max_step_tokens, bool) or not isinstance(max_step_tokens, int) or max_step_tokens < 1:
            raise ValueError(f"max_step_tokens: expected an int >= 1, got {max_step_tokens!r}")
        self._types = require("crucible.domain.types", "crucible")
        self.name = name
        self.policy = policy
        self.max_step_tokens = max_step_tokens
        self._prompt = prompt
        self._sampler = StepSampler(policy, seed=seed)

    def sample_full(self, problem: Any, *, n: int, temperature: float, max_tokens: int) -> list[Any]:
        """Sample `n` whole traces in one batch. The tokens of a trace count in its compute, and in its last step.

        Raises
        ------
        SearchError
            If the problem does not fit the model's context.
        """
        begin = time.perf_counter()
        params = StepParams(temperature=temperature, max_tokens=max_tokens, delimiter=None)
        (samples,) = self._sampler.sample([Continuation(self._prompt(problem), "", params, n)])
        seconds = (time.perf_counter() - begin) / n
        traces = []
        for sample in samples:
            texts = [text.strip() for text in split_steps(sample.text, _DELIMITER)[0]]
            steps = [self._types.Step(text=text, token_count=0) for text in texts[:-1]]
            steps += [self._types.Step(text=text, token_count=sample.num_tokens) for text in texts[-1:]]
            compute = self._types.Compute(
                policy_gen_tokens=sample.num_tokens, policy_forward_calls=1, wall_seconds=seconds
            )
            traces.append(self._types.Trace(steps=steps, final_answer=None, compute=compute))
        return traces

    def sample_step(
        self, problem: Any, prefix: Sequence[Any], *, n: int, temperature: float, max_tokens: int
    ) -> list[Any]:
        """Sample `n` next steps after a trace's steps, in one batch.

        Raises
        ------
        SearchError
            If the text does not fit the model's context.
        """
        text = "".join(step.text + _DELIMITER for step in prefix)
        params = StepParams(
            temperature=temperature, max_tokens=min(max_tokens, self.max_step_tokens), delimiter=_DELIMITER
        )
        (samples,) = self._sampler.sample([Continuation(self._prompt(problem), text, params, n)])
        return [
            self._types.Step(text=before_delimiter(sample.text, _DELIMITER), token_count=sample.num_tokens)
            for sample in samples
        ]

    def close(self) -> Usage:
        """Forget all problems, and return the cost since the last call."""
        return self._sampler.close()


class ProcessVerifier:
    """Scores the steps of a trace for crucible.

    Parameters
    ----------
    verifier : Verifier
        Scores steps.
    """

    def __init__(self, verifier: Verifier, *, name: str = "tts_search") -> None:
        self.name = name
        self.verifier = verifier
        self._scorer = StepScorer(verifier)

    def score_steps(self, problem: Any, prefix: Sequence[Any]) -> list[float]:
        """Score each step. A blank step has the score of the step before it; if it is the first, 0.0.

        Raises
        ------
        SearchError
            If the text does not fit the model's context.
        """
        return self._scorer.score([(problem.prompt, [step.text for step in prefix])])[0]

    def close(self) -> Usage:
        """Forget all problems, and return the cost since the last call."""
        return self._scorer.close()
