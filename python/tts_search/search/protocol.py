"""The requests of search algorithms, and the policies and verifiers that answer them.

An algorithm is a generator for one problem. It yields lists of requests of one kind and is sent the list of their
answers; it does no I/O, knows no model and no other problem::

    requests -> answers
    [Expand, ...] -> [list of Step, one for each child]
    [Score, ...] -> [list of float, one for each step, or an exception]
    [ScoreAndPrune, ...] -> [Scored, ...]
    [Release, ...] -> [None, ...]

An engine merges the requests of many problems into one call of a :class:`Policy` or a :class:`Verifier`. If a single
request cannot be answered (its text is too long, say), the driver answers it, or one candidate of it, with an exception
*instance*, and answers the others as usual. A candidate without scores for such a reason ranks last and is not
continued. A problem fails if its policy fails, or if no candidate of a round has scores.

Branches are nodes of a problem's search tree, and are named by numbers that are unique within the problem. Node 0 is
the root: the problem itself, without any step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import chain
from typing import Any, Protocol, TypeVar, runtime_checkable

from tts_search.search.types import Step, StepParams

__all__ = [
    "Concurrent",
    "Expand",
    "Generate",
    "GenerateParams",
    "Generated",
    "Lifetime",
    "Load",
    "Policy",
    "PruningVerifier",
    "Release",
    "Request",
    "Score",
    "ScoreAndPrune",
    "Scored",
    "Stepwise",
    "Usage",
    "Verifier",
    "answers_of",
    "usage_of",
]

Asked = TypeVar("Asked", contravariant=True)


@dataclass(frozen=True, slots=True)
class Expand:
    """Sample one step for each child of a branch. Answer: a list of :class:`~tts_search.Step`, one for each child.

    Attributes
    ----------
    problem : int
        Index of the problem in this run.
    branch : int
        The parent.
    children : tuple of int
        The numbers of the new nodes, in candidate order.
    steps : tuple of str
        The texts on the parent's path as they were generated.
    seeds : tuple of int
        One seed for each child, ``0 <= seed < 2**63``. The child's draws depend on nothing else.
    params : StepParams
        How to sample.
    """

    problem: int
    branch: int
    children: tuple[int, ...]
    steps: tuple[str, ...]
    seeds: tuple[int, ...]
    params: StepParams


@dataclass(frozen=True, slots=True)
class Score:
    """Score the steps of a branch. Answer: a list of float, one for each of `steps`, then one for each of `lookahead`.

    Attributes
    ----------
    problem : int
        Index of the problem in this run.
    branch : int
        The branch that `steps` lead to; it may be a `parent` later.
    steps : tuple of str
        All steps from the root to the branch, none of them blank.
    parent : int
        A node whose steps are a proper prefix of `steps`: it was scored before, or is the root 0.
    lookahead : tuple of str
        Steps to read after `steps` that do not belong to the branch: a child of `branch` continues from the end of
        `steps`.
    """

    problem: int
    branch: int
    steps: tuple[str, ...]
    parent: int
    lookahead: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreAndPrune:
    """Score the candidates of a round and name the best of each group. Answer: a :class:`Scored`.

    Attributes
    ----------
    problem : int
        Index of the problem in this run.
    candidates : tuple of Score or float
        For each candidate, the request to score it, or its score if it has no new step.
    groups : tuple of tuple of int
        The candidates that compete with each other, as indices in `candidates`. A candidate in no group is only scored.
    keep : tuple of int
        How many of each group survive.
    how : str
        The aggregate of a candidate's scores (including those of its lookahead) that decides.
    """

    problem: int
    candidates: tuple[Score | float, ...]
    groups: tuple[tuple[int, ...], ...]
    keep: tuple[int, ...]
    how: str


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores and survivors of a round.

    Attributes
    ----------
    scores : sequence of (sequence of float or Exception)
        The answer to each :class:`Score` among the candidates, in order.
    survivors : sequence of sequence of int or None
        The best of each group, best first, as indices in the candidates. Ties go to the candidate that comes first in
        the group. None: the caller has to find them.
    """

    scores: Sequence[Sequence[float] | Exception]
    survivors: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """These branches will not be expanded or scored again, nor be a parent. (Their children may be.) Answer: None."""

    problem: int
    branches: tuple[int, ...]


Request = Expand | Score | ScoreAndPrune | Release


@dataclass(frozen=True, slots=True)
class GenerateParams:
    """How text is generated, and what is reported about it.

    Attributes
    ----------
    temperature, top_p, top_k, min_p : float, float, int, float
        As for :func:`tts_kernels.sample`. Temperature 0 takes the most likely token. top_p 1, top_k 0 and min_p 0
        switch these options off.
    max_tokens : int or None
        The largest number of tokens; None: as many as there is room for.
    stop : tuple of str
        Pieces of text that end the sample, however they are cut into tokens.
    stop_ids : tuple of int
        Tokens that end the sample.
    ignore_eos : bool
        Continue after the end of the answer.
    keep_stop : bool
        Whether the text includes the piece of text that ended it.
    logprobs : int or None
        None: no log-probabilities. k, at most 128: those of each token, and of the k likeliest tokens at its place.
    logprobs_of : tuple of int
        Tokens whose log-probabilities are reported at the place of each token, after the likeliest tokens.
    prompt_logprobs : int or None
        The same for the tokens of the prompt, from the second on: the k likeliest tokens at the place of each.
    min_tokens : int
        Before this many tokens nothing ends the sample: tokens that would end it are not drawn, and pieces of text in
        `stop` are ignored.
    stream : bool
        Report each token as it comes; else the whole sample at its end.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    keep_stop: bool = False
    logprobs: int | None = None
    logprobs_of: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Generate:
    """Generate text after given tokens, for drivers of local models. Answers: a :class:`Generated` for each new part.

    The last answer of each sample has a reason. If an answer is an exception, it ends the request.

    Attributes
    ----------
    tokens : tuple of int
        The tokens to continue.
    params : GenerateParams
        How to generate.
    num_samples : int
        How many texts to generate.
    seeds : tuple of int
        One seed for each sample, ``0 <= seed < 2**63``. The sample's draws depend on nothing else.
    problem : int
        A number by which the request can be cancelled. It is unique among requests and problems; the engine sets it.
    """

    tokens: tuple[int, ...]
    params: GenerateParams
    num_samples: int
    seeds: tuple[int, ...]
    problem: int = -1


@dataclass(frozen=True, slots=True)
class Generated:
    """A part of a sample: the text and tokens since the part before.

    Attributes
    ----------
    sample : int
        Which one.
    text : str
        Whole characters, without text that a stop may still remove. All parts together are the sample's text.
    tokens : tuple of int
        The tokens as they were drawn, including the token that ended the sample.
    logprobs : tuple of float
        For each of these tokens, under the model's own distribution; empty if they were not requested.
    top : tuple of tuple of (int, float)
        For each of these tokens, the likeliest tokens at its place, best first, with their log-probabilities; empty if
        they were not requested.
    reason : str or None
        None: the sample goes on. ``"eos"``, ``"stop"`` or ``"length"``: this is its last part.
    stop : int or str or None
        The token or the text that ended the sample.
    cached_tokens : int
        In the last part: how many tokens of the prompt were not processed, because the cache held them.
    prompt : tuple of (float, tuple of (int, float))
        In the first part of sample 0, if requested: for each prompt token from the second on, its log-probability and
        the likeliest tokens at its place.
    """

    sample: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    reason: str | None = None
    stop: int | str | None = None
    cached_tokens: int = 0
    prompt: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Generated]) -> Generated:
        """Return the parts of a sample, in order, as one."""
        last = parts[-1]
        if len(parts) == 1:
            return last
        tokens, logprobs, top = (
            tuple(chain.from_iterable(getattr(part, name) for part in parts)) for name in ("tokens", "logprobs", "top")
        )
        text, prompt = "".join(part.text for part in parts), parts[0].prompt
        return replace(last, text=text, tokens=tokens, logprobs=logprobs, top=top, prompt=prompt)


@dataclass(frozen=True, slots=True)
class Usage:
    """The cost of a problem for a driver, so far or in the end.

    Attributes
    ----------
    tokens : int
        Tokens sampled (a policy) or read in steps (a verifier), each counted once.
    prefill_tokens : int
        Tokens of the prompt that were forwarded; not among `tokens`.
    flops : float
        Floating-point operations of all forwards.
    peak_unique_kv_tokens : int
        The largest number of KV cache slots in use at once.
    peak_logical_kv_tokens : int
        The same without sharing: the largest sum of the lengths of the live branches.
    peak_kv_bytes : int
        The bytes of keys and values in `peak_unique_kv_tokens` slots. With a block cache: the largest number of bytes
        in use at once, for full blocks and for tokens that are not quantised.
    recomputed_tokens : int
        Tokens forwarded again because their KV cache had to be given up: for lack of memory, or because the branch
        became longer than the length up to which a ``longrope`` model has its first rotary factors.
    waves : int
        How many times a step gave up its KV cache because memory was full, and waited.
    cached_tokens : int
        Tokens that were not forwarded because the cache still held them, from this problem or another.
    speculated_tokens : int
        Tokens sampled ahead for steps that nobody asked for; not among `tokens`.
    unique_kv_tokens, logical_kv_tokens : int
        KV cache slots in use now, and the number without sharing. Both are 0 at the end.
    """

    tokens: int = 0
    prefill_tokens: int = 0
    flops: float = 0.0
    peak_unique_kv_tokens: int = 0
    peak_logical_kv_tokens: int = 0
    peak_kv_bytes: int = 0
    recomputed_tokens: int = 0
    waves: int = 0
    cached_tokens: int = 0
    speculated_tokens: int = 0
    unique_kv_tokens: int = 0
    logical_kv_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Return what both cost, held side by side: the peaks add up, too."""
        return Usage(*(mine + yours for mine, yours in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a local model is. A driver that knows has it as its attribute `load`.

    Attributes
    ----------
    tokens : int
        Tokens sampled, or read, since it was made.
    rows, max_rows : int
        Texts that run now, and the most that can.
    waiting : int
        Texts for which there is no room now.
    kv_tokens, max_kv_tokens : int
        Slots of the KV pool whose pages are taken, and all of them. What is kept for later counts as taken.
    waves : int
        How many times, since it was made, a text gave up its KV cache because memory was full, and waited.
    """

    tokens: int
    rows: int
    max_rows: int
    kv_tokens: int
    max_kv_tokens: int
    waiting: int = 0
    waves: int = 0


class Lifetime(Protocol):
    """How a policy or a verifier hears of a problem and of its branches, and forgets them.

    `problem` is a number: the same from `begin` to `end`, unique among the problems in flight.
    """

    def begin(self, problem: int, text: Any) -> None:
        """Announce a problem: a text or, for a policy that reads conversations, messages. Its root is node 0."""

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Forget these branches."""

    def end(self, problem: int) -> Usage:
        """Forget what is left of the problem and say what it cost."""


@runtime_checkable
class Policy(Lifetime, Protocol):
    """Generates steps."""

    def expand(self, requests: Sequence[Expand]) -> Sequence[Sequence[Step] | Exception]:
        """Answer requests of any number of problems, in order."""


@runtime_checkable
class Verifier(Lifetime, Protocol):
    """Scores steps. It is asked to release only branches that it has scored."""

    def score(self, requests: Sequence[Score]) -> Sequence[Sequence[float] | Exception]:
        """Answer requests of any number of problems, in order."""


@runtime_checkable
class PruningVerifier(Verifier, Protocol):
    """A verifier that can score and prune in one call. Of any other one the engine asks the scores alone."""

    def score_and_prune(self, requests: Sequence[ScoreAndPrune]) -> Sequence[Scored | Exception]:
        """Answer requests of any number of problems, in order."""


class Concurrent(Lifetime, Protocol):
    """A policy or a verifier, usually on a server, that answers many requests at the same time on an event loop.

    An engine calls `answer` of it in place of ``expand`` or ``score``. So no problem waits for another, and a request
    that is cancelled is broken off.
    """

    @property
    def is_concurrent(self) -> bool:
        """Whether it does so; False: it is used like any other policy or verifier."""

    async def answer(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Answer one request to a policy, or those that a problem has to a verifier, in order.

        It is called again before the calls before have ended. A call that is cancelled frees what it holds.
        """

    async def hang_up(self) -> None:
        """Free what the running event loop is used for, such as connections; there may be another loop later."""


class Stepwise(Protocol[Asked]):
    """A driver that answers requests one by one, as they come to their ends."""

    def submit(self, requests: Sequence[Asked]) -> None:
        """Take requests in."""

    def step(self) -> Sequence[tuple[Any, Any]]:
        """Get on with what was submitted; pairs of a request, the very object, and its answer or exception."""

    def cancel(self, problem: int) -> None:
        """Forget the requests of a problem that are not answered yet."""


def usage_of(driver: Any, problem: int) -> Usage:
    """Return the cost of a problem so far, from the driver's method `usage`; without this method, zeros."""
    count: Callable[[int], Usage] | None = getattr(driver, "usage", None)
    return Usage() if count is None else count(problem)


def answers_of(driver: Stepwise[Any], requests: Sequence[Any]) -> list[Any]:
    """Submit requests and step until all of them are answered; the answers, in order."""
    answers: dict[int, Any] = {}
    try:
        driver.submit(requests)
        while len(answers) < len(requests):
            answers |= {id(request): answer for request, answer in driver.step()}
    except BaseException:
        for problem in {request.problem for request in requests}:
            driver.cancel(problem)
        raise
    return [answers[id(request)] for request in requests]
