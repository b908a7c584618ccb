"""Learns from an evaluation which search is best for problems of each difficulty."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from tts_search.evaluation.experiment import config_of
from tts_search.evaluation.records import Record
from tts_search.search.config import SearchConfig
from tts_search.strategy import BINS, Bin, Choice, FittedStrategy, difficulty_bin, step_value

__all__ = ["fit"]


def fit(
    records: Iterable[Record],
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
        Records of one policy and one verifier. Every experiment must cover the same tasks. Records without the settings
        of their search are left out.
    budget : int
        The budget that the strategy will use: one of those in the configs.
    pass_rates : mapping or None
        The pass@1 of each task, by its id; by default, the share of right completions in the largest best-of-N.
    probe : SearchConfig or None
        A best-of-N among the experiments, used to estimate the difficulty of new problems. Its estimates are
        calibrated: a rising step function maps them to pass@1.
    folds : int
        Folds of the cross-validation, at least 2. With a probe, a held-out problem is treated like a new one: its
        estimate, calibrated on the other folds, gives its bin, and the other folds give the best choice for this bin.
        Without a probe, the bin is that of the problem's own pass rate. This gives an upper bound on the accuracy,
        because it uses the right answer.
    seed : int
        Fixes the folds.
    cost : callable
        A config's budget.

    Raises
    ------
    ValueError
        If there are no records, none with this budget or none of the probe, or if there are fewer than two folds.
    """
    if folds < 2:
        raise ValueError(f"folds: expected an int >= 2, got {folds!r}")
    outcomes = _Outcomes(records, cost)
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
    """The tasks to learn from, and the held-out tasks with the bin that a search would give each of them."""
    others = [task for task in tasks if task not in set(held_out)] or list(tasks)
    if estimates is None:
        return others, {task: difficulty_bin(rates[task]) for task in held_out}
    calibration = _isotonic({task: estimates[task] for task in others if task in estimates}, rates)
    known = {task: step_value(calibration, estimates[task]) for task in held_out if task in estimates}
    return others, {task: difficulty_bin(known[task]) if task in known else "medium" for task in held_out}


class _Outcomes:
    """Accuracies by choice and task: the mean over seeds."""

    def __init__(self, records: Iterable[Record], cost: Callable[[SearchConfig], float]) -> None:
        self.right_by: dict[tuple[Choice, str], list[bool]] = {}
        self.choices: dict[int, list[Choice]] = {}
        self.tasks: set[str] = set()
        self._largest: dict[str, Record] = {}
        self._by_config: dict[SearchConfig, list[Record]] = {}
        configs: dict[str, SearchConfig] = {}
        for record in records:
            if not record.config:
                continue
            if record.experiment not in configs:
                configs[record.experiment] = replace(config_of(record.config), seed=0)  # seeds are repetitions
            config = configs[record.experiment]
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
        """The most accurate choice for the tasks of each bin. For a bin without tasks: the best for all tasks."""
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
