"""Scores of quantised process reward models, compared with those of the same model unquantised.

python benchmarks/prm_scores.py [--checkpoint PATH ... --format FORMAT] [--policy PATH --tasks FILE] [--problems 40]
    [--n 8] [--kv int8 xquant-4 ...] [--write NAME]

Texts are completions, right and wrong ones, that the demo's policy samples for its own problems, or your policy for
your problems. Verifiers are the demo's, or your checkpoints. With --kv, the keys and values are quantised. For each
step: the difference of its score to that of the unquantised model. For each problem: whether the best completion by the
last step's score is the same; ties go to the first.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import get_args

import record
import torch
from tts_search import HFPolicy, HFVerifier, SearchConfig, search
from tts_search.adapters.stateless import StepScorer
from tts_search.evaluation.tasks import load_tasks
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate
from tts_search.models.decoder import KvDtype

FORMS: dict[str, dict[str, str]] = {
    "as it is": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "KV in int8": {"kv_dtype": "int8"},
    "KV in int4": {"kv_dtype": "int4"},
}
Texts = list[tuple[str, list[tuple[str, ...]]]]


def completions(policy_path: str, tasks: str | None, problems: int, n: int) -> Texts:
    """Each problem with the steps of n completions."""
    policy = HFPolicy(policy_path)
    found = load_tasks(tasks, problems) if tasks else generate("test", 3, problems, seed=7)
    texts = [one.problem for one in found]
    config = SearchConfig("best_of_n", n=n, max_tokens=400)
    results = search(texts, policy, None, config, progress=False)
    return [(result.problem, [one.steps for one in result.completions]) for result in results]


def scores(checkpoint: str, format_: str, options: dict[str, str], texts: Texts) -> list[list[list[float]]]:
    """By problem, completion and step."""
    scorer = StepScorer(HFVerifier(checkpoint, format=format_, **options))  # type: ignore[arg-type]
    return [scorer.score([(problem, steps) for steps in branches]) for problem, branches in texts]


def best(branches: list[list[float]]) -> int:
    """The completion with the highest last score."""
    return max(range(len(branches)), key=lambda i: branches[i][-1] if branches[i] else -1.0)


def compare(found: list[list[list[float]]], plain: list[list[list[float]]]) -> dict[str, float]:
    """The line of a form."""
    flat, exact = (
        torch.tensor([score for problem in own for branch in problem for score in branch], dtype=torch.float64)
        for own in (found, plain)
    )
    away = (flat - exact).abs()
    same = sum(best(mine) == best(theirs) for mine, theirs in zip(found, plain, strict=True))
    return {
        "steps": len(flat),
        "largest difference": round(away.max().item(), 4),
        "mean difference": round(away.mean().item(), 5),
        "same best completion, %": round(100 * same / len(found), 1),
    }


def main() -> None:
    """Print a line for each verifier and form, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", nargs="+", default=[str(MODELS_DIR / name) for name in ("prm-weak", "prm-strong")]
    )
    parser.add_argument("--format", default="auto")
    parser.add_argument("--policy", default=str(MODELS_DIR / "policy-0.6m"))
    parser.add_argument("--tasks", help="a file of problems; else the demo's")
    parser.add_argument("--kv", nargs="+", choices=get_args(KvDtype), help="the forms: keys and values in so few bits")
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--write", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    texts = completions(options.policy, options.tasks, options.problems, options.n)
    forms = {"as it is": {}, **{f"KV in {kind}": {"kv_dtype": kind} for kind in options.kv}} if options.kv else FORMS
    rows: dict[str, dict[str, record.Cell]] = {}
    for checkpoint in options.checkpoint:
        name = Path(checkpoint).name
        plain = scores(checkpoint, options.format, {}, texts)
        for form, own in forms.items():
            found = plain if not own else scores(checkpoint, options.format, own, texts)
            row: dict[str, record.Cell] = {"verifier": name, "form": form, **compare(found, plain)}
            print(row, flush=True)
            rows[f"{name}, {form}"] = row
    if options.write:
        record.write(
            options.write,
            what=f"Scores of steps by form of the verifier, beside the verifier as it is: {options.n} completions of "
            f"{options.problems} problems of {Path(options.tasks).stem if options.tasks else 'the demo'}",
            command=shlex.join(["python", "benchmarks/prm_scores.py", *map(record.hidden, sys.argv[1:])]),
            beside="other work (scores do not depend on it)",
            tables={"scores": rows},
        )


if __name__ == "__main__":
    main()
