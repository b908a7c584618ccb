"""Compute-optimal scaling: which search is best for which policy, verifier, problem and budget.

Two kinds of :class:`Strategy`: the rules that a paper found (:class:`RuleStrategy`), and what an evaluation of one's
own models says (:func:`fit`). Either goes where a :class:`~tts_search.SearchConfig` goes: ``search(...,
config=strategy)``.

How difficult a problem is for a policy is its pass@1, the probability that one sample is right, in absolute bins:
easy (at least 50%), medium (10% to 50%), hard (below 10%). For a problem without a known answer it is estimated from a
few samples and the verifier's scores.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from tts_search.config import Method, SearchConfig
from tts_search.errors import ConfigError

if TYPE_CHECKING:
    from tts_search.evaluate import Record
    from tts_search.result import SearchResult

__all__ = [
    "BINS",
    "RULES",
    "Choice",
    "FittedStrategy",
    "Rule",
    "RuleStrategy",
    "Strategy",
    "difficulty_bin",
    "estimate_pass_rate",
    "fit",
]

Bin = Literal["easy", "medium", "hard"]
BINS: tuple[Bin, ...] = ("easy", "medium", "hard")

_DEFAULT = SearchConfig()
_PAPER = "Can 1B LLM Surpass 405B LLM?, arXiv 2502.06703"
_AUTHOR = "RyanLiu112/compute-optimal-tts, issue 4 (an author)"


def difficulty_bin(pass_rate: float) -> Bin:
    """Return the bin of a pass@1: easy from 50%, medium from 10%, else hard (arXiv 2502.06703)."""
    return "easy" if pass_rate >= 0.5 else "medium" if pass_rate >= 0.1 else "hard"


@dataclass(frozen=True, slots=True)
class Choice:
    """How to search a problem, and which vote elects its answer."""

    config: SearchConfig
    vote: str = "prm_max"


class Strategy(Protocol):
    """Chooses a search for a problem by its difficulty.

    Attributes
    ----------
    probe : SearchConfig or None
        A cheap search that is run on each problem first, to estimate its difficulty; None: that is not needed.
    """

    @property
    def probe(self) -> SearchConfig | None: ...

    def estimate(self, result: SearchResult) -> float:
        """Return the pass@1 that the result of the probe lets expect."""

    def choose(self, pass_rate: float | None) -> Choice:
        """Return the choice for a problem with this pass@1 (None without a probe)."""


def estimate_pass_rate(result: SearchResult) -> float:
    """Estimate a policy's pass@1 on a problem from a few samples: the mean of the verifier's scores.

    A process verifier's score estimates the probability that a solution is right. Samples that did not finish count 0;
    without a verifier, it is the share of the most frequent answer.
    """
    scores = [one.score if one.finished else 0.0 for one in result.completions]
    if any(math.isnan(score) for score in scores):
        answer = result.answer("majority")
        return sum(one.answer == answer != "" for one in result.completions) / len(scores)
    return sum(min(1.0, max(0.0, score)) for score in scores) / len(scores)


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of an a-priori table; a condition that is None holds always.

    Attributes
    ----------
    method, vote : str
        What is best where the conditions hold.
    source : str
        Who says so.
    dataset : str or None
        Of these problems.
    policies : tuple of float
        Policies of this many parameters, from the first number on and below the second.
    bins : tuple of str
        Problems of this difficulty.
    verifiers : tuple of str
        Verifiers of these families.
    thinks : bool
        Policies that were trained to think at length by themselves.
    """

    method: Method
    source: str
    vote: str = "prm_max"
    dataset: str | None = None
    policies: tuple[float, float] = (0.0, math.inf)
    bins: tuple[Bin, ...] = BINS
    verifiers: tuple[str, ...] = ()
    thinks: bool = False

    def holds(self, dataset: str | None, parameters: float, verifier: str | None, thinks: bool) -> bool:
        """Whether the conditions hold, but for the difficulty."""
        return (
            self.dataset in (None, dataset)
            and self.policies[0] <= parameters < self.policies[1]
            and (not self.verifiers or verifier in self.verifiers)
            and self.thinks == thinks
        )


RULES: tuple[Rule, ...] = (
    Rule("best_of_n", "issue 1 of compute-optimal-tts (an author): R1-Distill policies", "majority", thinks=True),
    Rule("best_of_n", _PAPER, verifiers=("math-shepherd", "rlhflow")),
    Rule("beam_search", _AUTHOR, dataset="MATH-500", policies=(0, 7e9)),
    Rule("dvts", _AUTHOR, dataset="MATH-500", policies=(7e9, 32e9), bins=("easy", "medium")),
    Rule("beam_search", _AUTHOR, dataset="MATH-500", policies=(7e9, 32e9), bins=("hard",)),
    Rule("best_of_n", _AUTHOR, dataset="MATH-500", policies=(32e9, math.inf)),
    Rule("dvts", _AUTHOR, dataset="AIME24", policies=(0, 14e9)),
    Rule("best_of_n", _AUTHOR, dataset="AIME24", policies=(14e9, math.inf)),
    Rule("best_of_n", _PAPER, policies=(0, 7e9), bins=("easy",)),
    Rule("beam_search", _PAPER, policies=(0, 7e9), bins=("medium", "hard")),
    Rule("dvts", _PAPER, policies=(7e9, 32e9), bins=("easy", "medium")),
    Rule("beam_search", _PAPER, policies=(7e9, 32e9), bins=("hard",)),
    Rule("best_of_n", _PAPER, policies=(32e9, math.inf)),
)
"""What the paper and its authors found best, in order: the first rule that holds decides. A statement that names no
data set comes last. Policies of exactly 32B count as large."""


@dataclass(frozen=True)
class RuleStrategy:
    """Chooses by rules known beforehand.

    Parameters
    ----------
    parameters : float
        Of the policy, such as 3e9.
    n : int
        Budget: candidates of a round, or completions.
    dataset : str or None
        ``"MATH-500"``, ``"AIME24"``, or another, of which the rules know nothing.
    verifier : str or None
        Family of the verifier: ``"math-shepherd"``, ``"rlhflow"``, ``"skywork"``, ``"qwen2.5-math"``, ...
    thinks : bool
        Whether the policy thinks at length by itself (R1-Distill and the like).
    base : SearchConfig
        Everything but the method and n.
    samples : int
        How many samples estimate the difficulty, where the rules ask for it.
    rules : tuple of Rule
        In order; the first one that holds decides.
    """

    parameters: float
    n: int = 16
    dataset: str | None = None
    verifier: str | None = None
    thinks: bool = False
    base: SearchConfig = _DEFAULT
    samples: int = 4
    rules: tuple[Rule, ...] = RULES

    @property
    def probe(self) -> SearchConfig | None:
        """Best of `samples`, if more than one rule can decide."""
        choices = {self.rule(one) for one in BINS}
        return replace(self.base, method="best_of_n", n=self.samples) if len(choices) > 1 else None

    def rule(self, difficulty: Bin) -> Rule:
        """Return the rule that decides.

        Raises
        ------
        ConfigError
            If there is none.
        """
        for rule in self.rules:
            if rule.holds(self.dataset, self.parameters, self.verifier, self.thinks) and difficulty in rule.bins:
                return rule
        raise ConfigError(f"rules: expected one that holds for a {difficulty} problem, got {len(self.rules)} others")

    def estimate(self, result: SearchResult) -> float:
        """Return the estimated pass@1: :func:`estimate_pass_rate`."""
        return estimate_pass_rate(result)

    def choose(self, pass_rate: float | None) -> Choice:
        """Return what the rule for the bin says."""
        rule = self.rule("medium" if pass_rate is None else difficulty_bin(pass_rate))
        return Choice(replace(self.base, method=rule.method, n=self.n), rule.vote)


@dataclass(frozen=True)
class FittedStrategy:
    """Chooses what was best in an evaluation; :func:`fit` makes it.

    Attributes
    ----------
    table : dict
        The choice for each (bin, budget).
    budget : int
        Which of the budgets to use.
    probe : SearchConfig or None
        The search that estimates the difficulty.
    calibration : tuple of (float, float)
        Points (estimate, pass@1) of a rising step function: what problems with such an estimate came to.
    accuracy : dict
        By budget, the cross-validated accuracy: each problem searched as the other folds' results say for the bin of
        its estimate; without a probe, for the bin of its true pass@1, which no search of a new problem knows.
    fixed : dict
        By budget, the same for the best single choice, whatever the difficulty.
    """

    table: dict[tuple[Bin, int], Choice]
    budget: int
    probe: SearchConfig | None = None
    calibration: tuple[tuple[float, float], ...] = ()
    accuracy: dict[int, float] = field(default_factory=dict)
    fixed: dict[int, float] = field(default_factory=dict)

    def estimate(self, result: SearchResult) -> float:
        """Return the calibrated estimate of a problem's pass@1."""
        return self.calibrated(estimate_pass_rate(result))

    def calibrated(self, estimate: float) -> float:
        """Return the pass@1 of problems with such an estimate."""
        return _calibrated(self.calibration, estimate)

    def choose(self, pass_rate: float | None) -> Choice:
        """Return the best choice of the bin; of the middle one, without an estimate."""
        return self.table["medium" if pass_rate is None else difficulty_bin(pass_rate), self.budget]


def fit(
    records: Iterable[Record],
    configs: Mapping[str, SearchConfig],
    *,
    budget: int,
    pass_rates: Mapping[str, float] | None = None,
    probe: SearchConfig | None = None,
    folds: int = 5,
    seed: int = 0,
    cost: Callable[[SearchConfig], float] = lambda config: config.n,
) -> FittedStrategy:
    """Learn the best (method, n, expand, vote) for each difficulty and budget from an evaluation of one policy.

    Parameters
    ----------
    records : iterable of Record
        Of one policy and verifier; every experiment over the same tasks.
    configs : mapping
        Key of an experiment to its config (:func:`~tts_search.evaluate.read_configs`).
    budget : int
        Which budget the strategy will use: one of those that the configs have.
    pass_rates : mapping or None
        A task's id to its pass@1; by default, the share of right completions in the largest best-of-N.
    probe : SearchConfig or None
        A best-of-N among the experiments, by which to estimate the difficulty of new problems. Its estimates are
        calibrated: pooled to a rising function of pass@1.
    folds : int
        Of the cross-validation, at least 2. With a probe, a held-out problem is searched as a new one would be: its
        estimate, calibrated on the other folds, says its bin, the other folds say what is best there. Without one it is
        put into the bin of its own pass rate: an upper bound, since that takes its right answer.
    seed : int
        Fixes the folds.
    cost : callable
        A config's budget.

    Raises
    ------
    ValueError
        If there are no records, or none with this budget; none of the probe; less than two folds.
    """
    if folds < 2:
        raise ValueError(f"folds: expected an int >= 2, got {folds!r}")
    outcomes = _Outcomes(records, configs, cost)
    rates = dict(pass_rates) if pass_rates is not None else outcomes.pass_rates()
    tasks = sorted(task for task in outcomes.tasks if task in rates)
    if budget not in outcomes.budgets or not tasks:
        raise ValueError(f"budget: expected one of {sorted(outcomes.budgets)} with known pass rates, got {budget!r}")
    estimates = None if probe is None else outcomes.estimates(probe)
    if estimates is not None and not estimates:
        raise ValueError(f"probe: expected a best-of-N among the experiments, got {probe!r}")
    random.Random(seed).shuffle(tasks)
    splits = [_split(tasks[fold::folds], tasks, rates, estimates) for fold in range(min(folds, len(tasks)))]
    table: dict[tuple[Bin, int], Choice] = {}
    accuracy: dict[int, float] = {}
    fixed: dict[int, float] = {}
    for size in sorted(outcomes.budgets):
        table |= {(one, size): choice for one, choice in outcomes.best_by_bin(size, tasks, rates).items()}
        right = right_fixed = 0.0
        for others, bins in splits:
            chosen, single = outcomes.best_by_bin(size, others, rates), outcomes.best(size, others)
            right += sum(outcomes.right(chosen[one], task) for task, one in bins.items())
            right_fixed += sum(outcomes.right(single, task) for task in bins)
        accuracy[size], fixed[size] = right / len(tasks), right_fixed / len(tasks)
    calibration = () if estimates is None else _isotonic(estimates, rates)
    return FittedStrategy(table, budget, probe, calibration, accuracy, fixed)


def _split(
    held_out: Sequence[str],
    tasks: Sequence[str],
    rates: Mapping[str, float],
    estimates: Mapping[str, float] | None,
) -> tuple[list[str], dict[str, Bin]]:
    """The tasks to learn from, and the held-out ones with the bins that a search would put them in."""
    others = [task for task in tasks if task not in set(held_out)] or list(tasks)
    if estimates is None:
        return others, {task: difficulty_bin(rates[task]) for task in held_out}
    calibration = _isotonic({task: estimates[task] for task in others if task in estimates}, rates)
    known = {task: _calibrated(calibration, estimates[task]) for task in held_out if task in estimates}
    return others, {task: difficulty_bin(known[task]) if task in known else "medium" for task in held_out}


class _Outcomes:
    """Who solved what: accuracies by choice and task, over seeds."""

    def __init__(
        self, records: Iterable[Record], configs: Mapping[str, SearchConfig], cost: Callable[[SearchConfig], float]
    ) -> None:
        self.right_by: dict[tuple[Choice, str], list[bool]] = {}
        self.choices: dict[int, list[Choice]] = {}
        self.tasks: set[str] = set()
        self._largest: dict[str, Record] = {}
        self._by_config: dict[SearchConfig, list[Record]] = {}
        for record in records:
            if record.experiment not in configs:
                continue
            config = replace(configs[record.experiment], seed=0)  # seeds are repetitions
            self.tasks.add(record.task)
            self._by_config.setdefault(config, []).append(record)
            largest = self._largest.get(record.task)
            if config.method == "best_of_n" and (largest is None or record.num_completions > largest.num_completions):
                self._largest[record.task] = record
            for vote in record.correct or ("majority",):
                choice = Choice(config, vote)
                own = self.choices.setdefault(int(cost(config)), [])
                if choice not in own:
                    own.append(choice)
                self.right_by.setdefault((choice, record.task), []).append(record.is_correct(vote))

    @property
    def budgets(self) -> set[int]:
        return set(self.choices)

    def right(self, choice: Choice, task: str) -> float:
        outcomes = self.right_by.get((choice, task), [False])
        return sum(outcomes) / len(outcomes)

    def best(self, budget: int, tasks: Sequence[str]) -> Choice:
        """The most accurate choice of a budget; the first one on ties."""
        return max(self.choices[budget], key=lambda choice: sum(self.right(choice, task) for task in tasks))

    def best_by_bin(self, budget: int, tasks: Sequence[str], rates: Mapping[str, float]) -> dict[Bin, Choice]:
        """The most accurate choice for the tasks of each bin; for all tasks, where a bin has none."""
        return {
            one: self.best(budget, [task for task in tasks if difficulty_bin(rates[task]) == one] or tasks)
            for one in BINS
        }

    def pass_rates(self) -> dict[str, float]:
        return {
            task: record.num_correct / record.num_completions
            for task, record in self._largest.items()
            if record.num_completions
        }

    def estimates(self, probe: SearchConfig) -> dict[str, float]:
        records = self._by_config.get(replace(probe, seed=0), [])
        return {record.task: record.pass_estimate for record in records if record.pass_estimate is not None}


def _isotonic(estimates: Mapping[str, float], rates: Mapping[str, float]) -> tuple[tuple[float, float], ...]:
    """Least-squares rising step function from estimates to rates, by pooling adjacent violators."""
    of_estimate: dict[float, list[float]] = {}  # equal estimates have one value
    for task, estimate in estimates.items():
        if task in rates:
            of_estimate.setdefault(estimate, []).append(rates[task])
    blocks: list[tuple[float, float, int]] = []  # first estimate, mean rate, count
    for estimate, own in sorted(of_estimate.items()):
        block = (estimate, math.fsum(own) / len(own), len(own))
        while blocks and blocks[-1][1] >= block[1]:
            first, mean, count = blocks.pop()
            total = count + block[2]
            block = (first, (mean * count + block[1] * block[2]) / total, total)
        blocks.append(block)
    return tuple((first, mean) for first, mean, _ in blocks)


def _calibrated(calibration: Sequence[tuple[float, float]], estimate: float) -> float:
    """The value of a step function, given by where each step begins, at an estimate; without steps, the estimate."""
    if not calibration:
        return estimate
    at = bisect.bisect_right([point for point, _ in calibration], estimate) - 1
    return calibration[max(0, at)][1]
