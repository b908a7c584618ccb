"""A table and plots of the results of `make bench`::

    python benchmarks/summary.py build/bench/bench.json build/bench [--write ops]

Writes table.md, and with matplotlib installed speedup.svg, roofline.svg and scaling.svg. ``--write`` also writes a
measurement of benchmarks/results; run it on the machine and at the commit of the benchmarks.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from pathlib import Path
from typing import Any

import record

FASTER, FRACTION = "times faster than ", "fraction of "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what pytest-benchmark wrote")
    parser.add_argument("folder", type=Path, help="where the table and the plots go")
    parser.add_argument("--write", help="the name of a measurement in benchmarks/results")
    parser.add_argument("--beside", default="nothing", help="what else ran, for --write")
    options = parser.parse_args()
    results = json.loads(options.json.read_text())
    table = options.folder / "table.md"
    table.write_text(markdown(results))
    print(table.read_text())
    if options.write:
        record.write(
            options.write,
            what="The operators' microbenchmarks; medians, ours and the baselines in turn",
            command="make bench; python benchmarks/summary.py build/bench/bench.json build/bench --write ops",
            beside=options.beside,
            tables=tables(timed(results)),
            packages=("torch", "transformers"),
        )
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    for name, draw in (("speedup", draw_speedup), ("roofline", draw_roofline), ("scaling", draw_scaling)):
        figure = draw(results["benchmarks"], plt)
        figure.savefig(options.folder / f"{name}.svg", bbox_inches="tight")
        plt.close(figure)


def markdown(results: dict[str, Any]) -> str:
    """One row a benchmark: our time, how much faster than each baseline, which part of the bound."""
    commit, cpu = results["commit_info"]["id"][:7], results["machine_info"]["cpu"].get("brand_raw", platform.machine())
    devices = {entry["extra_info"]["device"] for entry in results["benchmarks"] if "device" in entry["extra_info"]}
    lines = [f"{', '.join(sorted(devices))} of {cpu}, commit {commit}, {results['datetime'][:10]}", ""]
    lines += ["| benchmark | us | times faster than | fraction of |", "| --- | --- | --- | --- |"]
    for entry in timed(results):
        info = entry["extra_info"]
        lines.append(f"| {title(entry)} | {info['us']:.4g} | {part(info, FASTER)} | {part(info, FRACTION)} |")
    for entry in results["benchmarks"]:
        if entry["group"] == "scaling":
            lines.append(f"\n{', '.join(f'{name}: {value}' for name, value in entry['extra_info'].items())}")
    return "\n".join(lines) + "\n"


def timed(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The benchmarks of one time each."""
    return [entry for entry in results["benchmarks"] if isinstance(entry["extra_info"].get("us"), float)]


def tables(entries: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, record.Cell]]]:
    """A table for each file of benchmarks, that is, for each operator."""
    found: dict[str, dict[str, dict[str, record.Cell]]] = {}
    for entry in entries:
        operator = Path(entry["fullname"].partition("::")[0]).stem.removeprefix("bench_")
        found.setdefault(operator, {})[title(entry).replace("/", " over ")] = row_of(entry)
    return found


def row_of(entry: dict[str, Any]) -> dict[str, record.Cell]:
    """A benchmark's time beside the best baseline and the bound that it comes closest to."""
    info = entry["extra_info"]
    row: dict[str, record.Cell] = {"what": title(entry), "ours, us": rounded(info["us"])}
    for prefix, (name, value), choose in (
        (FASTER, ("against", "times faster"), min),
        (FRACTION, ("bound", "of the bound"), max),
    ):
        each = {key.removeprefix(prefix): number for key, number in info.items() if key.startswith(prefix)}
        if each:
            best = choose(each, key=each.__getitem__)
            row |= {name: best, value: rounded(each[best])}
    return row


def title(entry: dict[str, Any]) -> str:
    """The benchmark's group, and those of its parameters that the group does not say."""
    group = str(entry["group"])
    said, parts = set(re.findall(r"[\w.]+", group)), [group]
    for name, value in (entry["params"] or {}).items():
        if isinstance(value, int) and str(value) not in said:
            parts.append(f"{name} {value}")
        elif isinstance(value, str) and value not in group and not value.startswith("UNSERIALIZABLE"):
            parts.append(value)
    return ", ".join(parts)


def rounded(number: float) -> float | int:
    """Three digits of a number."""
    short = float(f"{number:.3g}")
    return round(short) if short >= 100 else short


def part(info: dict[str, Any], prefix: str) -> str:
    """The entries whose names begin with ``prefix``."""
    found = {name.removeprefix(prefix): value for name, value in info.items() if name.startswith(prefix)}
    return ", ".join(f"{name}: {value:.2f}" for name, value in found.items())


def best(entry: dict[str, Any], prefix: str) -> float | None:
    """The least speed-up over any baseline, or the largest fraction of any bound."""
    values = [value for name, value in entry["extra_info"].items() if name.startswith(prefix)]
    if not values:
        return None
    return float(min(values) if prefix == FASTER else max(values))


def bars(benchmarks: list[dict[str, Any]], plt: Any, prefix: str, label: str, at: float) -> Any:
    rows = [(title(entry), value) for entry in benchmarks if (value := best(entry, prefix)) is not None]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.22 * len(rows)))
    axes.barh([name for name, _ in rows], [value for _, value in rows], color="#4878a8")
    axes.axvline(at, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.tick_params(labelsize=7)
    return figure


def draw_speedup(benchmarks: list[dict[str, Any]], plt: Any) -> Any:
    figure = bars(benchmarks, plt, FASTER, "times faster than the strongest baseline", 1.0)
    figure.axes[0].set_xscale("log")
    return figure


def draw_roofline(benchmarks: list[dict[str, Any]], plt: Any) -> Any:
    return bars(benchmarks, plt, FRACTION, "fraction of the rate measured in the same run", 1.0)


def draw_scaling(benchmarks: list[dict[str, Any]], plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(7, 4))
    for entry in benchmarks:
        info = entry["extra_info"]
        if "series" in info:
            sizes, times = [int(size) for size in info["us"]], list(info["us"].values())
            axes.plot(sizes, times, marker="o", label=f"{info['series']} (exponent {info['exponent']})")
    axes.set(xscale="log", yscale="log", xlabel="branches or tokens", ylabel="microseconds")
    axes.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    main()
