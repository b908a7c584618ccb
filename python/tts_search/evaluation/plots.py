"""Plots of an evaluation, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from tts_search.errors import require
from tts_search.evaluation.rows import Row, pass_rates, strategy_map
from tts_search.strategy import BINS, difficulty_bin

__all__ = ["draw_plots"]

_COLOURS = {
    "best_of_n": "#4477aa",
    "beam_search": "#ee6677",
    "dvts": "#228833",
    "rebase": "#ccbb44",
    "ets": "#66ccee",
    "particle_filtering": "#aa3377",
    "puct": "#bbbbbb",
    "budget_forcing": "#000000",
}
_DASHES = ("-", "--", ":", "-.")


def draw_plots(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw accuracy against n, total FLOPs and time, by difficulty, and the strategy map; return the files.

    Raises
    ------
    MissingExtraError
        Without matplotlib.
    """
    require("matplotlib", "plot")
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tts_search"  # the same bytes for the same data
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: small files, and it can be searched
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    files = []

    def save(name: str, figure: Any) -> None:
        figure.savefig(out / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        files.append(out / f"{name}.svg")

    searches = [row for row in rows if row.verifier]
    policies = sorted({row.policy for row in rows})
    save("accuracy-n", _panels(plt, searches, policies, "n", lambda row: row.n))
    save("accuracy-flops", _panels(plt, searches, policies, "total FLOPs a problem", _flops))
    save("accuracy-seconds", _panels(plt, searches, policies, "seconds a problem", lambda row: row.seconds))
    rates = pass_rates(rows)
    for one in BINS:
        tasks = {
            policy: {t for t, rate in rates.get(policy, {}).items() if difficulty_bin(rate) == one}
            for policy in policies
        }
        save(f"accuracy-n-{one}", _panels(plt, searches, policies, f"n ({one} problems)", lambda row: row.n, tasks))
    save("strategy-map", _map(plt, searches))
    return files


def _flops(row: Row) -> float:
    return row.mean("flops_policy") + (0.0 if row.vote == "majority" else row.mean("flops_verifier"))


def _panels(
    plt: Any,
    rows: Sequence[Row],
    policies: Sequence[str],
    x_label: str,
    at: Callable[[Row], float],
    tasks: dict[str, set[str]] | None = None,
) -> Any:
    """One panel a policy: accuracy by method (colour) and verifier (dashes); in grey the majority of best-of-N."""
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(
        1, max(1, len(policies)), figsize=(4 * max(1, len(policies)), 3.4), sharey=True, squeeze=False
    )
    verifiers = sorted({row.verifier for row in rows})
    for policy, axis in zip(policies, axes[0], strict=False):
        own = [row for row in rows if row.policy == policy]
        of = None if tasks is None else tasks[policy]
        for method in dict.fromkeys(row.method for row in own):
            for verifier, dashes in zip(verifiers, cycle(_DASHES)):  # as many as there are
                of_both = [row for row in own if (row.method, row.verifier) == (method, verifier)]
                for settings in dict.fromkeys(row.settings for row in of_both):
                    line = [row for row in of_both if row.settings == settings]
                    label = ", ".join(filter(None, (method, verifier, settings)))
                    _line(axis, line, at, of, dashes, _COLOURS.get(method, "#555555"), label)
        sampled = [row for row in own if row.method == "best_of_n" and row.verifier == (verifiers or [""])[0]]
        majority = [replace(row, vote="majority") for row in sampled]  # needs no verifier
        _line(axis, majority, at, of, "-", "#999999", "majority")
        axis.set(title=policy, xlabel=x_label)
        if any(x > 0 for line in axis.lines for x in line.get_xdata()):
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy %")
    low, high = axes[0][0].get_ylim()  # of all panels
    axes[0][0].set_ylim(max(0.0, low), min(102.0, high))
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.03), ncol=3, fontsize=8)
    return figure


def _line(
    axis: Any,
    rows: Iterable[Row],
    at: Callable[[Row], float],
    tasks: Container[str] | None,
    dashes: str,
    colour: str,
    label: str,
) -> None:
    points = sorted((at(row), 100 * row.accuracy(tasks=tasks)) for row in rows)
    points = [(x, y) for x, y in points if not math.isnan(x) and not math.isnan(y)]
    if points:
        axis.plot(*zip(*points, strict=True), dashes, color=colour, marker=".", linewidth=1.3, label=label)


def _map(plt: Any, rows: Sequence[Row]) -> Any:
    """A cell for each policy, verifier and bin (down) and n (across): the best method, and its accuracy."""
    best = strategy_map(rows)
    lines = sorted({key[:3] for key in best}, key=lambda key: (key[0], key[1], BINS.index(key[2])))
    sizes = sorted({key[3] for key in best})
    figure, axis = plt.subplots(figsize=(1.2 + 1.3 * max(1, len(sizes)), 0.8 + 0.32 * max(1, len(lines))))
    for (policy, verifier, one, n), (method, accuracy, _) in best.items():
        x, y = sizes.index(n), lines.index((policy, verifier, one))
        axis.add_patch(
            plt.Rectangle((x, y), 1, 1, facecolor=_COLOURS.get(method, "#555555"), edgecolor="white", alpha=0.75)
        )
        axis.text(x + 0.5, y + 0.5, f"{method}\n{100 * accuracy:.0f}%", ha="center", va="center", fontsize=6)
    axis.set(xlim=(0, max(1, len(sizes))), ylim=(max(1, len(lines)), 0), xlabel="n")
    axis.set_xticks([x + 0.5 for x in range(len(sizes))], [str(n) for n in sizes])
    axis.set_yticks([y + 0.5 for y in range(len(lines))], [", ".join(line) for line in lines], fontsize=7)
    return figure
