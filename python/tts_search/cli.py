"""The command line: ``tts-search demo | solve | eval | study | report``."""

# typer declares options by calls in defaults, and one of them is named --format.
# ruff: noqa: A002, B008

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from tts_search.api import search
from tts_search.config import METHODS, SearchConfig
from tts_search.errors import MissingExtraError, SearchError, require
from tts_search.evaluate import Experiment, Runner, evaluate, read_records, run_here, write_manifest
from tts_search.protocol import Policy, Verifier
from tts_search.report import Row, accuracy_table, cost_table
from tts_search.result import SearchResult
from tts_search.tasks import Task, load_tasks
from tts_search.terminal import sanitize
from tts_search.voting import canonical

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    with _errors_as_text():
        build_app()(_with_ray_address(sys.argv[1:]))


def _with_ray_address(arguments: Sequence[str]) -> list[str]:
    """Give ``--ray`` without an address the one that means Ray's own choice: typer has no options of optional value."""
    without = [one == "--ray" and after.startswith("-") for one, after in pairwise([*arguments, "-"])]
    return [f"{one}=" if bare else one for one, bare in zip(arguments, without, strict=True)]


def build_app() -> Callable[[Sequence[str]], None]:
    """Return the command line's application.

    Raises
    ------
    MissingExtraError
        If typer is not installed.
    """
    require("typer", "search")
    import typer

    app = typer.Typer(
        help="Search over reasoning steps with a policy and a process verifier.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    # Options that both commands on checkpoints have.
    policy_option = typer.Option(..., "--policy", help="Checkpoint of the policy: a folder or a hub id.")
    verifier_option = typer.Option(None, "--verifier", help="Checkpoint of the process verifier.")
    temperature_option = typer.Option(0.8, help="0 takes the most likely token.")
    set_option = typer.Option(
        [], "--set", metavar="NAME=VALUE", help="Any other field of SearchConfig, such as lookahead=1 or keep=2."
    )
    vote_option = typer.Option("", help="Which vote elects the answer; by default prm_max, or majority.")
    system_option = typer.Option(None, "--system-prompt", help="System prompt of the policy.")
    format_option = typer.Option("auto", "--format", help="Format of the verifier.")
    dtype_option = typer.Option(None, "--dtype", help="Type of weights and cache, such as bfloat16.")
    device_option = typer.Option(None, "--device", help="Such as cpu or cuda.")
    memory_option = typer.Option(None, "--kv-memory", help="Memory of each model's KV cache, such as 2GiB.")

    @app.command()
    def demo(
        out: Path = typer.Option(Path("demo-results"), help="Folder of the full results."),
        problems: int = typer.Option(30, help="Problems of each level."),
        budgets: str = typer.Option("1,4,16,64", help="Sizes of the search."),
        seed: int = typer.Option(0, help="Fixes the problems and every draw."),
    ) -> None:
        """Solve arithmetic with the small models that ship with the package, with and without search."""
        from tts_search.demo import load_models, run_demo

        sizes = [int(size) for size in budgets.split(",")]
        run_demo(load_models(), out, count=problems, budgets=sizes, seed=seed)

    @app.command()
    def solve(
        problem: str = typer.Argument(..., help="The problem's text; - reads it from standard input."),
        policy: str = policy_option,
        verifier: str = verifier_option,
        method: str = typer.Option("beam_search", help=f"One of {', '.join(METHODS)}."),
        n: int = typer.Option(16, "--n", help="Candidates of a round, or completions."),
        temperature: float = temperature_option,
        seed: int = typer.Option(0, help="Fixes every draw."),
        settings: list[str] = set_option,
        vote: str = vote_option,
        tree: bool = typer.Option(False, "--tree", help="Show the search tree."),
        as_json: bool = typer.Option(False, "--json", help="Print the whole result as JSON."),
        system_prompt: str = system_option,
        format: str = format_option,
        dtype: str = dtype_option,
        device: str = device_option,
        kv_memory: str = memory_option,
    ) -> None:
        """Solve one problem."""
        text = sys.stdin.read() if problem == "-" else problem
        config = make_config(method, n, seed, temperature, settings)
        elected = canonical(vote or _default_vote(verifier))
        models = _load(policy, verifier, system_prompt, format, dtype, device, kv_memory)
        result = search([text], *models, config)[0]
        print(result_as_json(result, elected) if as_json else result_as_text(result, elected, show_tree=tree))

    @app.command("eval")
    def evaluate_(
        data: str = typer.Argument(
            ..., help="MATH-500, AIME24, GSM8K, a JSONL file with problem, answer and perhaps level, or owner/name."
        ),
        policy: str = policy_option,
        verifier: str = verifier_option,
        method: list[str] = typer.Option(["best_of_n"], help=f"May be given several times; of {', '.join(METHODS)}."),
        n: list[int] = typer.Option([16], "--n", help="May be given several times."),
        seed: list[int] = typer.Option([0], help="May be given several times."),
        temperature: float = temperature_option,
        settings: list[str] = set_option,
        out: Path = typer.Option(Path("eval-results"), help="Folder of the results; what it holds is not run again."),
        limit: int = typer.Option(None, help="Only the first tasks."),
        in_flight: int = typer.Option(None, help="Problems searched side by side; by default, by their size."),
        vote: str = vote_option,
        trees: bool = typer.Option(False, "--trees", help="Keep the search trees."),
        ray: str = typer.Option(
            None,
            metavar="[ADDRESS]",
            help="Run on a Ray cluster: at the address, started here (local), or without one what Ray finds or starts.",
        ),
        actors: int = typer.Option(None, help="Engines on the cluster; by default one a GPU, else one a core."),
        system_prompt: str = system_option,
        format: str = format_option,
        dtype: str = dtype_option,
        device: str = device_option,
        kv_memory: str = memory_option,
    ) -> None:
        """Run every method, budget and seed over a data set; an interrupted run goes on where it was."""
        elected = canonical(vote or _default_vote(verifier))
        tasks = load_tasks(data, limit)
        configs = {
            f"{one}, n={size}, seed={number}": make_config(one, size, number, temperature, settings)
            for one in method
            for size in n
            for number in seed
        }
        load = partial(_load, policy, verifier, system_prompt, format, dtype, device, kv_memory)
        if ray is None:
            models, run = load(), partial(run_here, max_in_flight=in_flight)
        else:
            from tts_search.adapters.ray import on_ray

            models = (None, None)
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
        folder: Path = typer.Argument(..., help="Folder of an evaluation or a study."),
        out: Path = typer.Option(None, help="Where to write; by default, report in that folder."),
        vote: str = vote_option,
        plots: bool = typer.Option(True, help="Draw plots (needs the extra plot)."),
    ) -> None:
        """Write tables, plots and a page on which search trees can be explored."""
        from tts_search.report import write_report

        print(sanitize(write_report(folder, out or folder / "report", vote=vote or None, plots=plots)))

    @app.command()
    def study(
        out: Path = typer.Option(Path("study-results"), help="Folder of the results; what it holds is not run again."),
        problems: int = typer.Option(100, help="Problems of each level."),
        budgets: str = typer.Option("1,4,16,64", help="Budgets of every search."),
        largest: int = typer.Option(
            256, help="One more budget, for the smallest policy with the first verifier; 0: none."
        ),
        part: str = typer.Option("1/1", help="I/K: run the I-th of K parts; they may run side by side."),
        seed: int = typer.Option(0, help="Fixes the problems and every draw."),
        plan: bool = typer.Option(False, "--plan", help="Only print how many tokens it will take."),
    ) -> None:
        """Run the whole grid of policies, verifiers, methods and budgets on the models that ship with the package."""
        from tts_search.study import Grid, plan_as_text, run_study

        sizes = tuple(int(size) for size in budgets.split(","))
        grid = Grid(problems=problems, budgets=sizes, largest=largest or None, seed=seed)
        print(plan_as_text(grid)) if plan else run_study(grid, out, part=part)

    return app


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


def _default_vote(verifier: str | None) -> str:
    return "prm_max" if verifier else "majority"


def make_config(method: str, n: int, seed: int, temperature: float, settings: list[str]) -> SearchConfig:
    """Return the config of the options; `settings` are NAME=VALUE for its other fields, values as JSON or plain text.

    Raises
    ------
    ConfigError
        If a value is one that a field cannot have.
    SearchError
        If there is no such field.
    """
    values: dict[str, Any] = {"method": method, "n": n, "seed": seed, "temperature": temperature}
    fields = [name for name in SearchConfig.__dataclass_fields__ if not name.startswith("_")]
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in fields:
            raise SearchError(f"--set: expected NAME=VALUE with a name among {', '.join(fields)}, got {setting!r}")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return SearchConfig(**values)


def _load(
    policy: str,
    verifier: str | None,
    system_prompt: str | None,
    format: str,
    dtype: str | None,
    device: str | None,
    kv_memory: str | None,
) -> tuple[Policy, Verifier | None]:
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
        "config": asdict(result.config),
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


@contextmanager
def _errors_as_text() -> Iterator[None]:
    """End the program with a line about an error that the user can mend, not with a traceback."""
    try:
        yield
    except (SearchError, MissingExtraError, ValueError, OSError) as error:
        sys.exit(f"tts-search: {sanitize(str(error))}")


if __name__ == "__main__":
    main()
