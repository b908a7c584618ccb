"""Compute-optimal scaling: which search is best for a policy, a verifier, a problem and a budget.

There are two kinds of :class:`Strategy`: the rules that a paper found (:class:`RuleStrategy`), and rules that are
fitted to an evaluation of one's own models (:func:`~tts_search.evaluation.fitting.fit`). Either can take the place of a
:class:`~tts_search.SearchConfig`: ``search(..., config=strategy)``.

The difficulty of a problem for a policy is its pass@1, the probability that one sample is right, in absolute bins:
easy (at least 50%), medium (10% to 50%), hard (below 10%). If the answer of a problem is not known, the difficulty is
estimated from a few samples and the verifier's scores.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from tts_search.errors import ConfigError
from tts_search.search.config import Method, SearchConfig

if TYPE_CHECKING:
    from tts_search.search.result import SearchResult

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
    "step_value",
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
        A cheap search that is run on each problem first, to estimate its difficulty; None: no estimate is needed.
    """

    @property
    def probe(self) -> SearchConfig | None:
        """The search that estimates a difficulty."""

    def estimate(self, result: SearchResult) -> float:
        """Return the pass@1 that is expected from the result of the probe."""

    def choose(self, pass_rate: float | None) -> Choice:
        """Return the choice for a problem with this pass@1 (None without a probe)."""


def estimate_pass_rate(result: SearchResult) -> float:
    """Estimate a policy's pass@1 on a problem from a few samples: the mean of the verifier's scores.

    A process verifier's score estimates the probability that a solution is right. Samples that did not finish count as
    0. Without a verifier, the estimate is the share of the most frequent answer.
    """
    scores = [one.score if one.finished else 0.0 for one in result.completions]
    if any(math.isnan(score) for score in scores):
        answer = result.answer("majority")
        return sum(one.answer == answer != "" for one in result.completions) / len(scores)
    return sum(min(1.0, max(0.0, score)) for score in scores) / len(scores)


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a table of known rules. A condition that is None always holds.

    Attributes
    ----------
    method, vote : str
        What is best where the conditions hold.
    source : str
        Who reports this.
    dataset : str or None
        The rule is for this data set.
    policies : tuple of float
        The rule is for policies of this many parameters, from the first number on and below the second.
    bins : tuple of str
        The rule is for problems of this difficulty.
    verifiers : tuple of str
        The rule is for verifiers of these families.
    thinks : bool
        Whether the rule is for policies that were trained to think at length by themselves.
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
        """Whether the conditions hold, except the one on difficulty."""
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
    """Chooses by rules that are known beforehand.

    Parameters
    ----------
    parameters : float
        Number of parameters of the policy, such as 3e9.
    n : int
        Budget: candidates of a round, or completions.
    dataset : str or None
        ``"MATH-500"``, ``"AIME24"``, or another data set, about which the rules say nothing.
    verifier : str or None
        Family of the verifier: ``"math-shepherd"``, ``"rlhflow"``, ``"skywork"``, ``"qwen2.5-math"``, ...
    thinks : bool
        Whether the policy thinks at length by itself (R1-Distill and the like).
    base : SearchConfig
        Everything but the method and n.
    samples : int
        How many samples estimate the difficulty, if the rules depend on it.
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
        return self.base.with_method("best_of_n", n=self.samples) if len(choices) > 1 else None

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
        """Return the choice of the rule for the bin."""
        rule = self.rule("medium" if pass_rate is None else difficulty_bin(pass_rate))
        return Choice(self.base.with_method(rule.method, n=self.n), rule.vote)


@dataclass(frozen=True)
class FittedStrategy:
    """Chooses what was best in an evaluation; :func:`~tts_search.evaluation.fitting.fit` makes it.

    Attributes
    ----------
    table : dict
        The choice for each (bin, budget).
    budget : int
        The budget to use, one of those in `table`.
    probe : SearchConfig or None
        The search that estimates the difficulty.
    calibration : tuple of (float, float)
        Points (estimate, pass@1) of a rising step function: the mean pass@1 of problems with such an estimate.
    accuracy : dict
        By budget, the cross-validated accuracy. Each problem is searched with the choice that the other folds give for
        its bin. The bin is that of its estimate. Without a probe it is that of its true pass@1, which is not known for
        a new problem.
    fixed : dict
        By budget, the cross-validated accuracy of the best single choice for all problems.
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
        return step_value(self.calibration, estimate)

    def choose(self, pass_rate: float | None) -> Choice:
        """Return the best choice of the bin. Without an estimate, the bin is medium."""
        return self.table["medium" if pass_rate is None else difficulty_bin(pass_rate), self.budget]


def step_value(calibration: Sequence[tuple[float, float]], estimate: float) -> float:
    """The value of a step function at an estimate. Steps are given by where they begin; without any: the estimate."""
    if not calibration:
        return estimate
    at = bisect.bisect_right([point for point, _ in calibration], estimate) - 1
    return calibration[max(0, at)][1]
