"""The demo: the small models of the package solve arithmetic better with search than alone.

It prints a table of accuracy, a table of costs, whether the smallest policy with search beats the largest policy alone,
and a search tree. All numbers are those of the run itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tts_search.evaluation.evaluate import Experiment, Record
from tts_search.evaluation.outline import outline
from tts_search.evaluation.rows import Row, compare
from tts_search.evaluation.runs import check_success, failures, run_experiments
from tts_search.evaluation.statistics import holm
from tts_search.evaluation.tables import accuracy_table, cost_table
from tts_search.evaluation.tasks import Task
from tts_search.lab.arithmetic import LEVELS, generate
from tts_search.lab.checkpoints import POLICIES, VERIFIERS, Models, load_models
from tts_search.search.config import Method, SearchConfig
from tts_search.search.tree import SearchTree
from tts_search.terminal import sanitize

__all__ = ["CONFIG", "POLICIES", "VERIFIERS", "Models", "load_models", "make_tasks", "run_demo"]

METHODS: dict[Method, str] = {"best_of_n": "best-of-N", "beam_search": "beam search", "dvts": "DVTS"}
BUDGETS = (1, 4, 16, 64)

_TREE_BUDGET = 16  # the search whose tree is shown is a beam search of this size
CONFIG = SearchConfig(max_steps=16, max_step_tokens=64, max_tokens=400)  # a level-5 solution has 9 to 11 steps


def make_tasks(levels: Sequence[int], count: int, seed: int) -> list[Task]:
    """Return `count` test problems of each level."""
    return [
        Task(f"level-{level}-{number}", problem.problem, problem.answer, str(level))
        for level in levels
        for number, problem in enumerate(generate("test", level, count, seed))
    ]


def run_demo(
    models: Models,
    out: str | Path,
    *,
    levels: Sequence[int] = LEVELS,
    count: int = 30,
    budgets: Sequence[int] = BUDGETS,
    seed: int = 0,
    emit: Callable[[str], None] = print,
    progress: bool = True,
) -> list[Record]:
    """Run the demo and print its findings.

    Parameters
    ----------
    models : Models
        The models to compare.
    out : str or Path
        A folder for the full results. Results of an earlier run are overwritten.
    levels : sequence of int
        Levels of the task.
    count : int
        Problems of each level.
    budgets : sequence of int
        Sizes of the search; multiples of 4, and 1 for a single sample.
    seed : int
        Fixes the problems and every draw.
    emit : callable
        Prints a text.
    progress : bool
        Show progress bars.

    Returns
    -------
    list of Record
        All results.

    Raises
    ------
    SearchError
        If no search of one of the experiments succeeded.
    """
    tasks = make_tasks(levels, count, seed)
    plan = make_plan(models, budgets, seed)
    out = Path(out)
    for name in ("results.jsonl", "manifest.json"):
        (out / name).unlink(missing_ok=True)  # reported times must be of this run
    emit(f"{len(tasks)} problems of levels {levels[0]} to {levels[-1]}; {len(plan)} searches of each\n")
    found = run_experiments(
        tasks,
        plan,
        out,
        data="demo problems",
        progress=progress,
        emit=emit,
        levels=list(levels),
        count=count,
        seed=seed,
    )
    found = [replace(row, records=list(row.records)) for row in found]  # these are read several times below
    rows = {row.label: row for row in found}
    for section in (
        accuracy_table(_with_majority(rows)),
        cost_table(found),
        _verdict(models, rows),
        _one_tree(models, rows),
        f"Every search, with its answers, scores and cost: {out / 'results.jsonl'}",
        failures(found),
    ):
        if section:
            emit(f"\n{section}")
    check_success(found)
    return [record for row in found for record in row.records]


def make_plan(models: Models, budgets: Sequence[int], seed: int) -> list[Experiment]:
    """Return the searches: every policy alone; the smallest with every method and budget and with each verifier."""
    base = replace(CONFIG, seed=seed)
    alone = base.with_method("best_of_n", n=1)
    greedy = replace(alone, temperature=0.0)
    plan = []
    for name, policy in models.policies.items():
        plan.append(Experiment(label(name, "greedy"), greedy, policy, None, (name,)))
        if 1 in budgets:
            plan.append(Experiment(label(name, "one sample"), alone, policy, None, (name,)))
    smallest, policy = next(iter(models.policies.items()))
    strongest = next(iter(models.verifiers))
    for verifier_name, verifier in models.verifiers.items():
        for method, title in METHODS.items():
            for budget in budgets:
                if budget == 1 or (verifier_name != strongest and budget != _TREE_BUDGET):
                    continue
                config = base.with_method(method, n=budget)
                suffix = "" if verifier_name == strongest else f", {verifier_name}"
                plan.append(
                    Experiment(
                        label(smallest, title, budget) + suffix,
                        config,
                        policy,
                        verifier,
                        (smallest, verifier_name),
                        keep_trees=budget <= _TREE_BUDGET,
                    )
                )
    return plan


def label(policy: str, method: str, budget: int | None = None) -> str:
    """Return the label of a row."""
    return f"{policy}, {method}" if budget is None else f"{policy}, {method}, n={budget}"


def _with_majority(rows: Mapping[str, Row]) -> list[Row]:
    """Add the majority vote over the samples of best-of-N, which needs no verifier."""
    extended = []
    for name, row in rows.items():
        extended.append(row)
        if METHODS["best_of_n"] in name and len(name.split(", ")) == 3:
            extended.append(Row(name.replace(METHODS["best_of_n"], "majority vote"), row.records, "majority"))
    return extended


def _verdict(models: Models, rows: Mapping[str, Row]) -> str:
    """Report where the smallest policy with search beats the largest policy's greedy answer, and where it does not."""
    smallest, *_, largest = models.policies
    rival = rows[label(largest, "greedy")]
    searches = {name: row for name, row in rows.items() if row.vote == "prm_max"}
    found = [compare(row, rival) for row in searches.values()]
    lines = [
        f"Does {smallest} with search beat {largest} alone (its greedy answer)? "
        f"(p: sign test, corrected for {len(found)} tests)"
    ]
    for (name, row), (difference, _), p in zip(searches.items(), found, holm([p for _, p in found]), strict=True):
        ahead: list[str] = []
        behind: list[str] = []
        for level in sorted({record.level for record in row.records}):
            points, _ = compare(_at(row, level), _at(rival, level))
            (ahead if points > 0 else behind if points < 0 else []).append(level)
        lines.append(
            f"  {name}: {100 * difference:+.0f} points over all levels (p = {p:.2g}); "
            f"ahead on {_levels(ahead)}, behind on {_levels(behind)}"
        )
    return "\n".join(lines)


def _at(row: Row, level: str) -> Row:
    return replace(row, records=[record for record in row.records if record.level == level])


def _levels(levels: Sequence[str]) -> str:
    return f"level {', '.join(levels)}" if levels else "no level"


def _one_tree(models: Models, rows: Mapping[str, Row]) -> str:
    """Show a tree, if possible of a problem that the smallest policy solves by beam search but not alone."""
    smallest = next(iter(models.policies))
    row = rows.get(label(smallest, METHODS["beam_search"], _TREE_BUDGET))
    if row is None:
        return f"(no tree: there was no beam search with n={_TREE_BUDGET})"
    alone = {record.task: record for record in rows[label(smallest, "greedy")].records}
    candidates = [record for record in row.records if record.tree is not None]
    if not candidates:
        return "(no tree: no beam search came to an end)"
    record = max(
        candidates,
        key=lambda one: (one.is_correct(row.vote) and not alone[one.task].is_correct("majority"), one.level == "3"),
    )
    assert record.tree is not None
    answer, greedy = record.answers[row.vote], alone[record.task].answers.get("majority", "")
    return "\n".join(
        [
            f"A search tree ({row.label}): score and text of each step; * finished, x pruned",
            f"  {sanitize(record.problem)}",
            f"  right: {record.gold}; this search: {sanitize(answer)}; greedy alone: {sanitize(greedy) or 'no answer'}",
            outline(SearchTree.from_json(record.tree), width=100, max_nodes=40),
        ]
    )
