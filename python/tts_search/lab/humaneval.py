"""A study on HumanEval: the value of drawing n programs, if one is chosen by information that a search may use.

Each problem's completions are drawn once (:mod:`tts_search.lab.samples`). They are run once on the public tests, which
a search may use, and once on the hidden tests, which decide. Everything else is arithmetic on these verdicts.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tts_search.domains.code import CodeGrader, CodeTask, ProgramJudge
from tts_search.domains.code.tasks import repeated
from tts_search.evaluation.tables import format_table
from tts_search.lab.samples import Drawn, appending, draw, read_lines
from tts_search.search.protocol import Policy
from tts_search.search.types import Step, StepParams

__all__ = ["PARAMS", "RULES", "Judged", "expected", "judge_samples", "run_code_study", "table_as_text", "tables"]

PARAMS: Final = StepParams(temperature=0.8, top_p=0.95, max_tokens=512, delimiter=None)
"""Temperature and top_p of Chen et al. (arXiv 2107.03374) for many samples."""

RULES: Final = ("random", "mean logprob", "majority of behaviour", "public tests", "any right (pass@n)")
"""The rules for choosing a program. The last one is an upper bound for all."""

_SUBSETS: Final = 500
_RESAMPLES: Final = 10_000
TableCell = str | int | float | None
Table = dict[str, dict[str, TableCell]]


@dataclass(frozen=True)
class Judged:
    """The judged completions of a line of samples.

    Attributes
    ----------
    id, first
        As in the samples.
    public : tuple of float
        Share of the public tests that passed; 0 without a program.
    behaviour : tuple of str
        Equal for programs that vote together; empty for completions that do not vote.
    right : tuple of bool
        Whether all hidden tests passed.
    public_seconds, hidden_seconds : float
        Seconds of running the tests. Programs that were seen before take none.
    """

    id: str
    first: int
    public: tuple[float, ...]
    behaviour: tuple[str, ...]
    right: tuple[bool, ...]
    public_seconds: float
    hidden_seconds: float


def run_code_study(
    tasks: Sequence[CodeTask], policy: Policy, out: str | Path, *, n: int = 64, seed: int = 0, about: str = ""
) -> dict[str, Table]:
    """Draw, judge, and return the tables. Work whose results are in the folder is not repeated.

    Parameters
    ----------
    tasks : sequence of CodeTask
        With different ids and texts.
    policy : Policy
        Draws completions.
    out : str or Path
        Folder of ``samples.jsonl`` and ``judged.jsonl``.
    n : int
        Completions of each task, a multiple of 16; smaller budgets are subsets of them.
    seed : int
        Fixes the draws.
    about : str
        The checkpoint and its precision. Samples of another one are refused.

    Raises
    ------
    ValueError
        If `n` is no multiple of 16, or the folder has samples that were drawn differently.
    SearchError
        If the policy fails.
    SandboxError
        If programs cannot be confined.
    """
    problems = {task.id: task.problem for task in tasks}
    samples = draw(policy, problems, Path(out) / "samples.jsonl", n=n, seed=seed, params=PARAMS, about=about)
    return tables(tasks, samples, judge_samples(tasks, samples, Path(out) / "judged.jsonl"))


def judge_samples(
    tasks: Sequence[CodeTask], samples: Sequence[Drawn], path: str | Path, judge: ProgramJudge | None = None
) -> list[Judged]:
    """Run the programs of samples; write a line for each line of samples. Existing lines are not run again."""
    path, judge = Path(path), judge or ProgramJudge()
    graders = {task.id: CodeGrader(task, judge) for task in tasks}
    entries: list[dict[str, Any]] = [
        {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
        for entry in read_lines(path)
    ]
    known = {(entry["id"], entry["first"]): Judged(**entry) for entry in entries}
    with appending(path) as write:
        for one in samples:
            if (one.id, one.first) not in known:
                known[one.id, one.first] = _judged(one, graders[one.id], judge)
                write(asdict(known[one.id, one.first]))
    return [known[one.id, one.first] for one in samples]


def _judged(drawn: Drawn, grader: CodeGrader, judge: ProgramJudge) -> Judged:
    programs = [grader.extract(step.text) for step in drawn.steps]
    begin = time.perf_counter()
    public = [judge.public(grader.task, program).share if program else 0.0 for program in programs]
    between = time.perf_counter()
    behaviour = [_behaviour(grader, program) for program in programs]
    right = [grader.correct(program) for program in programs]
    end = time.perf_counter()
    return Judged(drawn.id, drawn.first, tuple(public), tuple(behaviour), tuple(right), between - begin, end - between)


def _behaviour(grader: CodeGrader, program: str) -> str:
    """A name for a program's behaviour on the public inputs. Programs that the grader holds for equal share it."""
    if not program:
        return ""
    alike = grader.equal(program, program)
    words = repr(grader.judge.behaviour(grader.task, program)) if alike else program
    return hashlib.blake2b(f"{alike}{words}".encode(errors="surrogatepass"), digest_size=8).hexdigest()


def expected(judged: Sequence[Judged], steps: Sequence[Step], n: int) -> dict[str, float]:
    """Return the probability that each rule is right about one problem, over all subsets of n of its completions.

    Parameters
    ----------
    judged : sequence of Judged
        Of one problem.
    steps : sequence of Step
        Its completions, in the same order.
    n : int
        At most the number of completions.

    Notes
    -----
    Ties are broken at random. All values are exact, except for the majority: if there are more than 500 subsets, it is
    a mean over 500.
    """
    right = [one for line in judged for one in line.right]
    public = [one for line in judged for one in line.public]
    behaviour = [one for line in judged for one in line.behaviour]
    logprob = [(step.logprob or 0.0) / max(1, step.num_tokens) for step in steps]
    total, wrong = math.comb(len(right), n), math.comb(len(right) - sum(right), n)
    values = (
        sum(right) / len(right),
        _by_score(logprob, right, n),
        _by_majority(behaviour, right, n),
        _by_score(public, right, n),
        1 - wrong / total,
    )
    return dict(zip(RULES, values, strict=True))


def _by_score(scores: Sequence[float], right: Sequence[bool], n: int) -> float:
    """The highest score of n is in a group of equal ones; every member is equally often the one that is taken."""
    count = len(scores)
    groups: dict[float, list[bool]] = {}
    for score, ok in zip(scores, right, strict=True):
        groups.setdefault(score, []).append(ok)
    value, left = 0.0, count
    for score in sorted(groups, reverse=True):
        group = groups[score]
        best = math.comb(left, n) - math.comb(left - len(group), n)
        value += best / math.comb(count, n) * sum(group) / len(group)
        left -= len(group)
    return value


def _by_majority(classes: Sequence[str], right: Sequence[bool], n: int) -> float:
    """Mean over subsets of n: the share of right programs in the largest class; 0 without voters."""
    share = {one: sum(ok for c, ok in zip(classes, right, strict=True) if c == one) for one in set(classes)}
    sizes = Counter(classes)
    draws = random.Random(0)
    if math.comb(len(classes), n) <= _SUBSETS:
        subsets = list(itertools.combinations(classes, n))
    else:
        subsets = [tuple(draws.sample(classes, n)) for _ in range(_SUBSETS)]
    value = 0.0
    for subset in subsets:
        counts = Counter(one for one in subset if one)
        most = [one for one, count in counts.items() if count == max(counts.values())]
        value += sum(share[one] / sizes[one] for one in most) / max(1, len(most))
    return value / len(subsets)


def tables(tasks: Sequence[CodeTask], samples: Sequence[Drawn], judged: Sequence[Judged]) -> dict[str, Table]:
    """Return ``accuracy``, ``accuracy without repeats``, ``gain`` (in points, of the largest n), ``cost``, ``tests``.

    Accuracies are percentages. Their 95% intervals are by the percentile bootstrap over tasks.
    """
    lines = {task.id: [one for one in judged if one.id == task.id] for task in tasks}
    steps = {task.id: [step for one in samples if one.id == task.id for step in one.steps] for task in tasks}
    largest = min(map(len, steps.values()))
    sizes = sorted({n for n in (1, 4, 16, 64) if n < largest} | {largest})
    of_task = {n: {task.id: expected(lines[task.id], steps[task.id], n) for task in tasks} for n in sizes}
    repeats = {task.id: repeated(task) for task in tasks}
    fresh = [task.id for task in tasks if repeats[task.id][0] == 0]
    return {
        "accuracy": _accuracy(of_task, [task.id for task in tasks]),
        **({"accuracy without repeats": _accuracy(of_task, fresh)} if fresh else {}),
        "gain": _gain(of_task[largest]),
        "cost": _cost(samples, judged, len(tasks), sizes),
        "tests": {
            "HumanEval": {
                "tasks": len(tasks),
                "with public tests": sum(bool(task.public) for task in tasks),
                "hidden assertions": sum(total for _, total in repeats.values()),
                "of them repeat an example": sum(again for again, _ in repeats.values()),
                "tasks without a repeat": len(fresh),
            }
        },
    }


def _accuracy(of_task: Mapping[int, Mapping[str, Mapping[str, float]]], ids: Sequence[str]) -> Table:
    rows: Table = {}
    for n, values in of_task.items():
        means = {rule: [values[name][rule] for name in ids] for rule in RULES}
        rows[f"{n}"] = {"n": n, **{rule: _with_interval(means[rule]) for rule in RULES}}
    return rows


def _gain(of_task: Mapping[str, Mapping[str, float]]) -> Table:
    """The gain of the public tests over each other rule, task by task."""
    rows: Table = {}
    for rule in RULES[:3]:
        differences = [values["public tests"] - values[rule] for values in of_task.values()]
        rows[rule] = {"public tests against": rule, "points": _with_interval(differences)}
    return rows


def _with_interval(values: Sequence[float]) -> str:
    import torch

    sample = torch.tensor(values, dtype=torch.float64)
    chosen = torch.randint(len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(sample[chosen].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{100 * math.fsum(values) / len(values):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _cost(samples: Sequence[Drawn], judged: Sequence[Judged], count: int, sizes: Sequence[int]) -> Table:
    """The cost of a task: FLOPs in proportion to tokens, with the prompt read once; seconds as measured."""
    drawn = sum(len(one.steps) for one in samples)
    prompt = sum(one.prefill_tokens for one in samples) / len(samples)
    sampled = sum(one.tokens for one in samples) / drawn
    per_token = sum(one.flops for one in samples) / sum(one.tokens + one.prefill_tokens for one in samples)
    rows: Table = {
        f"{n}": {"n": n, "tokens": round(n * sampled), "TFLOP": round((prompt + n * sampled) * per_token / 1e12, 2)}
        for n in sizes
    }
    rows["all"] = {
        "n": drawn // count,
        "tokens of all tasks": round(drawn * sampled),
        "s, drawing": round(math.fsum(one.seconds for one in samples)),
        "s, public tests": round(math.fsum(one.public_seconds for one in judged)),
        "s, hidden tests": round(math.fsum(one.hidden_seconds for one in judged)),
    }
    return rows


def table_as_text(table: Table) -> str:
    """Return a table for a terminal."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    return format_table(columns, [[str(row.get(column, "")) for column in columns] for row in table.values()])
