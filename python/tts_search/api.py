"""The functions that a user calls."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypedDict

from tts_search.engine.engine import default_equality
from tts_search.engine.scheduler import Scheduler, SearchOutcome, Speculate
from tts_search.errors import SearchError
from tts_search.search import voting
from tts_search.search.answers import Equality, boxed
from tts_search.search.config import Completed, SearchConfig
from tts_search.search.protocol import Policy, Verifier
from tts_search.search.result import SearchResult
from tts_search.search.stats import SearchStats
from tts_search.search.types import Completion

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tts_search.strategy import Choice, Strategy
from tts_search.terminal import progress_bar

__all__ = ["asearch_iter", "beam_search", "best_of_n", "dvts", "search", "search_iter", "vote"]

_DEFAULT = SearchConfig()
_PATIENCE: Final = 0.1  # seconds without an answer after which `search_with` looks whether it is stopped


def search_iter(
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier | None = None,
    config: SearchConfig | Strategy = _DEFAULT,
    *,
    extract_answer: Callable[[str], str | None] = boxed,
    equal: Equality | None = None,
    progress: bool = True,
    max_in_flight: int | None = None,
    max_rows: int | None = None,
    prefix_cache: bool = True,
    speculate: Speculate = "auto",
) -> Iterator[SearchOutcome]:
    """Search many problems; yield (index, result) as they finish, in any order.

    A problem that fails yields (index, :class:`SearchError`), and the others go on. Results that were yielded are not
    lost if anything goes wrong later, even at Ctrl-C.

    Parameters
    ----------
    problems : iterable of str
        The problems' texts. Each is read when there is room for it.
    policy : Policy
        Generates steps: :class:`TextPolicy`, :class:`HFPolicy`, or anything that follows the protocol.
    verifier : Verifier or None
        Scores steps. Best-of-N works without one (scores are NaN then, and only majority votes).
    config : SearchConfig or Strategy
        How to search. A :class:`~tts_search.strategy.Strategy` chooses a search for each problem by its difficulty. All
        problems are then read at once, and the cost of the estimate is included in the stats of the results.
    extract_answer : callable
        Takes the answer out of a completion's text.
    equal : callable or None
        Whether two answers, of which the first is known, mean the same; by default :func:`tts_search.equivalent`.
    progress : bool
        Show a progress bar on stderr, if that is a terminal and rich is installed.
    max_in_flight : int or None
        The largest number of problems that are searched at the same time; by default as many as there is room for.
    max_rows : int or None
        There is room for a problem while fewer than this many steps run or wait at the policy, and fewer than this
        many candidates at the verifier. By default 1024. More rows make larger batches and need more memory.
    prefix_cache : bool
        Whether local models keep the KV of released texts as long as there is room, and use it again for a text that
        begins with the same tokens.
    speculate : {"auto"} or bool
        Whether steps are sampled, and candidates read, before they are asked for, as :class:`Engine` says.

    Raises
    ------
    SearchError
        At once, if the arguments do not go together.
    """
    return _outcomes(
        problems,
        policy,
        verifier,
        config,
        lambda: False,
        extract_answer=extract_answer,
        equal=equal,
        progress=progress,
        max_in_flight=max_in_flight,
        max_rows=max_rows,
        prefix_cache=prefix_cache,
        speculate=speculate,
    )


class EngineOptions(TypedDict, total=False):
    """Options of :func:`search_iter`, except the problems, the models and the config."""

    extract_answer: Callable[[str], str | None]
    equal: Equality | None
    progress: bool
    max_in_flight: int | None
    max_rows: int | None
    prefix_cache: bool
    speculate: Speculate


def asearch_iter(
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier | None = None,
    config: SearchConfig | Strategy = _DEFAULT,
    **options: Unpack[EngineOptions],
) -> AsyncIterator[SearchOutcome]:
    """Search many problems as :func:`search_iter` does, for asyncio: the models run in a thread.

    The problems are read in that thread. Closing the iterator, or cancelling the task that waits for it, ends the
    problems in flight before their next token.

    Raises
    ------
    SearchError
        At once, if the arguments do not go together.
    """
    stop = threading.Event()
    return _in_thread(_outcomes(problems, policy, verifier, config, stop.is_set, **options), stop)


async def _in_thread(outcomes: Iterator[SearchOutcome], stop: threading.Event) -> AsyncIterator[SearchOutcome]:
    """Advance an iterator in its own thread. The iterator ends soon after `stop` is set."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, "tts_search.asearch_iter") as thread:
        try:
            while (outcome := await loop.run_in_executor(thread, next, outcomes, None)) is not None:
                yield outcome
        finally:
            stop.set()
            await asyncio.shield(loop.run_in_executor(thread, outcomes.close))  # type: ignore[attr-defined]


def _outcomes(
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier | None,
    config: SearchConfig | Strategy,
    stopped: Callable[[], bool],
    *,
    extract_answer: Callable[[str], str | None] = boxed,
    equal: Equality | None = None,
    progress: bool = True,
    **engine: Any,
) -> Iterator[SearchOutcome]:
    """The outcomes of `search_iter`. If it is `stopped`, only those of the problems that end before."""
    if isinstance(problems, str):
        raise SearchError("problems: expected a list of texts, got one text")
    for own in [config] if isinstance(config, SearchConfig) else _configs_of(config):
        if verifier is None and own.needs_verifier:
            raise SearchError(f"verifier: {own.method} needs one, got None; only best_of_n works without")
    scheduler = Scheduler(policy, verifier, extract_answer, equal or default_equality(), **engine)
    note = LoadNote(scheduler)

    def searched(problems: Iterable[str], config: SearchConfig) -> Iterator[SearchOutcome]:
        total = len(problems) if isinstance(problems, Sized) else None
        with progress_bar(total, enabled=progress, label=config.method_name) as bar:

            def is_over() -> bool:
                bar.tell(note)
                return stopped()

            with closing(search_with(scheduler, problems, config, is_over)) as outcomes:
                for outcome in outcomes:
                    bar.advance()
                    yield outcome

    return searched(problems, config) if isinstance(config, SearchConfig) else _by_strategy(problems, config, searched)


def search_with(
    scheduler: Scheduler, problems: Iterable[str], config: SearchConfig, stopped: Callable[[], bool]
) -> Generator[SearchOutcome, None, None]:
    """Search problems, each read when there is room. At the end, or when `stopped`, end those in flight."""
    waiting = enumerate(problems)
    try:
        while not stopped():
            while scheduler.has_room and (entry := next(waiting, None)) is not None:
                yield from scheduler.start(*entry, config)
            if not scheduler.num_problems:
                return
            with scheduler.wake:
                scheduler.wake.wait_for(lambda: not scheduler.is_idle, _PATIENCE)
            yield from scheduler.step()
    finally:
        scheduler.close()


class LoadNote:
    """The load of a scheduler as a few words; its tokens a second are those since the note before."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._before = self._now()

    def __call__(self) -> str:
        load = self._scheduler.load
        if load is None:
            return f"{self._scheduler.num_streams} steps on their way"
        now, before = self._now(), self._before
        self._before = now
        speed = (now[1] - before[1]) / max(1e-9, now[0] - before[0])
        kv = load.kv_tokens / load.max_kv_tokens
        return f"{speed:,.0f} tokens/s, {load.rows} of {load.max_rows} rows, KV {kv:.0%}"

    def _now(self) -> tuple[float, int]:
        """The time, and the tokens so far."""
        load = self._scheduler.load
        return time.perf_counter(), 0 if load is None else load.tokens


def _configs_of(strategy: Strategy) -> Iterator[SearchConfig]:
    """Yield the configs that a strategy may choose: its probe, and one for a problem of each bin."""
    if strategy.probe is None:
        yield strategy.choose(None).config
        return
    yield strategy.probe
    for pass_rate in (1.0, 0.3, 0.0):  # easy, medium, hard
        yield strategy.choose(pass_rate).config


def _by_strategy(
    problems: Iterable[str], strategy: Strategy, searched: Callable[[list[str], SearchConfig], Iterator[SearchOutcome]]
) -> Iterator[SearchOutcome]:
    """Probe all problems if the strategy needs it, then search the problems with the same choice together."""
    problems = list(problems)
    rates: dict[int, float | None] = dict.fromkeys(range(len(problems)))
    spent = dict.fromkeys(range(len(problems)), SearchStats())
    if strategy.probe is not None:
        for index, outcome in searched(problems, strategy.probe):
            if isinstance(outcome, SearchError):
                del rates[index]
                yield index, outcome
            else:
                rates[index], spent[index] = strategy.estimate(outcome), outcome.stats
    groups: dict[Choice, list[int]] = {}
    for index, rate in rates.items():
        groups.setdefault(strategy.choose(rate), []).append(index)
    for choice, indices in groups.items():
        own = [problems[index] for index in indices]
        for number, outcome in searched(own, choice.config):
            index = indices[number]
            if isinstance(outcome, SearchError):
                outcome.problem = index
                yield index, outcome
            else:
                yield index, replace(outcome, vote=choice.vote, stats=spent[index] + outcome.stats)


def search(
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier | None = None,
    config: SearchConfig | Strategy = _DEFAULT,
    **options: Unpack[EngineOptions],
) -> list[SearchResult]:
    r"""Search problems and return their results in order; arguments as for :func:`search_iter`.

    Raises
    ------
    SearchError
        The first failure of a problem. Use :func:`search_iter` to keep the results of the others.

    Examples
    --------
    >>> from tts_search import Step, TextPolicy, TextVerifier, search
    >>> policy = TextPolicy(lambda reqs: [[Step("so \\boxed{2}", True)] * r.num_samples for r in reqs])
    >>> verifier = TextVerifier(lambda branches: [[0.9] * len(steps) for _, steps in branches])
    >>> search(["What is 1 + 1?"], policy, verifier)[0].answer()
    '2'
    """
    results: dict[int, SearchResult] = {}
    outcomes = search_iter(problems, policy, verifier, config, **options)
    for index, outcome in outcomes:
        if isinstance(outcome, SearchError):
            outcomes.close()  # type: ignore[attr-defined]
            raise outcome
        results[index] = outcome
    return [results[index] for index in sorted(results)]


class SamplingOptions(EngineOptions, total=False):
    """Options of every method: fields of :class:`~tts_search.SearchConfig`, and of :func:`search`."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    max_step_tokens: int
    max_tokens: int | None
    delimiter: str
    stop_text: str | None
    aggregate: str
    seed: int


class BestOfNOptions(SamplingOptions, total=False):
    """Options of :func:`best_of_n`."""

    sort_completed: bool
    agree_margin: int | None


class BeamOptions(SamplingOptions, total=False):
    """Options of :func:`beam_search` and :func:`dvts`."""

    expand: int
    keep: int | None
    max_steps: int
    completed: Completed
    dedupe: bool
    lookahead: int
    sort_completed: bool
    stop_when_full: bool
    agree_margin: int | None
    budget_tokens: int | None


def best_of_n(
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier | None = None,
    *,
    config: SearchConfig = _DEFAULT,
    **options: Unpack[BestOfNOptions],
) -> list[SearchResult]:
    """Search by best-of-N: :func:`search` with ``SearchConfig("best_of_n", ...)``.

    Options are fields of :class:`~tts_search.SearchConfig` (``n=64``, ``temperature=0.7``, ...). Fields that are not
    given are those of `config`. The other arguments are those of :func:`search`.

    Raises
    ------
    SearchError
        As :func:`search` does.
    ConfigError
        If an option has a value that it cannot have, or the method does not use it.
    """
    return _search_by("best_of_n", config, problems, policy, verifier, options)


def beam_search(
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier,
    *,
    config: SearchConfig = _DEFAULT,
    **options: Unpack[BeamOptions],
) -> list[SearchResult]:
    """Search by beam search; arguments as for :func:`best_of_n`.

    Raises
    ------
    SearchError, ConfigError
        As :func:`best_of_n` does.
    """
    return _search_by("beam_search", config, problems, policy, verifier, options)


def dvts(
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier,
    *,
    config: SearchConfig = _DEFAULT,
    **options: Unpack[BeamOptions],
) -> list[SearchResult]:
    """Search by diverse verifier tree search; arguments as for :func:`best_of_n`.

    Raises
    ------
    SearchError, ConfigError
        As :func:`best_of_n` does.
    """
    return _search_by("dvts", config, problems, policy, verifier, options)


def _search_by(
    method: str,
    config: SearchConfig,
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier | None,
    options: Mapping[str, Any],
) -> list[SearchResult]:
    engine = {name: value for name, value in options.items() if name in EngineOptions.__annotations__}
    fields = {name: value for name, value in options.items() if name not in engine}
    return search(problems, policy, verifier, config.with_method(method, **fields), **engine)


def vote(completions: Sequence[Completion], how: str, default: str = "last", *, exact: bool = False) -> str:
    """Return the answer that a vote elects.

    Completions without an answer do not vote; answers that mean the same (:func:`tts_search.equivalent`) count as one,
    in the spelling that comes first. Ties go to the answer that comes first.

    Parameters
    ----------
    completions : sequence of Completion
        Who votes, in order.
    how : str
        ``"majority"``: the most frequent answer. ``"prm_max"``: the answer with the highest score. ``"prm_vote"``: the
        one with the highest sum of scores. ``"prm_min_max"``, ``"prm_mean_vote"``, ...: the same by another aggregate
        of the step scores.
    default : str
        The aggregate of ``prm_max`` and ``prm_vote``.
    exact : bool
        Answers count as one only if their texts are equal.

    Returns
    -------
    str
        The answer; empty if no completion has one.

    Raises
    ------
    ValueError
        If there is no such vote, or it needs scores and there are none.
    """
    return voting.vote(completions, how, default, exact=exact, equal=default_equality())
