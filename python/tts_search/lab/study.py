"""The study of compute-optimal scaling in miniature: policies x verifiers x methods x budgets on the demo models.

Its questions are those of "Can 1B LLM Surpass 405B LLM?" (arXiv 2502.06703). Best-of-N is nested: a policy samples
once, a smaller budget uses the first of these samples, and both verifiers read the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from tts_search.errors import SearchError
from tts_search.evaluation.evaluate import Experiment, Record
from tts_search.evaluation.runs import check_success, run_experiments
from tts_search.evaluation.tables import format_table
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import LEVELS, generate
from tts_search.lab.checkpoints import POLICIES, VERIFIERS, Models, load_models
from tts_search.lab.demo import CONFIG, make_tasks
from tts_search.search.config import Method
from tts_search.search.protocol import Expand, Policy, Usage
from tts_search.search.types import Step

__all__ = ["Cell", "Grid", "Memo", "cells", "part_of", "plan_as_text", "run_study"]


@dataclass(frozen=True)
class Grid:
    """What the study runs.

    Attributes
    ----------
    problems : int
        Problems of each level.
    levels, budgets : tuple of int
        A budget is n: completions of best-of-N, candidates of a round.
    largest : int or None
        One more budget, of the first policy with the first verifier only.
    seed : int
        Fixes the problems.
    seeds : tuple of int
        Fix the draws: each search is run with every seed. When the searches of one seed are judged, the samples of the
        other seeds say how difficult a problem is.
    policies, verifiers : tuple of str
        Names of demo models, smallest policy first.
    methods : tuple of str
        Searches besides best-of-N. They run with the budgets that can be divided by `expand`.
    """

    problems: int = 100
    levels: tuple[int, ...] = LEVELS
    budgets: tuple[int, ...] = (1, 4, 16, 64)
    largest: int | None = 256
    seed: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    policies: tuple[str, ...] = POLICIES
    verifiers: tuple[str, ...] = VERIFIERS
    methods: tuple[Method, ...] = ("beam_search", "dvts")


@dataclass(frozen=True)
class Cell:
    """One run over all problems: a policy, a method, a budget, a seed and a verifier.

    Best-of-N is scored by several verifiers in turn, and also with the smaller budgets `nested`. If n is larger than
    these, only the first verifier scores all n.
    """

    policy: str
    verifiers: tuple[str, ...]
    method: Method
    n: int
    nested: tuple[int, ...] = ()
    greedy: bool = False
    seed: int = 0

    @property
    def label(self) -> str:
        """Name of the row; ``{n}`` is the budget."""
        return f"{self.policy}, {'greedy' if self.greedy else self.method}, n={{n}}, seed={self.seed}"

    @property
    def title(self) -> str:
        """A description of the run."""
        return f"{self.label.replace('{n}', str(self.n))} {', '.join(self.verifiers)}".rstrip()


def cells(grid: Grid) -> list[Cell]:
    """Return the runs of a grid: seed by seed, policy by policy. Greedy answers have no draws: one seed is enough."""
    plan = [Cell(policy, (), "best_of_n", 1, greedy=True, seed=grid.seeds[0]) for policy in grid.policies]
    return plan + [cell for seed in grid.seeds for policy in grid.policies for cell in _searches(grid, policy, seed)]


def _searches(grid: Grid, policy: str, seed: int) -> list[Cell]:
    """The runs of a policy with one seed."""
    more = (grid.largest,) if grid.largest and policy == grid.policies[0] else ()
    plan = [Cell(policy, grid.verifiers, "best_of_n", max(grid.budgets + more), grid.budgets, seed=seed)]
    for verifier in grid.verifiers:
        sizes = [*grid.budgets, *(more if verifier == grid.verifiers[0] else ())]
        plan += [
            Cell(policy, (verifier,), method, size, seed=seed)
            for method in grid.methods
            for size in sizes
            if size % CONFIG.expand == 0
        ]
    return plan


def tokens(grid: Grid, cell: Cell) -> tuple[int, int]:
    """Return about how many tokens a run samples, and how many its verifiers read (prompts apart).

    A search with n candidates in each round samples about as many tokens as n whole solutions have, because every round
    grows n candidates by a step.
    """
    solutions = grid.problems * sum(_solution_tokens(level) for level in grid.levels)
    return solutions * cell.n, solutions * sum(_sizes(cell))


def _sizes(cell: Cell) -> list[int]:
    """The budget of each verifier."""
    return [cell.n if index == 0 else max(cell.nested) for index in range(len(cell.verifiers))]


@cache
def _solution_tokens(level: int) -> int:
    """Mean length of a solution of a level; the demo tokenizer knows digits, operators and a few words."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODELS_DIR / POLICIES[0] / "tokenizer.json"))
    problems = generate("test", level, 20, 0)
    return round(sum(len(tokenizer.encode("".join(one.solution)).ids) for one in problems) / len(problems))


def plan_as_text(grid: Grid) -> str:
    """Return a table of the runs of a grid and their numbers of tokens."""
    rows = []
    total = [0, 0]
    for cell in cells(grid):
        counts = tokens(grid, cell)
        total = [have + more for have, more in zip(total, counts, strict=True)]
        rows.append(
            [cell.label.replace("{n}", str(cell.n)), ", ".join(cell.verifiers), *(f"{one / 1e6:.2f}" for one in counts)]
        )
    rows.append(["all", "", *(f"{one / 1e6:.2f}" for one in total)])
    return format_table(["run", "verifiers", "M tokens sampled", "M tokens verified"], rows)


def share_out(grid: Grid, part: str) -> list[Cell]:
    """Return the runs of part "I/K". Each run, largest first, goes to the part with the fewest tokens so far.

    Raises
    ------
    SearchError
        If `part` is not of this form.
    """
    try:
        index, count = map(int, part.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 1 <= index <= count:
        raise SearchError(f"part: expected I/K with 1 <= I <= K, got {part!r}")
    loads: list[float] = [0.0] * count
    parts: list[list[Cell]] = [[] for _ in loads]
    for cell in sorted(cells(grid), key=lambda cell: -sum(tokens(grid, cell))):
        least = loads.index(min(loads))
        loads[least] += sum(tokens(grid, cell)) + 1
        parts[least].append(cell)
    return parts[index - 1]


def run_study(grid: Grid, out: str | Path, *, part: str = "1/1", progress: bool = True) -> list[Record]:
    """Run a grid, or a part of it. Runs whose results are in the folder are not repeated.

    Parameters
    ----------
    grid : Grid
        What to run.
    out : str or Path
        Folder of ``results-I.jsonl`` and ``manifest-I.json`` of each part.
    part : str
        ``"I/K"``: the parts may run at the same time, as processes of their own.
    progress : bool
        Show progress bars.

    Returns
    -------
    list of Record
        The records of this part.
    """
    plan = share_out(grid, part)
    tasks = make_tasks(grid.levels, grid.problems, grid.seed)
    models = load_models()
    rows = []
    for number, cell in enumerate(plan, start=1):
        print(f"[{number}/{len(plan)}] {cell.title}", flush=True)
        rows += run_experiments(
            tasks,
            _experiments(grid, cell, models),
            out,
            data="demo problems",
            part=part.split("/")[0],
            progress=progress,
            emit=lambda line: print(f"  {line}", flush=True),
            grid=str(grid),
        )
    check_success(rows)
    return [record for row in rows for record in row.records]


def _experiments(grid: Grid, cell: Cell, models: Models) -> list[Experiment]:
    config = CONFIG.with_method(cell.method, n=cell.n, seed=cell.seed)
    if cell.greedy:
        config = replace(config, temperature=0.0)
        return [Experiment(cell.label, config, models.policies[cell.policy], None, (cell.policy, ""))]
    policy: Policy = models.policies[cell.policy]
    if len(cell.verifiers) > 1:
        policy = Memo(policy)
    return [
        Experiment(
            cell.label,
            replace(config, n=size),
            policy,
            models.verifiers[name],
            (cell.policy, name),
            keep_trees=size <= 16 and cell.seed == grid.seeds[0],
            nested=cell.nested,
            timed=name == cell.verifiers[0],
        )
        for name, size in zip(cell.verifiers, _sizes(cell), strict=True)
    ]


class Memo:
    """A policy that remembers its samples, so that several verifiers can score the same samples.

    The problem's text, the steps before it, its seed and its parameters identify a sample. Usage is that of the first
    time; if only some of the samples are asked for now, it is their share.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._texts: dict[int, str] = {}
        self._asked: set[int] = set()  # problems that the policy has begun
        self._steps: dict[tuple[object, ...], Step] = {}
        self._usage: dict[str, Usage] = {}
        self._asked_for: dict[int, int] = {}  # number of samples of a problem in flight
        self._sampled: dict[str, int] = {}

    def begin(self, problem: int, text: str) -> None:
        """Announce a problem. The policy begins it with the first request that is new."""
        self._texts[problem] = text
        self._asked_for[problem] = 0

    def expand(self, requests: Sequence[Expand]) -> Sequence[Sequence[Step] | Exception]:
        """Answer requests. The policy answers those with something new."""
        for request in requests:
            self._asked_for[request.problem] += len(request.children)
        new = [request for request in requests if any(key not in self._steps for key in self._keys(request))]
        for problem in sorted({request.problem for request in new} - self._asked):
            self._policy.begin(problem, self._texts[problem])
            self._asked.add(problem)
        errors: dict[int, Exception] = {}
        for request, reply in zip(new, self._policy.expand(new) if new else (), strict=True):
            if isinstance(reply, Exception):
                errors[id(request)] = reply
            else:
                self._steps.update(zip(self._keys(request), reply, strict=True))
        return [errors.get(id(request)) or [self._steps[key] for key in self._keys(request)] for request in requests]

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Forget branches. Samples are kept."""
        if problem in self._asked:
            self._policy.release(problem, branches)

    def end(self, problem: int) -> Usage:
        """Forget the problem, and return its cost when it was first answered."""
        text, asked_for = self._texts.pop(problem), self._asked_for.pop(problem)
        if problem in self._asked:
            self._asked.remove(problem)
            self._usage[text], self._sampled[text] = self._policy.end(problem), asked_for
        return part_of(self._usage.get(text, Usage()), asked_for / max(1, self._sampled.get(text, asked_for)))

    def _keys(self, request: Expand) -> list[tuple[object, ...]]:
        text = self._texts[request.problem]
        return [(text, request.steps, seed, request.params) for seed in request.seeds]


def part_of(usage: Usage, share: float) -> Usage:
    """Return what this share of the samples cost; the prompt is read for any of them."""
    counts = {name: share * value for name, value in asdict(usage).items() if name != "prefill_tokens"}
    return replace(usage, **{name: value if name == "flops" else round(value) for name, value in counts.items()})
