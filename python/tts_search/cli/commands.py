"""The commands of ``tts-search``, one function each. Typer reads their options from the annotations."""

# One option is named --format, and options that may be given several times have lists as defaults.
# ruff: noqa: A002, B006

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option, Typer

from tts_search.api import search
from tts_search.cli.loading import EXECUTION, checkpoint_of, execution_verifier, load_checkpoints
from tts_search.cli.options import (
    SPECULATE,
    Budgets,
    Device,
    Dtype,
    FormatName,
    KvType,
    Memory,
    Out,
    PolicyPath,
    Problems,
    QuantizeOption,
    Seed,
    SelfTest,
    SetFields,
    Speculating,
    SystemPrompt,
    Temperature,
    VerifierPath,
    Vote,
    elected_vote,
    make_config,
    method_option,
    naming,
    sizes_of,
)
from tts_search.errors import SearchError
from tts_search.evaluation.evaluate import Experiment, Runner, read_configs, run_here
from tts_search.evaluation.outline import outline
from tts_search.evaluation.runs import check_success, failures, run_experiments
from tts_search.evaluation.suites import questions, write_suites
from tts_search.evaluation.tables import accuracy_table, cost_table
from tts_search.evaluation.tasks import TaskFile, Tasks
from tts_search.search.config import METHODS, SearchConfig
from tts_search.search.protocol import Policy, Verifier
from tts_search.search.result import SearchResult
from tts_search.search.voting import canonical
from tts_search.serve.results import result_as_dict
from tts_search.terminal import sanitize

__all__ = ["app"]

app = Typer(
    help="Search over reasoning steps with a policy and a process verifier.",
    no_args_is_help=True,
    rich_markup_mode=None,  # errors in one line
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        import tts_kernels

        print(f"tts-search {tts_kernels.__version__}")
        raise Exit


@app.callback()
def main(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Say which version this is, and end.")
    ] = False,
) -> None:
    """Search over reasoning steps with a policy and a process verifier."""


@app.command(epilog="Example: tts-search demo --problems 5 --budgets 1,4")
def demo(
    out: Out = Path("demo-results"),
    problems: Problems = 30,
    budgets: Budgets = "1,4,16,64",
    seed: Seed = 0,
) -> None:
    """Solve arithmetic with the small models that ship with the package, with and without search."""
    from tts_search.lab.arithmetic import LEVELS
    from tts_search.lab.demo import CONFIG, load_models, make_tasks, run_demo

    sizes = sizes_of(budgets)
    if any(size % CONFIG.expand for size in sizes if size != 1):
        raise SearchError(f"--budgets: expected 1 or multiples of {CONFIG.expand}, got {budgets!r}")
    with naming("--problems"):
        make_tasks(LEVELS, problems, seed)
    run_demo(load_models(), out, count=problems, budgets=sizes, seed=seed)


@app.command(
    epilog="Example: tts-search solve 'What is 6 times 7?' --policy path/to/policy --verifier path/to/prm --n 16"
)
def solve(
    problem: Annotated[str, Argument(help="The problem's text; - reads it from standard input.")],
    policy: PolicyPath,
    verifier: VerifierPath = None,
    method: Annotated[str, method_option(f"One of {', '.join(METHODS)}.")] = "beam_search",
    n: Annotated[int, Option("--n", min=1, help="Candidates of a round, or completions.")] = 16,
    temperature: Temperature = 0.8,
    seed: Seed = 0,
    settings: SetFields = [],
    vote: Vote = None,
    tree: Annotated[bool, Option("--tree", help="Show the search tree.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the whole result as JSON.")] = False,
    speculate: Speculating = "auto",
    system_prompt: SystemPrompt = None,
    format: FormatName = "auto",
    dtype: Dtype = None,
    device: Device = None,
    kv_memory: Memory = None,
    kv_dtype: KvType = None,
    quantize: QuantizeOption = None,
    self_test: SelfTest = True,
) -> None:
    """Solve one problem."""
    config = make_config(method, n, seed, temperature, settings)
    _check_verifier(verifier, [config], vote, format)
    text = sys.stdin.read() if problem == "-" else problem
    if not text.strip():
        raise SearchError("PROBLEM: expected a text, got an empty one")
    elected = elected_vote(vote, verifier)
    _check_device_is_there(device)
    options = (system_prompt, format, dtype, device, kv_memory, kv_dtype, quantize, self_test)
    models = load_checkpoints(policy, verifier, *options)
    result = search([text], *models, config, speculate=SPECULATE[speculate])[0]
    if as_json:
        print(json.dumps(result_as_dict(result, elected, tree=True), indent=2, allow_nan=False))
    else:
        print(result_as_text(result, elected, show_tree=tree))


@app.command(
    "eval", epilog="Example: tts-search eval data.jsonl --policy path/to/policy --verifier path/to/prm --n 4 --n 16"
)
def evaluate_(
    data: Annotated[
        str,
        Argument(
            help="MATH-500, AIME24, GSM8K, humaneval, a JSONL file with problem, answer and perhaps level (or in the "
            "fields of HumanEval, MBPP, LiveCodeBench), or owner/name."
        ),
    ],
    policy: PolicyPath,
    verifier: Annotated[
        str | None,
        Option(
            "--verifier",
            help="Checkpoint of the process verifier; judge:WHERE, as in solve; execution: a program's public tests.",
        ),
    ] = None,
    method: Annotated[list[str], method_option(f"May be given several times; of {', '.join(METHODS)}.")] = [
        "best_of_n"
    ],
    written_tests: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="With --verifier execution: run tests that the policy writes before, N texts of them for each task, "
            "instead of public ones (CodeT); the vote is prm_vote by default.",
        ),
    ] = None,
    n: Annotated[list[int], Option("--n", min=1, help="May be given several times.")] = [16],
    seed: Annotated[list[int], Option(help="May be given several times (tests are written by the first).")] = [0],
    temperature: Temperature = 0.8,
    settings: SetFields = [],
    out: Annotated[Path, Option(help="Folder of the results; what it holds is not run again.", file_okay=False)] = Path(
        "eval-results"
    ),
    limit: Annotated[int | None, Option(min=1, help="Only the first tasks.")] = None,
    in_flight: Annotated[
        int | None, Option(min=1, help="Problems searched side by side; by default, by their size.")
    ] = None,
    speculate: Speculating = "auto",
    vote: Vote = None,
    trees: Annotated[bool, Option("--trees", help="Keep the search trees.")] = False,
    ray: Annotated[
        str | None,
        Option(
            metavar="[ADDRESS]",
            help="Run on a Ray cluster: at the address, started here (local), or without one what Ray finds or starts.",
        ),
    ] = None,
    actors: Annotated[
        int | None,
        Option(min=1, help="Engines on the cluster; by default one for each GPU, or for each core without GPUs."),
    ] = None,
    system_prompt: SystemPrompt = None,
    format: FormatName = "auto",
    dtype: Dtype = None,
    device: Device = None,
    kv_memory: Memory = None,
    kv_dtype: KvType = None,
    quantize: QuantizeOption = None,
    self_test: SelfTest = True,
) -> None:
    """Run every method, budget and seed over a data set; an interrupted run goes on where it was."""
    configs = {
        f"{one}, n={size}, seed={number}": make_config(one, size, number, temperature, settings, methods=method)
        for one in method
        for size in n
        for number in seed
    }
    _check_verifier(verifier, list(configs.values()), vote, format)
    if actors is not None and ray is None:
        raise SearchError("--actors: expected with --ray only")
    if written_tests is not None and verifier != EXECUTION:
        raise SearchError(f"--written-tests: expected with --verifier {EXECUTION} only")
    elected = elected_vote(vote or ("prm_vote" if written_tests else None), verifier)
    with naming("DATA"):
        tasks: Tasks = TaskFile(data, limit)
    if written_tests is not None:
        with naming("--written-tests"):
            questions(tasks)
    _check_folder(out)
    options = (system_prompt, format, dtype, device, kv_memory, kv_dtype, quantize, self_test)

    def place(verifier: str | None) -> tuple[tuple[Policy | None, Verifier | None], Runner]:
        """The models, if they are loaded here, and the function that runs an experiment with them."""
        known = list(tasks) if verifier == EXECUTION else ()
        load = partial(load_checkpoints, policy, verifier, *options, tasks=known)
        if ray is None:
            return load(), partial(run_here, max_in_flight=in_flight, speculate=SPECULATE[speculate])
        from tts_search.evaluation.ray import on_ray

        run = on_ray(load, address=ray or None, actors=actors, device=device, max_in_flight=in_flight)
        return (None, None), run

    if ray is None:
        _check_device_is_there(device)
    models, run = place(verifier if written_tests is None else None)
    names: tuple[str, ...] = (policy, verifier or "", system_prompt or "", format, dtype or "", quantize or "")
    names += (f"kv {kv_dtype}",) if kv_dtype else ()
    facts: dict[str, Any] = {}
    try:
        if written_tests is not None:
            draws: dict[str, Any] = {"texts": written_tests, "temperature": temperature, "seed": seed[0]}
            suites = write_suites(tasks, models[0], out / "written-tests.jsonl", **draws, names=names, run=run)
            tasks, facts = suites.tasks, {"written_tests": str(suites)}
            names += (f"written tests: {written_tests}, seed {seed[0]}",)
            models, run = ((models[0], execution_verifier(tasks)), run) if ray is None else place(verifier)
        experiments = [Experiment(label, config, *models, names, trees) for label, config in configs.items()]
        rows = run_experiments(tasks, experiments, out, data=data, vote=elected, run=run, emit=lambda _: None, **facts)
    except KeyboardInterrupt:
        print(f"interrupted; finished tasks are in {out / 'results.jsonl'}, run it again to go on", file=sys.stderr)
        raise Exit(130) from None
    print(sanitize(f"{accuracy_table(rows)}\n\n{cost_table(rows)}"))  # levels are text from the data set
    print(f"\n{len(tasks)} tasks; results: {out / 'results.jsonl'}")
    for fact in facts.values():
        print(fact)
    if failed := failures(rows):
        print(failed)
    check_success(rows)


@app.command(epilog="Example: tts-search report eval-results")
def report(
    folder: Annotated[Path, Argument(help="Folder of an evaluation or a study.", exists=True, file_okay=False)],
    out: Annotated[
        Path | None, Option(help="Where to write; by default, report in that folder.", file_okay=False)
    ] = None,
    vote: Vote = None,
    plots: Annotated[bool, Option(help="Draw plots (needs the extra plot).")] = True,
) -> None:
    """Write tables, plots and a page on which search trees can be explored."""
    from tts_search.evaluation.report import write_report

    print(sanitize(write_report(folder, out or folder / "report", vote=vote, plots=plots)))


@app.command(epilog="Example: tts-search study --part 1/2 & tts-search study --part 2/2")
def study(
    out: Annotated[Path, Option(help="Folder of the results; what it holds is not run again.", file_okay=False)] = Path(
        "study-results"
    ),
    problems: Problems = 100,
    budgets: Budgets = "1,4,16,64",
    largest: Annotated[
        int, Option(min=0, help="One more budget, for the smallest policy with the first verifier; 0: none.")
    ] = 256,
    part: Annotated[str, Option(help="I/K: run the I-th of K parts; they may run side by side.")] = "1/1",
    seed: Annotated[int, Option(help="Fixes the problems.")] = 0,
    seeds: Annotated[int, Option(min=1, help="How many times everything is run, with draws of their own.")] = 3,
    plan: Annotated[bool, Option("--plan", help="Only print how many tokens it will take.")] = False,
) -> None:
    """Run the whole grid of policies, verifiers, methods and budgets on the models that ship with the package."""
    from tts_search.lab.demo import make_tasks
    from tts_search.lab.study import Grid, plan_as_text, run_study, share_out

    sizes = tuple(sizes_of(budgets))
    grid = Grid(problems=problems, budgets=sizes, largest=largest or None, seed=seed, seeds=tuple(range(seeds)))
    with naming("--problems"):
        make_tasks(grid.levels, problems, seed)
    with naming("--part"):
        share_out(grid, part)
    print(plan_as_text(grid)) if plan else run_study(grid, out, part=part)


@app.command(epilog="Example: tts-search study-code --policy path/to/policy --dtype bfloat16")
def study_code(
    policy: PolicyPath,
    out: Annotated[
        Path, Option(help="Folder of the samples; what it holds is not done again.", file_okay=False)
    ] = Path("study-code-results"),
    n: Annotated[int, Option("--n", min=16, help="Programs of each problem, a multiple of 16.")] = 64,
    seed: Annotated[int, Option(help="Fixes every draw.")] = 0,
    limit: Annotated[int | None, Option(min=1, help="Only the first problems.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    kv_memory: Memory = None,
    quantize: QuantizeOption = None,
    self_test: SelfTest = True,
) -> None:
    """Draw n programs for each problem of HumanEval, and choose one by public tests, by likelihood, by a vote."""
    from tts_search.domains.code import humaneval
    from tts_search.lab.humaneval import run_code_study, table_as_text
    from tts_search.policies.hf import HFPolicy

    tasks = humaneval()[:limit]
    with checkpoint_of("--policy", policy) as where:
        loaded = HFPolicy(
            where, dtype=dtype, device=device, kv_memory=kv_memory, quantize=quantize, self_test=self_test
        )
    loaded.max_rows = 128  # programs differ in length: when one ends, another one starts
    about = ", ".join(filter(None, (Path(policy).name, dtype, quantize)))
    found = run_code_study(tasks, loaded, out, n=n, seed=seed, about=about)
    print("\n\n".join(f"{name}\n{table_as_text(rows)}" for name, rows in found.items()))


def _check_verifier(verifier: str | None, configs: list[SearchConfig], vote: str | None, format: str) -> None:
    """Raise an error for options that need a verifier if there is none."""
    if verifier is not None:
        return
    for config in configs:
        if config.needs_verifier:
            raise SearchError(f"--method: {config.method} needs --verifier; best_of_n does without")
    if vote and canonical(vote) != "majority":
        raise SearchError(f"--vote: {vote} needs --verifier; majority does without")
    if format != "auto":
        raise SearchError(f"--format: {format} is a verifier's, and there is no --verifier")


def _check_device_is_there(device: str | None) -> None:
    import torch

    with naming("--device"):
        torch.empty(0, device=device)


def _check_folder(out: Path) -> None:
    """Raise an error for a folder that cannot be written or has a broken manifest, before models are loaded."""
    with naming("--out"):
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise SearchError(f"expected a folder that can be written, got {out}")
        if (out / "manifest.json").exists():
            read_configs(out / "manifest.json")


def result_as_text(result: SearchResult, vote: str, *, show_tree: bool = False) -> str:
    """Return a result as text for a terminal. Control sequences in the model's text are removed."""
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
        f"{stats.peak_logical_kv_tokens} without sharing; {stats.peak_kv_bytes / 2**20:.1f} MiB",
    ]
    return "\n".join([*lines, "", outline(result.tree)] if show_tree else lines)
