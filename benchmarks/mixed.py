"""The gain of several verifiers that are combined into one (``MixedVerifier``)::

    python benchmarks/mixed.py

``demo``: the demo's two verifiers on its smallest policy, alone and together. The mixture is fitted to searches of
other problems, without their right answers. ``simulated``: six verifiers with accuracies from 0.55 to 0.85 and error
correlation 0.3, as in ``tests/search/test_mixed.py``, fitted to 300 other problems.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
from tts_search import MixedVerifier, SearchConfig, search
from tts_search.domains.mathematics import equivalent
from tts_search.evaluation.statistics import interval
from tts_search.evaluation.tasks import Task
from tts_search.lab.arithmetic import LEVELS
from tts_search.lab.demo import CONFIG, load_models, make_tasks
from tts_search.verifiers.mixed import Mixture

sys.path.append(str(Path(__file__).parents[1] / "tests" / "search"))

from test_mixed import gains

CONFIGS = {
    "best-of-16": CONFIG.with_method("best_of_n", n=16),
    "beam search, n = 16": replace(CONFIG, n=16),
}
SEEDS = (0, 1, 2)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="problems of each level")
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine")
    options = parser.parse_args()
    simulated = {name: {"by": name, "% right": round(100 * share, 1)} for name, share in gains(range(20)).items()}
    record.write(
        "mixed",
        what=f"Two verifiers and their mixtures on {len(LEVELS) * options.count} problems of the demo, {len(SEEDS)} "
        "seeds, and six simulated ones on 300 problems, 20 seeds: % right of the best completion (95% interval)",
        command="python benchmarks/mixed.py",
        beside=options.beside,
        tables={"demo": demo(options.count), "simulated": simulated},
        packages=("torch", "transformers"),
    )


def demo(count: int) -> dict[str, Any]:
    """The demo's verifiers."""
    models = load_models()
    policy = next(iter(models.policies.values()))
    both = list(models.verifiers.values())
    past = scored(make_tasks(LEVELS, count, seed=101), policy, both, CONFIGS["best-of-16"])
    ways = {
        **models.verifiers,
        "mean as they are": MixedVerifier(both),
        "mean, normalised": MixedVerifier(both, mixture=Mixture.fitted(past)),
        "agreement": MixedVerifier(both, mixture=Mixture.fitted(past, "agreement")),
    }
    tasks = make_tasks(LEVELS, count, seed=1)
    rows: dict[str, Any] = {}
    for name, verifier in ways.items():
        rows[name] = {"verifier": name}
        for title, config in CONFIGS.items():
            shares = accuracy(tasks, policy, verifier, config)
            low, high = interval(shares, len(shares) * len(SEEDS))
            mean = sum(shares) / len(shares)
            rows[name][f"{title}, %"] = f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        weights = getattr(verifier, "mixture", None)
        rows[name]["weights"] = " : ".join(f"{each:.2f}" for each in weights.weights) if weights else None
        print(rows[name], flush=True)
    return rows


def scored(
    tasks: Sequence[Task], policy: Any, verifiers: Sequence[Any], config: SearchConfig
) -> list[list[tuple[str, list[float]]]]:
    """Of each problem its completions' answers and what each verifier says of them: the same draws for all."""
    found = [search([task.problem for task in tasks], policy, each, config, progress=False) for each in verifiers]
    return [
        [(one[0].answer or "", [each.score for each in one]) for one in zip(*(r.completions for r in own), strict=True)]
        for own in zip(*found, strict=True)
    ]


def accuracy(tasks: Sequence[Task], policy: Any, verifier: Any, config: SearchConfig) -> list[float]:
    """Of each problem the share of seeds whose best completion is right."""
    right = [0.0] * len(tasks)
    for seed in SEEDS:
        results = search([task.problem for task in tasks], policy, verifier, replace(config, seed=seed), progress=False)
        for place, (task, result) in enumerate(zip(tasks, results, strict=True)):
            right[place] += equivalent(result.answer("prm_max"), task.answer) / len(SEEDS)
    return right


if __name__ == "__main__":
    main()
