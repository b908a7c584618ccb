"""A run of experiments into a folder: the manifest, the records, and a summary of each experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tts_search.errors import SearchError
from tts_search.evaluation.evaluate import Runner, evaluate
from tts_search.evaluation.experiment import Experiment
from tts_search.evaluation.manifest import write_manifest
from tts_search.evaluation.rows import Row
from tts_search.evaluation.tasks import Tasks
from tts_search.terminal import sanitize

__all__ = ["check_success", "failures", "run_experiments"]


def run_experiments(
    tasks: Tasks,
    experiments: Sequence[Experiment],
    folder: str | Path,
    *,
    data: str | Path,
    part: str = "",
    vote: str | None = None,
    run: Runner | None = None,
    progress: bool = True,
    emit: Callable[[str], None] = print,
    **facts: object,
) -> list[Row]:
    """Run experiments, one after the other, into a folder of results; return a row for each of their budgets.

    Parameters
    ----------
    tasks : sequence of Task, or TaskFile
        With different ids.
    experiments : sequence of Experiment
        Tasks with a result in the folder are not run again.
    folder : str or Path
        Gets ``results.jsonl`` and ``manifest.json``. With a `part` these are ``results-<part>.jsonl`` and so on, so
        that parts can run at the same time. Tasks with a result of another part are not run again either.
    data : str or Path
        Where the tasks come from, for the manifest.
    part : str
        Name of a part.
    vote : str or None
        Which vote elects the answers; by default prm_max, or majority without a verifier.
    run : callable or None
        Runs an experiment (:func:`~tts_search.evaluation.evaluate.evaluate`).
    progress : bool
        Show progress bars.
    emit : callable
        Prints a line about each experiment as it ends.
    **facts
        More entries for the manifest.

    Raises
    ------
    ValueError, OSError
        As :func:`~tts_search.evaluation.evaluate.evaluate` and :func:`write_manifest` do.
    """
    folder = Path(folder)
    suffix = f"-{part}" if part else ""
    write_manifest(folder / f"manifest{suffix}.json", experiments, data, tasks=len(tasks), **facts)
    results = folder / f"results{suffix}.jsonl"
    rows = []
    for experiment in experiments:
        others = [path for path in sorted(folder.glob("results*.jsonl")) if path != results]
        records = evaluate(tasks, [experiment], results, also=others, progress=progress, run=run)
        elected = vote or ("majority" if experiment.verifier is None else "prm_max")
        for place, variant in enumerate(experiment.variants):
            row = Row(variant.label, records[place * len(tasks) : (place + 1) * len(tasks)], elected)
            rows.append(row)
            emit(_in_words(row))
    return rows


def _in_words(row: Row) -> str:
    right = sum(record.is_correct(row.vote) for record in row.records)
    total = row.seconds * len(row.records)
    time = f", {total:.1f} s" if total == total else ""
    return sanitize(f"{row.label}: {right} of {len(row.records)} right{time}")


def failures(rows: Sequence[Row]) -> str:
    """Return how many searches failed, and why the first one did; empty if none did."""
    failed = (record for row in rows for record in row.records if record.error)
    first = next(failed, None)
    if first is None:
        return ""
    count = 1 + sum(1 for _ in failed)
    what = "search failed and counts" if count == 1 else "searches failed and count"
    return f"{count} {what} as wrong; the first one: {sanitize(f'{first.label}, {first.task}: {first.error}')}"


def check_success(rows: Sequence[Row]) -> None:
    """Raise a SearchError if no search of an experiment succeeded: its table would show 0% as if all were wrong.

    Raises
    ------
    SearchError
        With the first failure.
    """
    for row in rows:
        if all(record.error for record in row.records):
            raise SearchError(f"{row.label}: no search succeeded; the first one: {row.records[0].error}")
