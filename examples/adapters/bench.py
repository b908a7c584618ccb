"""Before and after: each framework's own search over whole texts in transformers, then over our policy and verifier.

    PYTHONPATH=build/adapters python examples/adapters/bench.py --search-and-learn PATH/src --repeat 5

Same framework, same adapter, same models, same problems, same sizes; what differs is who runs the models:
``whole_texts.py`` as the frameworks do, or our forest. The third column is one search of ours by the framework's preset
over all problems at once, where there is one. Runs are interleaved, times are medians; tokens are those that the models
were given, padding left out. The draws differ (torch's generator, ours), so the texts do; the tokens sampled say by how
much. Frameworks that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging
from tts_search import HFPolicy, HFVerifier, SearchConfig, search
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate
from whole_texts import WholeTextPolicy, WholeTextVerifier, count_forwarded


@dataclass
class Drivers:
    """A policy and a verifier, and functions that tell how many tokens they have forwarded and sampled."""

    policy: Any
    verifier: Any
    forwarded: Callable[[], tuple[int, int]]


@dataclass
class Measured:
    """Seconds and tokens of one run."""

    seconds: float
    policy: int
    verifier: int


Job = Callable[[Drivers], Any]


def load(args: argparse.Namespace, *, chat: bool) -> tuple[Drivers, Drivers]:
    """The two ways to run the models: before and after."""
    policy = HFPolicy(args.policy, chat=chat, dtype=args.dtype, kv_memory="512MiB")
    verifier = HFVerifier(args.verifier, dtype=args.dtype, kv_memory="512MiB")
    policy.prefix_cache = verifier.prefix_cache = False  # a run must not profit from the runs before it
    counts = count_forwarded(policy), count_forwarded(verifier)
    whole = WholeTextPolicy(args.policy, chat=chat, dtype=args.dtype)
    reads = WholeTextVerifier(args.verifier, verifier, dtype=args.dtype)
    return (
        Drivers(whole, reads, lambda: (whole.forwarded, reads.forwarded)),
        Drivers(policy, verifier, lambda: (counts[0][0], counts[1][0])),
    )


def measure(job: Job, drivers: Drivers) -> Measured:
    """Run a job once."""
    before = drivers.forwarded()
    begin = time.perf_counter()
    job(drivers)
    seconds = time.perf_counter() - begin
    after = drivers.forwarded()
    return Measured(seconds, after[0] - before[0], after[1] - before[1])


def report(name: str, runs: dict[str, list[Measured]]) -> None:
    """Print a row: medians, and ratios to the first column."""
    first = statistics.median(run.seconds for run in runs["before"])
    cells = []
    for way, measured in runs.items():
        seconds = statistics.median(run.seconds for run in measured)
        policy, verifier = (
            int(statistics.median(getattr(run, key) for run in measured)) for key in ("policy", "verifier")
        )
        cells.append(f"{way}: {seconds:7.2f} s ({first / seconds:4.1f}x), {policy:7d} + {verifier:7d} tokens")
    print(f"{name:34}" + " | ".join(cells), flush=True)


def by_preset(config: SearchConfig, problems: list[str]) -> Job:
    """One search of ours over all problems."""
    return lambda drivers: search(
        problems, drivers.policy, drivers.verifier, config, progress=False, prefix_cache=False
    )


def jobs_of_search_and_learn(args: argparse.Namespace, problems: list[str]) -> dict[str, tuple[Job, Job | None, bool]]:
    """Name: (its own search, ours instead, whether prompts come with their template)."""
    if args.search_and_learn is None:
        return {}
    import with_search_and_learn as example

    def job(searches: Any, approach: str) -> Job:
        def run(drivers: Drivers) -> None:
            llm, prm = example.adapter.LLM(drivers.policy), example.adapter.PRM(drivers.verifier)
            example.run(searches, approach, llm, prm, problems, args.n)
            llm.close(), prm.close()

        return run

    theirs = example.theirs(args.search_and_learn)
    return {
        f"search-and-learn {approach}": (job(theirs, approach), job(example.adapter, approach), False)
        for approach in ("best_of_n", "beam_search", "dvts")
    }


def jobs_of_its_hub(args: argparse.Namespace, problems: list[str]) -> dict[str, tuple[Job, Job | None, bool]]:
    """As above."""
    if importlib.util.find_spec("its_hub") is None:
        return {}
    import with_its_hub as example

    def job(method: str) -> Job:
        def run(drivers: Drivers) -> None:
            lm = example.LanguageModel(drivers.policy, max_tokens=400)
            prm = example.ProcessRewardModel(drivers.verifier)
            example.run(method, lm, prm, problems, args.n)
            lm.close(), prm.close()

        return run

    options = {"budget": args.n, "max_steps": 16, "stop_token": "\\boxed"}
    presets = {
        "beam_search": SearchConfig.its_hub("beam_search", beam_width=4, **options),
        "particle_filtering": SearchConfig.its_hub("particle_filtering", **options),
    }
    return {f"its_hub {name}": (job(name), by_preset(config, problems), True) for name, config in presets.items()}


def jobs_of_crucible(args: argparse.Namespace, problems: list[str]) -> dict[str, tuple[Job, Job | None, bool]]:
    """As above; there is no preset."""
    if importlib.util.find_spec("crucible") is None:
        return {}
    import with_crucible as example

    def job(method: str) -> Job:
        def run(drivers: Drivers) -> None:
            policy, verifier = example.PolicyModel(drivers.policy), example.ProcessVerifier(drivers.verifier)
            example.run(method, policy, verifier, problems, args.n)
            policy.close(), verifier.close()

        return run

    return {f"crucible {name}": (job(name), None, True) for name in ("beam_search", "mcts", "best_of_n")}


def main() -> None:
    """Run all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search-and-learn", metavar="SRC", help="the folder src of a checkout; left out without it")
    parser.add_argument("--policy", default=str(MODELS_DIR / "policy-3m"))
    parser.add_argument("--verifier", default=str(MODELS_DIR / "prm-strong"), help="a token-classification PRM")
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", help="the name of a measurement in benchmarks/results: the tokens")
    parser.add_argument("--only", default="", help="run those whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    problems = [task.problem for task in generate("test", 5, args.problems, 0)]
    jobs = {
        **jobs_of_search_and_learn(args, problems),
        **jobs_of_its_hub(args, problems),
        **jobs_of_crucible(args, problems),
    }
    loaded = {chat: load(args, chat=chat) for chat in (False, True)}
    print(f"{args.problems} problems, n = {args.n}, {args.dtype}, {args.threads} threads; tokens: policy + verifier")
    rows = {}
    for name, (theirs, ours, chat) in jobs.items():
        if args.only not in name:
            continue
        before, after = loaded[chat]
        ways = {"before": (theirs, before), "after": (theirs, after)} | ({"ours": (ours, after)} if ours else {})
        runs: dict[str, list[Measured]] = {way: [] for way in ways}
        for _ in range(args.repeat):
            for way, (job, drivers) in ways.items():
                runs[way].append(measure(job, drivers))
        report(name, runs)
        rows[name] = row_of(name, runs)
    if args.write:
        write(rows, args)


def row_of(name: str, runs: dict[str, list[Measured]]) -> dict[str, str]:
    """The tokens that both models were given, before and after; medians."""
    before, after = (
        [int(statistics.median(getattr(run, model) for run in runs[way])) for model in ("policy", "verifier")]
        for way in ("before", "after")
    )
    return {
        "search": name,
        "before": f"{before[0]} + {before[1]}",
        "after": f"{after[0]} + {after[1]}",
        "tokens": f"{sum(before) / sum(after):.1f}x fewer",
    }


def write(rows: dict[str, dict[str, str]], args: argparse.Namespace) -> None:
    """Write a measurement."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import record

    record.write(
        args.write,
        what="Tokens that both models were given in frameworks' own searches, policy + verifier, padding left out: "
        f"n = {args.n}, {Path(args.policy).name} and {Path(args.verifier).name}, {args.problems} problems of eight to "
        f"ten steps, {args.dtype}; medians of {args.repeat}",
        command="PYTHONPATH=build/adapters python examples/adapters/bench.py --search-and-learn search-and-learn/src "
        f"--problems {args.problems}",
        beside="other work (counts do not depend on it)",
        tables={"tokens": rows},
        packages=("torch", "transformers", "its-hub", "crucible-ttc"),
    )


if __name__ == "__main__":
    main()
