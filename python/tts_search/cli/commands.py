"""The commands of ``tts-search``, one function each. Typer reads their options from the annotations."""

# One option is named --format, and options that may be given several times have lists as defaults.
# ruff: noqa: A002, B006

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from tts_search.api import search
from tts_search.errors import SearchError
from tts_search.evaluation.evaluate import Experiment, Runner, evaluate, read_records, run_here, write_manifest
from tts_search.evaluation.rows import Row
from tts_search.evaluation.tables import accuracy_table, cost_table
from tts_search.evaluation.tasks import Task, load_tasks
from tts_search.search.config import METHODS, SearchConfig, options_of
from tts_search.search.protocol import Policy, Verifier
from tts_search.search.result import SearchResult
from tts_search.search.voting import canonical
from tts_search.terminal import sanitize

__all__ = ["app"]

app = Typer(
    help="Search over reasoning steps with a policy and a process verifier.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Options of several commands.
PolicyPath = Annotated[str, Option("--policy", help="Checkpoint of the policy: a folder or a hub id.")]
VerifierPath = Annotated[str | None, Option("--verifier", help="Checkpoint of the process verifier.")]
Temperature = Annotated[float, Option(help="0 takes the most likely token.")]
Settings = Annotated[
    list[str],
    Option("--set", metavar="NAME=VALUE", help="Any other field of SearchConfig, such as lookahead=1 or keep=2."),
]
Vote = Annotated[str, Option(help="Which vote elects the answer; by default prm_max, or majority.")]
SystemPrompt = Annotated[str | None, Option("--system-prompt", help="System prompt of the policy.")]
Format = Annotated[str, Option("--format", help="Format of the verifier.")]
Dtype = Annotated[str | None, Option("--dtype", help="Type of weights and cache, such as bfloat16.")]
Device = Annotated[str | None, Option("--device", help="Such as cpu or cuda.")]
Memory = Annotated[str | None, Option("--kv-memory", help="Memory of each model's KV cache, such as 2GiB.")]
Budgets = Annotated[str, Option(help="Sizes of the search, such as 1,4,16,64.")]
Seed = Annotated[int, Option(help="Fixes every draw, and the problems where they are made.")]


@app.command()
def demo(
    out: Annotated[Path, Option(help="Folder of the full results.")] = Path("demo-results"),
    problems: Annotated[int, Option(help="Problems of each level.")] = 30,
    budgets: Budgets = "1,4,16,64",
    seed: Seed = 0,
) -> None:
    """Solve arithmetic with the small models that ship with the package, with and without search."""
    from tts_search.lab.demo import load_models, run_demo

    run_demo(load_models(), out, count=problems, budgets=_sizes(budgets), seed=seed)


@app.command()
def solve(
    problem: Annotated[str, Argument(help="The problem's text; - reads it from standard input.")],
    policy: PolicyPath,
    verifier: VerifierPath = None,
    method: Annotated[str, Option(help=f"One of {', '.join(METHODS)}.")] = "beam_search",
    n: Annotated[int, Option("--n", help="Candidates of a round, or completions.")] = 16,
    temperature: Temperature = 0.8,
    seed: Seed = 0,
    settings: Settings = [],
    vote: Vote = "",
    tree: Annotated[bool, Option("--tree", help="Show the search tree.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the whole result as JSON.")] = False,
    system_prompt: SystemPrompt = None,
    format: Format = "auto",
    dtype: Dtype = None,
    device: Device = None,
    kv_memory: Memory = None,
) -> None:
    """Solve one problem."""
    text = sys.stdin.read() if problem == "-" else problem
    config = make_config(method, n, seed, temperature, settings)
    elected = _elected(vote, verifier)
    models = load_checkpoints(policy, verifier, system_prompt, format, dtype, device, kv_memory)
    result = search([text], *models, config)[0]
    print(result_as_json(result, elected) if as_json else result_as_text(result, elected, show_tree=tree))


@app.command("eval")
def evaluate_(
    data: Annotated[
        str,
        Argument(help="MATH-500, AIME24, GSM8K, a JSONL file with problem, answer and perhaps level, or owner/name."),
    ],
    policy: PolicyPath,
    verifier: VerifierPath = None,
    method: Annotated[list[str], Option(help=f"May be given several times; of {', '.join(METHODS)}.")] = ["best_of_n"],
    n: Annotated[list[int], Option("--n", help="May be given several times.")] = [16],
    seed: Annotated[list[int], Option(help="May be given several times.")] = [0],
    temperature: Temperature = 0.8,
    settings: Settings = [],
    out: Annotated[Path, Option(help="Folder of the results; what it holds is not run again.")] = Path("eval-results"),
    limit: Annotated[int | None, Option(help="Only the first tasks.")] = None,
    in_flight: Annotated[int | None, Option(help="Problems searched side by side; by default, by their size.")] = None,
    vote: Vote = "",
    trees: Annotated[bool, Option("--trees", help="Keep the search trees.")] = False,
    ray: Annotated[
        str | None,
        Option(
            metavar="[ADDRESS]",
            help="Run on a Ray cluster: at the address, started here (local), or without one what Ray finds or starts.",
        ),
    ] = None,
    actors: Annotated[int | None, Option(help="Engines on the cluster; by default one a GPU, else one a core.")] = None,
    system_prompt: SystemPrompt = None,
    format: Format = "auto",
    dtype: Dtype = None,
    device: Device = None,
    kv_memory: Memory = None,
) -> None:
    """Run every method, budget and seed over a data set; an interrupted run goes on where it was."""
    elected = _elected(vote, verifier)
    tasks = load_tasks(data, limit)
    configs = {
        f"{one}, n={size}, seed={number}": make_config(one, size, number, temperature, settings, methods=method)
        for one in method
        for size in n
        for number in seed
    }
    load = partial(load_checkpoints, policy, verifier, system_prompt, format, dtype, device, kv_memory)
    models: tuple[Policy | None, Verifier | None] = (None, None)
    if ray is None:
        models = load()
        run: Runner = partial(run_here, max_in_flight=in_flight)
    else:
        from tts_search.evaluation.ray import on_ray

        run = on_ray(load, address=ray or None, actors=actors, device=device, max_in_flight=in_flight)
    names = (policy, verifier or "", system_prompt or "", format, dtype or "")
    experiments = [Experiment(label, config, *models, names, trees) for label, config in configs.items()]
    write_manifest(out / "manifest.json", experiments, data, tasks=len(tasks))
    results = out / "results.jsonl"
    try:
        run_experiments(tasks, experiments, results, elected, run)
    except KeyboardInterrupt:
        print(f"interrupted; finished tasks are in {results}, run it again to go on", file=sys.stderr)
        raise SystemExit(130) from None


@app.command()
def report(
    folder: Annotated[Path, Argument(help="Folder of an evaluation or a study.")],
    out: Annotated[Path | None, Option(help="Where to write; by default, report in that folder.")] = None,
    vote: Vote = "",
    plots: Annotated[bool, Option(help="Draw plots (needs the extra plot).")] = True,
) -> None:
    """Write tables, plots and a page on which search trees can be explored."""
    from tts_search.evaluation.report import write_report

    print(sanitize(write_report(folder, out or folder / "report", vote=vote or None, plots=plots)))


@app.command()
def study(
    out: Annotated[Path, Option(help="Folder of the results; what it holds is not run again.")] = Path("study-results"),
    problems: Annotated[int, Option(help="Problems of each level.")] = 100,
    budgets: Budgets = "1,4,16,64",
    largest: Annotated[
        int, Option(help="One more budget, for the smallest policy with the first verifier; 0: none.")
    ] = 256,
    part: Annotated[str, Option(help="I/K: run the I-th of K parts; they may run side by side.")] = "1/1",
    seed: Seed = 0,
    plan: Annotated[bool, Option("--plan", help="Only print how many tokens it will take.")] = False,
) -> None:
    """Run the whole grid of policies, verifiers, methods and budgets on the models that ship with the package."""
    from tts_search.lab.study import Grid, plan_as_text, run_study

    grid = Grid(problems=problems, budgets=tuple(_sizes(budgets)), largest=largest or None, seed=seed)
    print(plan_as_text(grid)) if plan else run_study(grid, out, part=part)


def run_experiments(
    tasks: Sequence[Task], experiments: Sequence[Experiment], results: Path, vote: str, run: Runner = run_here
) -> None:
    """Run experiments into a results file and print their tables."""
    seconds: dict[str, float] = {}
    rows = []
    begun = {record.experiment for record in read_records(results)}  # of these, the time is not known
    for experiment in experiments:
        begin = time.perf_counter()
        records = evaluate(tasks, [experiment], results, run=run)
        if experiment.key not in begun:
            seconds[experiment.label] = time.perf_counter() - begin
        rows.append(Row(experiment.label, records, vote))
    tables = sanitize(f"{accuracy_table(rows)}\n\n{cost_table(rows, seconds)}")  # levels are the data set's words
    print(f"{tables}\n\n{len(tasks)} tasks; results: {results}")
    errors = [record.error for row in rows for record in row.records if record.error]
    if errors:
        print(f"{len(errors)} searches failed and count as wrong; the first one: {sanitize(errors[0])}")


def _elected(vote: str, verifier: str | None) -> str:
    """The name of the vote that was asked for, or of the usual one."""
    return canonical(vote or ("prm_max" if verifier else "majority"))


def _sizes(budgets: str) -> list[int]:
    try:
        return [int(size) for size in budgets.split(",")]
    except ValueError:
        raise SearchError(f"--budgets: expected whole numbers such as 1,4,16, got {budgets!r}") from None


def make_config(
    method: str, n: int, seed: int, temperature: float, settings: list[str], *, methods: Sequence[str] = ()
) -> SearchConfig:
    """Return the config of the options; `settings` are NAME=VALUE for its other fields, values as JSON or plain text.

    A setting that this method does not use may be meant for another one of `methods`.

    Raises
    ------
    ConfigError
        If a value is one that a field cannot have.
    SearchError
        If there is no such field.
    """
    values: dict[str, Any] = {"method": method, "n": n, "seed": seed, "temperature": temperature}
    fields = list(SearchConfig.__dataclass_fields__)
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in fields:
            raise SearchError(f"--set: expected NAME=VALUE with a name among {', '.join(fields)}, got {setting!r}")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    others = set[str]().union(*map(options_of, methods)) - options_of(method)
    return SearchConfig(**{name: value for name, value in values.items() if name not in others})


def load_checkpoints(
    policy: str,
    verifier: str | None,
    system_prompt: str | None,
    format: str,
    dtype: str | None,
    device: str | None,
    kv_memory: str | None,
) -> tuple[Policy, Verifier | None]:
    """Return the models of the options."""
    from tts_search.policies.hf import HFPolicy
    from tts_search.verifiers.hf import HFVerifier

    own: dict[str, Any] = {"dtype": dtype, "device": device, "kv_memory": kv_memory}
    loaded = HFPolicy(policy, system_prompt=system_prompt, **own)
    return loaded, None if verifier is None else HFVerifier(verifier, format=format, **own)


def result_as_text(result: SearchResult, vote: str, *, show_tree: bool = False) -> str:
    """Return a result for a terminal; what the model wrote is stripped of control sequences."""
    best, stats = result.best, result.stats
    scores = " ".join(f"{score:.3f}" for score in best.step_scores) or "none"
    lines = [
        sanitize(best.text).strip(),
        "",
        f"answer ({vote}): {sanitize(result.answer(vote)) or 'none'}",
        f"step scores: {scores}",
        f"{len(result.completions)} completions, {sum(one.finished for one in result.completions)} finished; "
        f"{stats.rounds} rounds, {stats.branches} branches, {stats.wall_s:.1f} s",
        f"tokens: {stats.policy_tokens} sampled, {stats.policy_prefill_tokens} of the prompt, "
        f"{stats.verifier_tokens} read by the verifier",
        f"KV cache of the policy: {stats.peak_unique_kv_tokens} tokens at most, "
        f"{stats.peak_logical_kv_tokens} without sharing",
    ]
    return "\n".join([*lines, "", result.tree.render()] if show_tree else lines)


def result_as_json(result: SearchResult, vote: str) -> str:
    """Return a result as JSON; scores that are no finite number are null."""
    data = {
        "problem": result.problem,
        "answer": result.answer(vote),
        "vote": vote,
        "best": asdict(result.best),
        "completions": [asdict(completion) for completion in result.completions],
        "stats": asdict(result.stats),
        "config": result.config.as_dict(),
        "tree": json.loads(result.tree.to_json()),
    }
    return json.dumps(_finite(data), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
