"""Plots of an evaluation, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from tts_search.errors import require
from tts_search.evaluation.rows import Difficulty, Row, Where, strategy_map
from tts_search.strategy import BINS

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

    Bands are 95% intervals. Points whose values are not known are not drawn.

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
    searches = [row for row in rows if row.verifier]
    difficulty = Difficulty(rows)
    figures = {
        "accuracy-n": _panels(plt, searches, "n", lambda row: row.n),
        "accuracy-flops": _panels(plt, searches, "FLOPs of both models for each problem", _flops),
        "accuracy-seconds": _panels(plt, searches, "seconds for each problem", lambda row: row.seconds),
        **{
            f"accuracy-n-{one}": _panels(
                plt, searches, f"n ({one} problems)", lambda row: row.n, difficulty.within(one)
            )
            for one in BINS
        },
        "strategy-map": _map(plt, searches),
    }
    files = []
    for name, figure in figures.items():
        if figure is None:
            continue
        files.append(out / f"{name}.svg")
        figure.savefig(files[-1], bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    return files


def _flops(row: Row) -> float:
    return row.means("flops_policy")[0] + (0.0 if row.vote == "majority" else row.means("flops_verifier")[0])


def _panels(plt: Any, rows: Sequence[Row], x_label: str, at: Callable[[Row], float], where: Where | None = None) -> Any:
    """One panel for each policy: accuracy by method (colour) and verifier (dashes). None if there is nothing to draw.

    Best-of-N's majority vote is drawn in grey.
    """
    drawn = [row for row in rows if at(row) > 0 and not math.isnan(row.accuracy(where))]
    policies = sorted({row.policy for row in drawn})
    if not policies:
        return None
    figure, axes = plt.subplots(1, len(policies), figsize=(4 * len(policies), 3.4), sharey=True, squeeze=False)
    verifiers = sorted({row.verifier for row in drawn})
    for policy, axis in zip(policies, axes[0], strict=True):
        own = [row for row in drawn if row.policy == policy]
        for method in dict.fromkeys(row.method for row in own):
            for verifier, dashes in zip(verifiers, cycle(_DASHES)):  # dashes repeat if there are more verifiers
                of_both = [row for row in own if (row.method, row.verifier) == (method, verifier)]
                for settings in dict.fromkeys(row.settings for row in of_both):
                    line = [row for row in of_both if row.settings == settings]
                    label = ", ".join(filter(None, (method, verifier, settings)))
                    _line(axis, line, at, where, dashes, _COLOURS.get(method, "#555555"), label)
        sampled = [row for row in own if row.method == "best_of_n" and row.verifier == verifiers[0]]
        majority = [replace(row, vote="majority") for row in sampled]  # needs no verifier
        _line(axis, majority, at, where, "-", "#999999", "majority")
        axis.set(title=policy, xlabel=x_label)
        _scale(axis, [at(row) for row in own], whole=x_label.startswith("n"))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy %")
    low, high = axes[0][0].get_ylim()  # of all panels
    axes[0][0].set_ylim(max(0.0, low), min(102.0, high))
    handles = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.03), "ncol": 3, "fontsize": 8}
    figure.legend(list(handles.values()), list(handles), **place)
    return figure


def _scale(axis: Any, values: Sequence[float], *, whole: bool) -> None:
    """A logarithmic axis: for n to the base of 2, with each n as a tick."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axis.set_xscale("log", base=2 if whole else 10)
    if whole:
        sizes = sorted(set(values))
        axis.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_minor_formatter(NullFormatter())


def _line(
    axis: Any,
    rows: Iterable[Row],
    at: Callable[[Row], float],
    where: Where | None,
    dashes: str,
    colour: str,
    label: str,
) -> None:
    points = sorted((at(row), row.accuracy(where), *row.interval(where)) for row in rows)
    if points:
        x, middle, low, high = (list(column) for column in zip(*points, strict=True))
        middle, low, high = ([100 * value for value in column] for column in (middle, low, high))
        axis.plot(x, middle, dashes, color=colour, marker=".", linewidth=1.3, label=label)
        axis.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)


def _map(plt: Any, rows: Sequence[Row]) -> Any:
    """Cells for each policy, verifier and bin (rows) and n (columns): the best method, and its accuracy."""
    best = strategy_map(rows)
    if not best:
        return None
    lines = sorted({key[:3] for key in best}, key=lambda key: (key[0], key[1], BINS.index(key[2])))
    sizes = sorted({key[3] for key in best})
    figure, axis = plt.subplots(figsize=(1.2 + 1.3 * len(sizes), 0.8 + 0.32 * len(lines)))
    for (policy, verifier, one, n), (method, accuracy, _) in best.items():
        x, y = sizes.index(n), lines.index((policy, verifier, one))
        axis.add_patch(
            plt.Rectangle((x, y), 1, 1, facecolor=_COLOURS.get(method, "#555555"), edgecolor="white", alpha=0.75)
        )
        axis.text(x + 0.5, y + 0.5, f"{method}\n{100 * accuracy:.0f}%", ha="center", va="center", fontsize=6)
    axis.set(xlim=(0, len(sizes)), ylim=(len(lines), 0), xlabel="n")
    axis.set_xticks([x + 0.5 for x in range(len(sizes))], [str(n) for n in sizes])
    axis.set_yticks([y + 0.5 for y in range(len(lines))], [", ".join(line) for line in lines], fontsize=7)
    return figure
