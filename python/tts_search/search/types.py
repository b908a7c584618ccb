"""The inputs and outputs of a search: steps, the requests that a text policy answers, completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Completion", "Messages", "Step", "StepParams", "StepRequest"]

Messages = Sequence[Mapping[str, str]]
"""A conversation: "role" and "content" of each message, the last one a user's."""


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of reasoning as a policy generated it.

    Attributes
    ----------
    text : str
        The raw text, its delimiter included where it ended at one: joining a branch's steps gives its text.
    finished : bool
        Whether the answer ends here. This alone ends a branch; with an empty text it adds no step.
    num_tokens : int
        How many tokens were sampled; 0 if unknown (token limits over a branch then have nothing to count).
    logprob : float or None
        Sum of the log-probabilities of the sampled tokens, if known.
    reason : str
        Why sampling stopped: ``"stop"`` (at the delimiter), ``"eos"`` or ``"length"``.
    """

    text: str
    finished: bool
    num_tokens: int = 0
    logprob: float | None = None
    reason: str = "stop"


@dataclass(frozen=True, slots=True)
class StepParams:
    """How a step is sampled.

    Attributes
    ----------
    temperature : float
        0 takes the most likely token.
    top_p : float
        1.0 switches it off.
    top_k : int
        0 switches it off.
    max_tokens : int
        At most so many tokens.
    delimiter : str or None
        What ends a step; None: run to the end of the answer.
    """

    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 2048
    delimiter: str | None = "\n\n"


@dataclass(frozen=True, slots=True)
class StepRequest:
    """What a text policy is asked for: `num_samples` next steps after `steps`.

    Attributes
    ----------
    problem : str
        The problem's text.
    steps : tuple of str
        The steps so far, raw; joined, they are the text to continue.
    num_samples : int
        How many independent samples to return.
    branch : int
        Number of the branch that is continued, unique within its problem (a server may key its cache by it).
    seeds : tuple of int
        One per sample, ``0 <= seed < 2**63``.
    params : StepParams
        How to sample.
    """

    problem: str
    steps: tuple[str, ...]
    num_samples: int
    branch: int
    seeds: tuple[int, ...]
    params: StepParams


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer that a search came to.

    Attributes
    ----------
    text : str
        The whole text; ``"".join(steps)``.
    steps : tuple of str
        The text cut into steps, none of them blank.
    step_scores : tuple of float
        The verifier's scores when it last read this branch: one per step, then one for each step of lookahead that it
        read. Without a verifier, empty.
    score : float
        Aggregate of `step_scores`; -inf without any step, NaN without a verifier.
    finished : bool
        Whether the policy ended the answer (else a limit on steps or tokens did).
    num_tokens : int
        Tokens sampled on the way from the problem to the end of this answer.
    answer : str
        What ``extract_answer`` found in the text; empty if nothing.
    """

    text: str
    steps: tuple[str, ...]
    step_scores: tuple[float, ...]
    score: float
    finished: bool
    num_tokens: int
    answer: str
