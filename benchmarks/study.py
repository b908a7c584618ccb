"""Records the results of ``tts-search study`` from its folder, for docs/study.md.

tts-search study --out FOLDER
python benchmarks/study.py FOLDER --beside "nothing"
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import record
from record import Cell
from tts_search.evaluation.records import Record
from tts_search.evaluation.rows import Difficulty, Row, compare, read_folder, rows_of
from tts_search.evaluation.statistics import holm
from tts_search.evaluation.tables import report_tables
from tts_search.strategy import BINS

NAMES = {"best_of_n": "best-of-N", "beam_search": "beam search", "dvts": "DVTS"}
VOTES = ("majority", "prm_min_vote", "prm_last_vote", "prm_max")
Table = dict[str, dict[str, Cell]]


def percent(share: float) -> Cell:
    """A share in percent; nothing where there is none."""
    return None if math.isnan(share) else round(100 * share, 1)


def greedy(row: Row) -> bool:
    """Whether a row is the policy's greedy answers."""
    return not row.verifier


def pairs(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Each verifier with each policy, the smallest policy first."""
    yield from sorted({(row.verifier, row.policy) for row in rows if not greedy(row)})


def accuracy(rows: Sequence[Row]) -> Table:
    """Percent of right answers by models, method and n, with half of the widest 95% interval."""
    table: Table = {}
    for verifier, policy in pairs(rows):
        own = [row for row in rows if (row.verifier, row.policy) == (verifier, policy)]
        alone = [row for row in rows if greedy(row) and row.policy == policy]
        cells: dict[str, Cell] = {"policy": policy, "verifier": verifier, "greedy": percent(alone[0].accuracy())}
        for row in own:
            cells[f"{NAMES[row.method]}, {row.n}"] = percent(row.accuracy())
        bounds = [row.interval() for row in own]
        cells["half a 95% interval, at most"] = percent(max(high - low for low, high in bounds) / 2)
        table[f"{policy}, {verifier}"] = cells
    return table


def gains(rows: Sequence[Row]) -> Table:
    """Points of a search over the best-of-N of the same models and n; p by a sign test, corrected for all rows."""
    rivals = {(row.policy, row.verifier, row.n): row for row in rows if row.method == "best_of_n" and row.verifier}
    found = [
        (row, compare(row, rivals[key]))
        for row in rows
        if row.method != "best_of_n" and row.n > 1 and (key := (row.policy, row.verifier, row.n)) in rivals
    ]
    corrected = holm([p for _, (_, p) in found])
    table: Table = {}
    for (row, (difference, p)), own in zip(found, corrected, strict=True):
        cells: dict[str, Cell] = {"policy": row.policy, "verifier": row.verifier, "search": NAMES[row.method]}
        cells |= {"n": row.n, "points": percent(difference), "p": f"{p:.2g}", "p, corrected": f"{own:.2g}"}
        table[f"{row.policy}, {row.verifier}, {row.method}, {row.n}"] = cells
    return table


def difficulty(rows: Sequence[Row], n: int) -> Table:
    """Percent of right answers by the difficulty that the samples of other seeds say, with n candidates."""
    known = Difficulty(rows)
    table: Table = {}
    for verifier, policy in pairs(rows):
        for one in BINS:
            cells: dict[str, Cell] = {"policy": policy, "verifier": verifier, "problems": one}
            own = [row for row in rows if (row.policy, row.verifier, row.n) == (policy, verifier, n)]
            within = known.within(one)
            cells["of them"] = len(own[0].right(within)) if own else 0
            for row in own:
                cells[NAMES[row.method]] = percent(row.accuracy(within))
            table[f"{policy}, {verifier}, {one}"] = cells
    return table


def votes(records: Sequence[Record], n: int) -> Table:
    """Percent of right answers of a best-of-N by the vote that elects one."""
    table: Table = {}
    for vote in VOTES:
        for row in rows_of(records, vote):
            if row.method == "best_of_n" and row.n == n and row.verifier:
                cells = table.setdefault(f"{row.policy}, {row.verifier}", {"policy": row.policy})
                cells |= {"verifier": row.verifier, vote: percent(row.accuracy())}
    return dict(sorted(table.items(), key=lambda entry: (str(entry[1]["verifier"]), entry[0])))


def returns(rows: Sequence[Row]) -> Table:
    """Points that four times as many candidates bring; p by a sign test, corrected for all rows."""
    by = {(row.policy, row.verifier, row.method, row.n): row for row in rows if row.verifier}
    steps = [(key, row, by[four]) for key, row in by.items() if (four := (*key[:3], 4 * key[3])) in by]
    found = [compare(more, row) for _, row, more in steps]
    corrected = holm([p for _, p in found])
    table: Table = {}
    for ((policy, verifier, method, n), _, _), (difference, p), own in zip(steps, found, corrected, strict=True):
        cells: dict[str, Cell] = {"policy": policy, "verifier": verifier, "search": NAMES[method]}
        cells |= {"n": f"{n} to {4 * n}", "points": percent(difference), "p": f"{p:.2g}", "p, corrected": f"{own:.2g}"}
        table[f"{policy}, {verifier}, {method}, {n}"] = cells
    return table


def cost(rows: Sequence[Row]) -> Table:
    """FLOPs of a problem."""
    table: Table = {}
    for row in rows:
        policy, verifier = row.means("flops_policy", "flops_verifier")
        name = "greedy" if greedy(row) else NAMES[row.method]
        cells: dict[str, Cell] = {"policy": row.policy, "verifier": row.verifier, "search": name, "n": row.n}
        verifier = 0.0 if math.isnan(verifier) else verifier
        cells |= {"accuracy, %": percent(row.accuracy()), "policy, GFLOP": round(policy / 1e9, 2)}
        cells |= {"verifier, GFLOP": round(verifier / 1e9, 2), "both, GFLOP": round((policy + verifier) / 1e9, 2)}
        table[f"{row.policy}, {row.verifier or 'none'}, {name}, {row.n}"] = cells
    return table


def sections(records: Sequence[Record]) -> Mapping[str, Sequence[str]]:
    """The report's tables of strategies and rivals, as it prints them."""
    parts = {part.partition("  ")[0]: part.splitlines() for part in report_tables(records).split("\n\n")}
    wanted = {"strategy": "cross-validated accuracy %", "rivals": "as accurate as a larger policy alone"}
    return {name: parts[head] for name, head in wanted.items() if head in parts}


def main() -> None:
    """Write ``study.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", default="tts-search study", help="what was run")
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine")
    options = parser.parse_args()
    records = read_folder(options.folder)
    rows = rows_of(records)
    largest = max(row.n for row in rows)
    tasks, seeds = len({one.task for one in records}), len({one.seed for one in records})
    record.write(
        "study",
        what=f"The demo models on {tasks} problems with {seeds} seeds, {len(records)} searches: % of right answers by "
        "prm_max unless a vote is named; means over the seeds",
        command=f"{options.command}; python benchmarks/study.py FOLDER",
        beside=options.beside,
        tables={
            "accuracy": accuracy(rows),
            "gains": gains(rows),
            "difficulty": difficulty(rows, largest),
            "votes": votes(records, largest),
            "returns": returns(rows),
            "cost": cost(rows),
        },
        texts=sections(records),
    )


if __name__ == "__main__":
    main()
