"""The functions that a user calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from tts_search.engine.engine import Engine
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

__all__ = ["beam_search", "best_of_n", "dvts", "search", "search_iter", "vote"]

BRANCHES_IN_FLIGHT = 1024  # of all problems together

_DEFAULT = SearchConfig()


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
) -> Iterator[tuple[int, SearchResult | SearchError]]:
    """Search many problems; yield (index, result) as they finish, in any order.

    A problem that fails yields (index, :class:`SearchError`), and the others go on. What was yielded is safe from
    whatever happens later, Ctrl-C included.

    Parameters
    ----------
    problems : iterable of str
        The problems' texts; read as there is room for them.
    policy : Policy
        Generates steps: :class:`TextPolicy`, :class:`HFPolicy`, or anything that follows the protocol.
    verifier : Verifier or None
        Scores steps. Best-of-N works without one (scores are NaN then, and only majority votes).
    config : SearchConfig or Strategy
        How to search. A :class:`~tts_search.strategy.Strategy` chooses a search for each problem by its difficulty; the
        problems are then read at once, and what its estimate cost is part of their results' stats.
    extract_answer : callable
        Takes the answer out of a completion's text.
    equal : callable or None
        Whether two answers, of which the first is known, mean the same; by default :func:`tts_search.equivalent`.
    progress : bool
        Show a progress bar on stderr, if that is a terminal and rich is installed.
    max_in_flight : int or None
        Problems that are searched side by side: more of them make larger batches and need more memory. By default as
        many as have about 1000 branches together.

    Raises
    ------
    SearchError
        At once, if the arguments do not go together.
    """
    if isinstance(problems, str):
        raise SearchError("problems: expected a list of texts, got one text")
    if not isinstance(config, SearchConfig):
        for own in _configs_of(config):
            _check(verifier, own, max_in_flight)
        options = {
            "extract_answer": extract_answer,
            "equal": equal,
            "progress": progress,
            "max_in_flight": max_in_flight,
        }
        return _by_strategy(list(problems), policy, verifier, config, options)
    _check(verifier, config, max_in_flight)
    in_flight = max_in_flight or max(1, BRANCHES_IN_FLIGHT // config.n)
    engine = Engine(policy, verifier, config, extract_answer, in_flight, equal or _same_answer())
    return _with_progress(engine, problems, enabled=progress)


def _check(verifier: Verifier | None, config: SearchConfig, max_in_flight: int | None) -> None:
    """Raise the error of arguments that do not go together."""
    if max_in_flight is not None and (
        isinstance(max_in_flight, bool) or not isinstance(max_in_flight, int) or max_in_flight < 1
    ):
        raise SearchError(f"max_in_flight: expected an int >= 1, got {max_in_flight!r}")
    if verifier is None and config.needs_verifier:
        raise SearchError(f"verifier: {config.method} needs one, got None; only best_of_n works without")


def _configs_of(strategy: Strategy) -> Iterator[SearchConfig]:
    """Yield the configs that a strategy may choose: its probe, and a problem's of each bin."""
    if strategy.probe is None:
        yield strategy.choose(None).config
        return
    yield strategy.probe
    for pass_rate in (1.0, 0.3, 0.0):  # easy, medium, hard
        yield strategy.choose(pass_rate).config


def _by_strategy(
    problems: list[str], policy: Policy, verifier: Verifier | None, strategy: Strategy, options: dict[str, Any]
) -> Iterator[tuple[int, SearchResult | SearchError]]:
    """Probe all problems if the strategy wants it, then search those that it treats alike together."""
    rates: dict[int, float | None] = dict.fromkeys(range(len(problems)))
    spent = dict.fromkeys(range(len(problems)), SearchStats())
    if strategy.probe is not None:
        for index, outcome in search_iter(problems, policy, verifier, strategy.probe, **options):
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
        for number, outcome in search_iter(own, policy, verifier, choice.config, **options):
            index = indices[number]
            if isinstance(outcome, SearchError):
                outcome.problem = index
                yield index, outcome
            else:
                yield index, replace(outcome, vote=choice.vote, stats=spent[index] + outcome.stats)


def _with_progress(
    engine: Engine, problems: Iterable[str], *, enabled: bool
) -> Iterator[tuple[int, SearchResult | SearchError]]:
    total = len(problems) if isinstance(problems, Sized) else None
    outcomes = engine.run(problems)
    with progress_bar(total, enabled=enabled, label=engine.config.method_name) as advance:
        try:
            for outcome in outcomes:
                advance()
                yield outcome
        finally:
            outcomes.close()  # type: ignore[attr-defined]  # a generator: ends the problems in flight


def search(
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier | None = None,
    config: SearchConfig | Strategy = _DEFAULT,
    *,
    extract_answer: Callable[[str], str | None] = boxed,
    equal: Equality | None = None,
    progress: bool = True,
    max_in_flight: int | None = None,
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
    outcomes = search_iter(
        problems,
        policy,
        verifier,
        config,
        extract_answer=extract_answer,
        equal=equal,
        progress=progress,
        max_in_flight=max_in_flight,
    )
    for index, outcome in outcomes:
        if isinstance(outcome, SearchError):
            outcomes.close()  # type: ignore[attr-defined]
            raise outcome
        results[index] = outcome
    return [results[index] for index in sorted(results)]


class SamplingOptions(TypedDict, total=False):
    """Options of every method: fields of :class:`~tts_search.SearchConfig`."""

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


def best_of_n(
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier | None = None,
    *,
    config: SearchConfig = _DEFAULT,
    extract_answer: Callable[[str], str | None] = boxed,
    equal: Equality | None = None,
    progress: bool = True,
    max_in_flight: int | None = None,
    **options: Unpack[BestOfNOptions],
) -> list[SearchResult]:
    """Search by best-of-N: :func:`search` with ``SearchConfig("best_of_n", ...)``.

    Options are fields of :class:`~tts_search.SearchConfig` (``n=64``, ``temperature=0.7``, ...), `config` what they
    are otherwise; the other arguments are those of :func:`search`.

    Raises
    ------
    SearchError
        As :func:`search` does.
    ConfigError
        If an option has a value that it cannot have, or the method does not use it.
    """
    config = config.with_method("best_of_n", **options)
    return search(
        problems,
        policy,
        verifier,
        config,
        extract_answer=extract_answer,
        equal=equal,
        progress=progress,
        max_in_flight=max_in_flight,
    )


def beam_search(
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier,
    *,
    config: SearchConfig = _DEFAULT,
    extract_answer: Callable[[str], str | None] = boxed,
    equal: Equality | None = None,
    progress: bool = True,
    max_in_flight: int | None = None,
    **options: Unpack[BeamOptions],
) -> list[SearchResult]:
    """Search by beam search; arguments as for :func:`best_of_n`.

    Raises
    ------
    SearchError, ConfigError
        As :func:`best_of_n` does.
    """
    config = config.with_method("beam_search", **options)
    return search(
        problems,
        policy,
        verifier,
        config,
        extract_answer=extract_answer,
        equal=equal,
        progress=progress,
        max_in_flight=max_in_flight,
    )


def dvts(
    problems: Iterable[str],
    policy: Policy,
    verifier: Verifier,
    *,
    config: SearchConfig = _DEFAULT,
    extract_answer: Callable[[str], str | None] = boxed,
    equal: Equality | None = None,
    progress: bool = True,
    max_in_flight: int | None = None,
    **options: Unpack[BeamOptions],
) -> list[SearchResult]:
    """Search by diverse verifier tree search; arguments as for :func:`best_of_n`.

    Raises
    ------
    SearchError, ConfigError
        As :func:`best_of_n` does.
    """
    config = config.with_method("dvts", **options)
    return search(
        problems,
        policy,
        verifier,
        config,
        extract_answer=extract_answer,
        equal=equal,
        progress=progress,
        max_in_flight=max_in_flight,
    )


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
    return voting.vote(completions, how, default, exact=exact, equal=_same_answer())


def _same_answer() -> Equality:
    """Mathematics' equality of answers; imported on use, so that the package imports with nothing of a domain."""
    from tts_search.domains.mathematics import equivalent

    return equivalent
