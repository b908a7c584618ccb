"""What large searches count and cost the host, for the prediction in docs/scale.md::

    python benchmarks/scale.py --write scale

Six problems of levels 3 to 5, n = 256, the demo's smallest policy and its strong verifier, on one thread: their
arithmetic is small, so most of the time is the host's (Python, forest, planner, sampling).
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import record
import torch
from tts_search.evaluation.evaluate import Experiment, Record, run_here
from tts_search.evaluation.records import record_as_json
from tts_search.lab.demo import CONFIG, load_models, make_tasks

COUNTS = {
    "sampled": ("tokens sampled", "policy_tokens"),
    "verified": ("tokens read by the verifier, prompt included", "verifier_tokens"),
    "anew": ("tokens that reading every branch anew would have taken the policy", "policy_logical_tokens"),
    "shared": ("KV cache at its peak, shared", "peak_unique_kv_tokens"),
    "unshared": ("the same, unshared", "peak_logical_kv_tokens"),
}
CONFIGS = {"beam search": replace(CONFIG, n=256), "best-of-N": CONFIG.with_method("best_of_n", n=256)}


def main() -> None:
    """Measure; print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", help="the name of a measurement in benchmarks/results")
    parser.add_argument("--beside", default="other work", help="what else ran, for --write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(name, keep_trees=True) for name in CONFIGS}
    timed = [{name: measure(name, keep_trees=False) for name in CONFIGS} for _ in range(5)]
    tables = {"counts": counts(found), "host": {"token": host(timed)}}
    print(tables)
    if options.write:
        record.write(
            options.write,
            what="What searches of 6 problems of levels 3 to 5 count and cost the host: n = 256, policy-0.1m and "
            "prm-strong; means of a problem",
            command="python benchmarks/scale.py --write scale",
            beside=options.beside,
            tables=tables,
            packages=("torch", "transformers"),
        )


def measure(name: str, *, keep_trees: bool) -> list[Record]:
    """The records of a search; a first one, which does not count, warms the models up."""
    models = load_models()
    policy, verifier = models.policies["policy-0.1m"], models.verifiers["prm-strong"]
    experiment = Experiment(name, CONFIGS[name], policy, verifier, keep_trees=keep_trees)
    for tasks in (make_tasks((3,), 1, 1), make_tasks((3, 4, 5), 2, 0)):
        records = list(run_here(experiment, tasks, progress=False))
    return records


def counts(found: dict[str, list[Record]]) -> dict[str, dict[str, record.Cell]]:
    """The means of what was counted, and the sizes of results."""
    rows: dict[str, dict[str, record.Cell]] = {}
    for key, (what, field) in COUNTS.items():
        means = {name: round(statistics.mean(one.stats[field] for one in records)) for name, records in found.items()}
        rows[key] = {"": what, **means}
    sizes = {name: f"{size(records, tree=False)}; {size(records, tree=True)}" for name, records in found.items()}
    return {**rows, "bytes": {"": "a line of results; with its tree", **sizes}}


def size(records: list[Record], *, tree: bool) -> str:
    """The mean length of a line of results."""
    lines = [record_as_json(one if tree else replace(one, tree=None)) for one in records]
    mean = statistics.mean(len(line.encode()) for line in lines) / 1000
    return f"{mean:.1f} KB" if mean < 10 else f"{mean:.0f} KB"


def host(runs: list[dict[str, list[Record]]]) -> dict[str, record.Cell]:
    """Microseconds for each sampled token, of both models and of all that is around them; medians of the runs."""
    return {f"{name}, us": round(statistics.median(microseconds(one[name]) for one in runs)) for name in CONFIGS}


def microseconds(records: list[Record]) -> float:
    """Time of a sampled token."""
    return 1e6 * sum(one.seconds or 0 for one in records) / sum(one.stats["policy_tokens"] for one in records)


if __name__ == "__main__":
    main()
