"""What it is worth to merge equal candidates of a beam, against sampling as many tokens without::

    python benchmarks/dedupe.py                                      # on the demo's models
    python benchmarks/dedupe.py --policy PATH --data math500.jsonl   # on a chat model that judges its own steps

The same problems and seeds, at several n, three ways:

``as drawn``   the default: equal candidates hold as many places of the beam as they were drawn.
``merged``     ``dedupe``: of equal candidates the first stays, and the places go to as many different texts.
``counted``    merged, and the next children are dealt to survivors by how often their texts were drawn.

Accuracy is that of the best completion by the verifier (``prm_max``) and of the weighted vote (``prm_vote``). A gain is
the difference to the accuracy of the search as drawn with the same number of tokens, which is interpolated between the
two nearest budgets (over the logarithm of tokens). Its interval is a bootstrap over problems. Nothing is cached from
one search to the next.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import record
import torch
from tts_search import HFPolicy, HFVerifier, SearchConfig, SearchResult, search
from tts_search.domains.mathematics import equivalent
from tts_search.evaluation.statistics import interval
from tts_search.evaluation.tasks import Task, TaskFile
from tts_search.lab.arithmetic import LEVELS
from tts_search.lab.demo import CONFIG, load_models, make_tasks
from tts_search.search.algorithms.beam import Beam
from tts_search.search.algorithms.beam_search import search_beams
from tts_search.search.moves import Moves
from tts_search.search.run import Branch, Run

VOTES = ("prm_max", "prm_vote")
DRAWS = 2000  # of the bootstrap


class CountedBeam(Beam):
    """A beam of different texts, each of which gets children by how often it was drawn."""

    def _filtered(self, pool: list[Branch]) -> list[Branch]:
        drawn = Counter("".join(branch.texts) for branch in pool)
        kept = super()._filtered(pool)
        self.counts = {branch.id: drawn["".join(branch.texts)] for branch in kept}
        return kept

    def deal(self) -> list[Branch]:
        """One turn for each survivor, and the others where a turn is worth most (D'Hondt's method)."""
        if self.survivors == [self.run.root]:
            return super().deal()
        turns = Counter(dict.fromkeys(self.survivors, 1))
        while turns.total() < self.width:
            turns[max(self.survivors, key=lambda branch: self.counts[branch.id] / (turns[branch] + 1))] += 1
        return list(turns.elements())


def counted_beam_search(run: Run) -> Moves[list[Branch]]:
    """Beam search in such a beam."""
    return search_beams(run, [CountedBeam(run, run.config.n, run.config.places)])


WAYS: dict[str, dict[str, Any]] = {
    "as drawn": {},
    "merged": {"dedupe": True},
    "counted": {"method": counted_beam_search, "dedupe": True},
}


@dataclass
class Arm:
    """One search of all problems, with all seeds: per problem the means over seeds."""

    right: dict[str, list[float]]  # by vote
    tokens: list[float]
    verifier_tokens: list[float]
    repeats: float
    seconds: float


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="problems of each level of the demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", default="4,16,64")
    parser.add_argument("--policy", help="a chat model's checkpoint")
    parser.add_argument("--data", help="its problems")
    parser.add_argument("--limit", type=int, default=24, help="how many of them, spread over the file")
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine")
    options = parser.parse_args()
    if options.policy:
        tasks = spread(TaskFile(options.data), options.limit)
        record.write(
            "dedupe-chat",
            what=f"The same with a chat model that is asked about each of its steps: {len(tasks)} problems of MATH-500",
            command=f"python benchmarks/dedupe.py --policy PATH --data math500.jsonl --limit {options.limit}",
            beside=options.beside,
            tables={"smollm2-135m-instruct": chat(options.policy, tasks)},
            packages=("torch", "transformers"),
        )
        return
    budgets = [int(size) for size in options.budgets.split(",")]
    tasks = make_tasks(LEVELS, options.count, seed=1)
    record.write(
        "dedupe",
        what=f"Beam search with and without merging of equal candidates: {len(tasks)} problems of the demo, "
        f"{options.seeds} seeds; % right (95% interval), tokens of a problem, candidates of a round that repeat one",
        command="python benchmarks/dedupe.py",
        beside=options.beside,
        tables=dict(demo(tasks, budgets, range(options.seeds))),
        packages=("torch", "transformers"),
    )


def demo(tasks: Sequence[Task], budgets: Sequence[int], seeds: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
    """The tables of the demo's smallest policy under either verifier."""
    models = load_models()
    name, policy = next(iter(models.policies.items()))
    tables = []
    for place, (verifier_name, verifier) in enumerate(models.verifiers.items()):
        sizes = budgets[:2] if place else budgets
        arms = {
            (way, n): run(policy, verifier, tasks, replace(CONFIG, n=n, **changes), seeds)
            for way, changes in WAYS.items()
            for n in sizes
        }
        rows = {row_name(*key): row(*key, arm, len(seeds)) for key, arm in arms.items()}
        plain = [arms["as drawn", n] for n in sizes]
        for (way, n), arm in arms.items():
            if way != "as drawn":
                rows[row_name(way, n)] |= {f"gain by {vote}, points": gain(plain, arm, vote) for vote in VOTES}
        tables.append((f"{name}, {verifier_name}", rows))
    return tables


def chat(path: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """The table of a chat model that is asked about its own steps."""
    policy = HFPolicy(path, dtype="bfloat16")
    verifier = HFVerifier(path, format="yes_no", dtype="bfloat16")
    config = SearchConfig(n=16, max_steps=8, max_step_tokens=48, temperature=0.8)
    found = {}
    for way, changes in WAYS.items():
        arm = run(policy, verifier, tasks, replace(config, **changes), [0])
        found[row_name(way, 16)] = {"problems": len(tasks), **row(way, 16, arm, 1)}
    return found


def spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """As many tasks, evenly over a file."""
    everyone = list(tasks)
    return everyone[:: max(1, len(everyone) // count)][:count]


def run(policy: Any, verifier: Any, tasks: Sequence[Task], config: SearchConfig, seeds: Sequence[int]) -> Arm:
    """One arm."""
    begin = time.monotonic()
    found = [
        search(
            [task.problem for task in tasks],
            policy,
            verifier,
            replace(config, seed=seed),
            progress=False,
            prefix_cache=False,
        )
        for seed in seeds
    ]
    seconds = time.monotonic() - begin
    by_task = list(zip(*found, strict=True))
    right = {
        vote: [
            mean(equivalent(one.answer(vote), task.answer) for one in own)
            for task, own in zip(tasks, by_task, strict=True)
        ]
        for vote in VOTES
    }
    arm = Arm(
        right,
        [mean(one.stats.policy_tokens for one in own) for own in by_task],
        [mean(one.stats.verifier_tokens for one in own) for own in by_task],
        mean(share for own in by_task for one in own for share in repeats(one)),
        seconds,
    )
    print(
        config.n,
        config.dedupe,
        {vote: round(100 * mean(own), 1) for vote, own in right.items()},
        round(seconds),
        flush=True,
    )
    return arm


def repeats(result: SearchResult) -> list[float]:
    """Of each round the share of candidates whose whole text an earlier one has."""
    texts: dict[int, str] = {}
    rounds: dict[int, list[str]] = {}
    for node in result.tree.nodes:
        texts[node.id] = texts.get(node.parent if node.parent is not None else -1, "") + node.text
        rounds.setdefault(node.round, []).append(texts[node.id])
    return [1 - len(set(own)) / len(own) for number, own in rounds.items() if number]


def row_name(way: str, n: int) -> str:
    """The name of an arm's row."""
    return f"{way}, {n}"


def row(way: str, n: int, arm: Arm, seeds: int) -> dict[str, Any]:
    """What a table says of an arm."""
    cells: dict[str, Any] = {"equal candidates": way, "n": n}
    for vote, own in arm.right.items():
        low, high = interval(own, len(own) * seeds)
        cells[f"{vote}, %"] = f"{100 * mean(own):.1f} ({100 * low:.1f} to {100 * high:.1f})"
    cells |= {"tokens": round(mean(arm.tokens)), "verifier's tokens": round(mean(arm.verifier_tokens))}
    return {**cells, "repeats, %": round(100 * arm.repeats, 1)}


def gain(plain: Sequence[Arm], merged: Arm, vote: str) -> str:
    """Points that merging gains at equal tokens, with the interval of a bootstrap over problems."""
    count = len(merged.tokens)
    rng = random.Random(0)
    draws = torch.tensor([rng.choices(range(count), k=count) for _ in range(DRAWS)])
    everyone = torch.arange(count)[None]
    values = [_gains(plain, merged, vote, picked) for picked in (everyone, draws)]
    low, high = torch.quantile(values[1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{values[0].item():+.1f} ({low:+.1f} to {high:+.1f})"


def _gains(plain: Sequence[Arm], merged: Arm, vote: str, picked: torch.Tensor) -> torch.Tensor:
    """Of each draw of problems [draws, problems] the gain in points."""

    def means(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[picked].mean(1)

    tokens = torch.stack([means(arm.tokens) for arm in plain]).log()  # [budgets, draws]
    right = torch.stack([means(arm.right[vote]) for arm in plain])
    wanted = means(merged.tokens).log()
    upper = (tokens < wanted).sum(0).clamp(1, len(plain) - 1)  # beyond both ends the line goes on
    lower, draw = upper - 1, torch.arange(len(wanted))
    share = (wanted - tokens[lower, draw]) / (tokens[upper, draw] - tokens[lower, draw])
    expected = right[lower, draw] + share * (right[upper, draw] - right[lower, draw])
    return 100 * (means(merged.right[vote]) - expected)


def mean(values: Any) -> float:
    """The mean of numbers; NaN of none."""
    own = [float(value) for value in values]
    return math.fsum(own) / len(own) if own else math.nan


if __name__ == "__main__":
    main()
