"""Speculation: while a round waits for its slowest candidate, the requests that will probably come next already run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tts_search.engine.drivers import Driver, lift
from tts_search.errors import SearchError
from tts_search.search.moves import foresee
from tts_search.search.protocol import Expand, Score, Usage, usage_of
from tts_search.search.run import Branch, Run
from tts_search.search.types import Step
from tts_search.search.voting import aggregate

__all__ = ["AUTO_ROWS", "Speculation", "can_speculate"]

AUTO_ROWS: Final = 32  # fewer rows add little to a step's time: `benchmarks/bench_engine.py rows` measures it

_AUTO_FLOPS: Final = 1e8  # of a token; with a model of 0.1M parameters, the verifier's smaller forwards cost more
_SHARES: Final = 4  # parts in which a round is read ahead: a forward for each candidate would cost more than it saves
_FORESEEN: Final = ("beam_search", "dvts")  # methods whose next requests follow from ranks
_FIRST: Final = 1 << 31  # first number for those branches of the policy that have no number in a search yet


def can_speculate(policy: Any, verifier: Any, wanted: object) -> bool:
    """Whether a policy can take requests back. For "auto": whether its tokens cost much and the verifier is local."""
    if not wanted or verifier is None or not hasattr(policy, "withdraw"):
        return False
    pays = lift(verifier) is verifier and getattr(policy, "token_flops", math.inf) >= _AUTO_FLOPS
    return wanted != "auto" or pays


class Speculation:
    """Lies between searches and a local policy, and asks the policy ahead of time.

    While a round waits for its slowest candidate, the verifier reads the candidates that have ended. Idle rows sample
    steps below the best `keep` candidates of each group so far. The path of a step fixes its draws, so a step that is
    needed later is exactly the one that was sampled. Other steps are withdrawn as soon as their candidate cannot
    survive. Only beam search and DVTS are predicted, and only without lookahead.

    Parameters
    ----------
    policy : Driver
        A driver with `load` and with `withdraw`, which takes requests back.
    verifier : Driver
        Is asked ahead only for scores that are needed in any case.
    rows : int
        Sample ahead while at most this many streams run at the policy. Never while others wait for room.

    Attributes
    ----------
    used, in_vain : int
        Tokens of steps that were started ahead, summed over all searches: of steps that were requested later, and of
        steps that were not. A step that may still be requested counts in neither.
    """

    def __init__(self, policy: Any, verifier: Driver, rows: int) -> None:
        self._policy, self._verifier, self._rows = policy, verifier, rows
        self.begin = policy.begin
        self._searches: dict[int, _Search] = {}
        self._steps: dict[int, _Step] = {}  # in progress, by the identity of the request
        self._reads: dict[int, tuple[Score, _Candidate]] = {}  # the same
        self._answered: list[_Job] = []
        self._numbers = itertools.count(_FIRST)
        self.used = self.in_vain = 0

    @property
    def is_busy(self) -> bool:
        """Whether steps are on their way, asked for or not."""
        return bool(self._steps or self._answered)

    def follow(self, run: Run) -> None:
        """Start to predict the requests of a search, if that is possible."""
        if run.config.method in _FORESEEN and not run.config.lookahead:
            self._searches[run.problem] = _Search(run)

    def submit(self, requests: Sequence[Any]) -> None:
        """Take requests in, all of a search's round at once. Steps that were asked ahead are not sampled again."""
        search = self._searches.get(requests[0].problem)
        if search is None:
            self._policy.submit(requests)
            return
        search.ended.clear()
        fresh = list(self._taken_in(search, requests))
        self._withdraw(search, list(search.guesses))
        self._policy.submit(fresh)

    def step(self) -> list[tuple[Any, Any]]:
        """Let the policy take a step, and ask ahead; return the requests that are now answered."""
        told = []
        found = [(request, answer, self._steps.pop(id(request), None)) for request, answer in self._policy.step()]
        for request, answer, step in found:
            if step is None:
                told.append((request, answer))
            else:
                self._take(step, answer)
        answered, self._answered = self._answered, []
        for job in answered:
            job.search.num_waiting -= 1
            told.append((job.request, job.error or job.steps))
        self._ask_ahead()
        return told

    def heard(self, request: Any, answer: Any) -> bool:
        """Take an answer of the verifier; False if this object did not ask for it."""
        _, candidate = self._reads.pop(id(request), (None, None))
        if candidate is not None:
            candidate.score = _value(answer, candidate.search.run.config.aggregate)
        return candidate is not None

    def cancel(self, problem: int) -> None:
        """Forget the unanswered requests of a problem."""
        if (search := self._searches.get(problem)) is not None:
            self._withdraw(search, [key for key, step in search.guesses.items() if step.answer is None])
        self._policy.cancel(problem)
        self._steps = {key: step for key, step in self._steps.items() if step.request.problem != problem}
        self._reads = {key: read for key, read in self._reads.items() if read[0].problem != problem}
        self._answered = [job for job in self._answered if job.request.problem != problem]

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Forget branches."""
        search = self._searches.get(problem)
        if search is not None:
            branches = [search.names.pop(branch, branch) for branch in branches]
            self._withdraw(search, [key for key in search.guesses if key.branch in branches])
        self._policy.release(problem, branches)

    def usage(self, problem: int) -> Usage:
        """Return the cost of a problem so far. Speculated steps that were not requested yet count as unused."""
        usage, search = usage_of(self._policy, problem), self._searches.get(problem)
        return usage if search is None else search.told(usage)

    def end(self, problem: int) -> Usage:
        """Forget what is left of a problem, and return its cost."""
        search = self._searches.pop(problem, None)
        if search is None:
            return self._policy.end(problem)  # type: ignore[no-any-return]
        self._withdraw(search, list(search.guesses))
        if any(read.problem == problem for read, _ in self._reads.values()):
            self._verifier.cancel(problem)
        self.cancel(problem)
        return search.told(self._policy.end(problem))

    def _taken_in(self, search: _Search, requests: Iterable[Expand]) -> Iterator[Expand]:
        """Take the requests of a round in, child by child; yield the requests that the policy needs."""
        for request in requests:
            job = _Job(search, request)
            search.num_waiting += 1
            parent = search.names.get(request.branch, request.branch)
            for place, (child, seed) in enumerate(zip(request.children, request.seeds, strict=True)):
                single = replace(request, branch=parent, children=(child,), seeds=(seed,))
                step = search.guesses.pop(_key(single), None)
                if step is None:
                    self._steps[id(single)] = step = _Step(single)
                    yield single
                else:
                    search.names[child] = step.request.children[0]
                step.job, step.place = job, place
                if step.answer is not None:
                    self._take(step, [step.answer])

    def _take(self, step: _Step, answer: Any) -> None:
        """Store a step, or its error. The first error is the answer to its request."""
        job, failed = step.job, isinstance(answer, Exception)
        if job is None:
            if failed:  # the request for this step will get the error
                del self._searches[step.request.problem].guesses[_key(step.request)]
            else:
                (step.answer,) = answer
        elif job.error is None:
            job.steps[step.place] = None if failed else answer[0]
            self.used += 0 if failed or not step.is_ahead else answer[0].num_tokens
            if failed:
                job.error = answer
                self._policy.withdraw([each.request for each in self._steps.values() if each.job is job])
                self._steps = {key: each for key, each in self._steps.items() if each.job is not job}
            else:
                job.search.end(job.request, step.place, answer[0])
            if failed or None not in job.steps:
                self._answered.append(job)

    def _ask_ahead(self) -> None:
        """Use idle rows, and withdraw steps if rows are no longer idle."""
        load = self._policy.load
        room = self._rows - load.rows
        if load.waiting or room < 0:
            for search in self._searches.values():
                self._withdraw(search, [key for key, step in search.guesses.items() if step.answer is None])
            return
        for search in self._searches.values():
            if search.ended and room:
                self._read_ahead(search)
                guesses = list(itertools.islice(self._foreseen(search), room))
                room -= len(guesses)
                for guess in guesses:
                    self._steps[id(guess)] = search.guesses[_key(guess)] = _Step(guess, is_ahead=True)
                if guesses:
                    self._policy.submit(guesses)

    def _read_ahead(self, search: _Search) -> None:
        """Let the verifier read candidates that ended before the last one of their round, in a few parts."""
        unread = [candidate for candidate in search.ended.values() if not candidate.is_asked]
        if not search.num_waiting or len(unread) < max(1, search.run.config.n // _SHARES):
            return
        scores = []
        for candidate in unread:
            branch, parent = candidate.branch, candidate.branch.parent
            assert parent is not None
            if len(branch.steps) > len(parent.steps):
                scores.append(Score(search.run.problem, branch.id, branch.steps, parent.scored_id))
                self._reads[id(scores[-1])] = scores[-1], candidate
            candidate.is_asked = True
        if scores:
            self._verifier.submit(scores)

    def _foreseen(self, search: _Search) -> Iterator[Expand]:
        """Yield requests for steps below likely survivors, the best first.

        Steps below candidates that cannot survive are withdrawn. The steps of a candidate are requested only once, even
        if they were withdrawn.
        """
        best, lost = search.ranked()
        out = {search.names.get(candidate.branch.id, candidate.branch.id) for candidate in lost}
        self._withdraw(search, [key for key in search.guesses if key.branch in out])
        for candidate in best:
            branch = candidate.branch
            while not branch.ended and candidate.num_children < search.family:
                request = foresee(search.run, branch, candidate.num_children, next(self._numbers))
                candidate.num_children += 1
                yield replace(request, branch=search.names.get(branch.id, branch.id))

    def _withdraw(self, search: _Search, keys: Iterable[Expand]) -> None:
        """Withdraw steps that will not be needed."""
        steps = [search.guesses.pop(key) for key in keys]
        running = [step.request for step in steps if step.answer is None]
        for request in running:
            del self._steps[id(request)]
        done = [step for step in steps if step.answer is not None]
        in_vain = sum(step.answer.num_tokens for step in done if step.answer is not None)
        if running:
            in_vain += self._policy.withdraw(running)
        search.in_vain += in_vain
        self.in_vain += in_vain
        if done:
            self._policy.release(search.run.problem, [step.request.children[0] for step in done])


@dataclass(eq=False, slots=True)
class _Step:
    """A step of one child that the policy is asked for, on request or ahead of time."""

    request: Expand
    job: _Job | None = None
    place: int = 0  # its index in the request
    answer: Step | None = None  # until it is requested
    is_ahead: bool = False  # it was started before it was requested


@dataclass(eq=False, slots=True)
class _Job:
    """A request of a search in progress."""

    search: _Search
    request: Expand
    steps: list[Step | None] = field(init=False)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.steps = [None] * len(self.request.children)


@dataclass(eq=False, slots=True)
class _Candidate:
    """A candidate that has ended, as the search will see it.

    Attributes
    ----------
    branch : Branch
        A copy of the search's branch, with the new step.
    is_asked : bool
        Whether the verifier was asked for it.
    score : float or None
        The verifier's answer.
    num_children : int
        Number of steps that were sampled ahead below it.
    """

    search: _Search
    branch: Branch
    is_asked: bool = False
    score: float | None = None
    num_children: int = 0


@dataclass(eq=False, slots=True)
class _Search:
    """A search whose requests are predicted.

    Attributes
    ----------
    run : Run
        The search.
    names : dict
        The policy's number of a branch, if it differs from the search's.
    ended : dict
        The candidates of the round that have ended, by number.
    guesses : dict
        Steps that were sampled ahead and not requested yet.
    num_waiting : int
        Number of unanswered requests.
    in_vain : int
        Number of tokens in withdrawn steps.
    """

    run: Run
    names: dict[int, int] = field(default_factory=dict)
    ended: dict[int, _Candidate] = field(default_factory=dict)
    guesses: dict[Expand, _Step] = field(default_factory=dict)
    num_waiting: int = 0
    in_vain: int = 0

    @property
    def family(self) -> int:
        """The number of children of a survivor, unless fewer candidates survive than allowed."""
        return -(-self.run.config.width // self.run.config.places)

    def told(self, usage: Usage) -> Usage:
        """Return the cost without the tokens of speculated steps that were not requested."""
        guessed = sum(step.answer.num_tokens for step in self.guesses.values() if step.answer is not None)
        ahead = self.in_vain + guessed
        return replace(usage, tokens=max(0, usage.tokens - ahead), speculated_tokens=ahead)

    def end(self, request: Expand, place: int, step: Step) -> None:
        """Record that a candidate has ended."""
        branch = self.run.branches[request.children[place]]
        with suppress(SearchError):  # the search will handle it
            self.ended[branch.id] = _Candidate(self, self.run.foreseen(branch, step, request.params.delimiter))

    def ranked(self) -> tuple[list[_Candidate], list[_Candidate]]:
        """The candidates that would survive now, the best first, and those that cannot survive any more."""
        config, groups = self.run.config, dict[int, list[_Candidate]]()
        for candidate in self.ended.values():
            leaves = candidate.branch.ended and config.completed == "leave"
            if candidate.score is not None and not leaves:
                groups.setdefault(candidate.branch.path[0] // config.width, []).append(candidate)
        for group in groups.values():
            group.sort(key=_rank)
        best = [candidate for group in groups.values() for candidate in group[: config.places]]
        return sorted(best, key=_rank), [each for group in groups.values() for each in group[config.places :]]


def _rank(candidate: _Candidate) -> tuple[float, int]:
    assert candidate.score is not None
    return -candidate.score, candidate.branch.id


def _key(request: Expand) -> Expand:
    """The key that is equal for requests with the same answer."""
    return replace(request, children=())


def _value(scores: Any, how: str) -> float:
    """The aggregate of a candidate's scores. Invalid scores give the lowest value; the search will find them."""
    value = -math.inf
    if not isinstance(scores, Exception):
        with suppress(TypeError, ValueError):
            value = float(aggregate(scores, how))
    return value if value == value else -math.inf
