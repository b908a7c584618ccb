"""The requests that a policy of a local model is working on, and the streams that grow for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from tts_search.models.branches import TokenBranch
from tts_search.models.known import KnownBranches
from tts_search.models.texts import TextStream
from tts_search.policies.prompt import at_a_word
from tts_search.search.protocol import Expand, Generate, Generated
from tts_search.search.types import Step

__all__ = ["SampleJob", "SampleStream", "SampledProblem", "StepStream", "fault_of"]


@dataclass(slots=True)
class SampledProblem:
    """A problem in flight.

    Attributes
    ----------
    root : TokenBranch
        Its prompt.
    known : KnownBranches
        The branches that requests may continue.
    sampled : int
        Tokens sampled so far.
    """

    root: TokenBranch
    known: KnownBranches[str, TokenBranch] = field(init=False)
    sampled: int = 0

    def __post_init__(self) -> None:
        self.known = KnownBranches("", self.root, at_a_word)


@dataclass(slots=True, eq=False)
class SampleJob:
    """One request in progress.

    Attributes
    ----------
    request : Expand or Generate
        The request.
    state : SampledProblem
        The problem of the request; a `Generate` has one of its own.
    parent : TokenBranch
        The branch that its samples continue.
    children, running : list, set of TextStream
        The samples, and those of them that have not ended.
    error : Exception or None
        The reason why it cannot be answered.
    """

    request: Expand | Generate
    state: SampledProblem
    parent: TokenBranch
    children: list[TextStream] = field(default_factory=list)
    running: set[TextStream] = field(default_factory=set)
    error: Exception | None = None

    def branch(self) -> TokenBranch:
        """The branch in which a child grows."""
        return TokenBranch(self.parent.meter, self.parent, self.parent.length)


@dataclass(slots=True, eq=False)
class StepStream(TextStream):
    """A step in progress, for a job."""

    job: SampleJob = field(repr=False)

    @property
    def step(self) -> Step:
        """The finished step. A branch ends with its answer, when its context is full, or if the step has no text."""
        if self.reason is None:  # the context had no room for a single token
            return Step("", True, reason="length")
        assert isinstance(self.job.request, Expand)
        full = self.limit < self.job.request.params.max_tokens and self.num_tokens == self.limit
        finished = self.reason == "eos" or (self.reason == "length" and (full or not self.said))
        return Step(self.said, finished, self.num_tokens, self.logprob, self.reason)


@dataclass(slots=True, eq=False)
class SampleStream(TextStream):
    """A sample of a `Generate` in progress.

    Attributes
    ----------
    job : SampleJob
        The request.
    number : int
        Which of the job's samples it is.
    news : dict of SampleStream to None
        The samples of the policy that have something new to report; this sample adds itself.
    """

    job: SampleJob = field(repr=False)
    number: int
    news: dict[SampleStream, None] = field(repr=False)
    seen: int = field(init=False, default=0)  # tokens that were checked
    told: int = field(init=False, default=0)  # characters that were reported
    part: Generated = field(init=False)

    def __post_init__(self) -> None:
        self.part = Generated(self.number, "")

    def ends(self) -> bool:
        """Whether it ends with its newest token. Collects the news."""
        assert isinstance(self.job.request, Generate)
        params, part = self.job.request.params, self.part
        fresh = tuple(self.branch.tokens[self.seen :])
        over = TextStream.ends(self)
        self.seen = len(self.branch.tokens)
        end = len(self.said) if over else max(self.told, self.stops.safe(self.said))
        self.part = replace(
            part,
            text=part.text + self.said[self.told : end],
            tokens=part.tokens + fresh,
            logprobs=part.logprobs if params.logprobs is None else (*part.logprobs, self.last_logprob),
            top=(*part.top, tuple(self.top)) if self.tells else part.top,
            reason=self.reason,
            stop=self.stop,
            cached_tokens=self.job.state.root.meter.cached if over else 0,
        )
        self.told = end
        if over or params.stream:
            self.news[self] = None
        return over

    def tell(self) -> Generated:
        """The news since the last call."""
        told, self.part = self.part, Generated(self.number, "")
        return told


def fault_of(request: Generate, vocabulary: int) -> str:
    """Why the kernels would refuse a request; empty if they would not. A refusal fails the whole batch."""
    params = request.params
    checks = (
        (
            len(request.seeds) == request.num_samples,
            f"seeds: expected {request.num_samples}, one per sample",
            len(request.seeds),
        ),
        (
            all(0 <= token < vocabulary for token in request.tokens),
            f"tokens: expected ids from 0 to {vocabulary - 1}",
            "others",
        ),
        (params.max_tokens is None or params.max_tokens >= 1, "max_tokens: expected at least 1", params.max_tokens),
        (all(params.stop), "stop: expected texts that are not empty", params.stop),
        (0 <= params.temperature < math.inf, "temperature: expected a finite number >= 0", params.temperature),
        (0 < params.top_p <= 1, "top_p: expected a number in (0, 1]", params.top_p),
        (params.top_k >= 0, "top_k: expected an int >= 0", params.top_k),
        (0 <= params.min_p <= 1, "min_p: expected a number in [0, 1]", params.min_p),
        (0 <= (params.logprobs or 0) <= 128, "logprobs: expected an int from 0 to 128", params.logprobs),
        ((params.prompt_logprobs or 0) >= 0, "prompt_logprobs: expected an int >= 0", params.prompt_logprobs),
        (params.min_tokens >= 0, "min_tokens: expected an int >= 0", params.min_tokens),
        (
            all(0 <= token < vocabulary for token in params.logprobs_of),
            f"logprobs_of: expected ids from 0 to {vocabulary - 1}",
            params.logprobs_of,
        ),
    )
    return next((f"{expected}, got {got!r:.200}" for holds, expected, got in checks if not holds), "")
