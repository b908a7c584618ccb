"""Writes the numbers of ``benchmarks/results`` into the pages that contain them::

    python benchmarks/pages.py            # rewrites what is out of date
    python benchmarks/pages.py --check    # only says what is; the exit status is 1 then

``benchmarks/results/README.md`` explains how a page refers to them.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from record import FOLDER, Cell, read

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *sorted((ROOT / "docs").rglob("*.md")))

MARK = re.compile(r"<!-- (=|table|text|from) (.+?) -->(.*?)<!-- \. -->", re.DOTALL)
LEVELS = {
    "generic": "no vector instructions",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "amx": "AMX",
}


def main() -> None:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    old = [page for page in PAGES if (text := page.read_text(encoding="utf-8")) != render(text)]
    for page in old:
        print(page.relative_to(ROOT))
        if not options.check:
            page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(bool(old) and options.check)


def render(text: str, folder: Path = FOLDER) -> str:
    """Return a page with what its comments ask for.

    Raises
    ------
    ValueError
        If one asks for what no file has.
    """
    makers = {"=": _value, "table": _table, "text": _text, "from": _from}

    def replaced(match: re.Match[str]) -> str:
        kind, what, _ = match.groups()
        reference, _, option = what.partition(" | ")
        return f"<!-- {kind} {what} -->{makers[kind](reference, option, folder)}<!-- . -->"

    return MARK.sub(replaced, text)


def references(text: str) -> set[str]:
    """Return the names of the files that a page takes numbers from."""
    parts = (one for _, what, _ in MARK.findall(text) for one in what.partition(" | ")[0].split(" over "))
    return {part.partition("/")[0] for part in parts}


def _value(reference: str, option: str, folder: Path) -> str:
    numerator, _, denominator = reference.partition(" over ")
    value = _cell(numerator, folder)
    if denominator:
        value = float(value or 0) / float(_cell(denominator, folder) or 0)
    return format(value, option) if option else shown(value)


def _cell(reference: str, folder: Path) -> Cell:
    path = reference.split("/")
    found: Any = read(path[0], folder)["tables"]
    for name in path[1:]:
        if name not in found:
            raise ValueError(f"{reference}: expected one of {', '.join(found)}, got {name!r}")
        found = found[name]
    if len(path) != 4:
        raise ValueError(f"{reference}: expected file/table/row/column")
    return found  # type: ignore[no-any-return]


def _table(reference: str, option: str, folder: Path) -> str:
    file, _, name = reference.partition("/")
    rows = read(file, folder)["tables"][name]
    columns = option.split("; ") if option else list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [columns, ["---"] * len(columns), *([shown(row.get(one)) for one in columns] for row in rows.values())]
    return "\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n"


def _text(reference: str, _: str, folder: Path) -> str:
    file, _, name = reference.partition("/")
    return "\n\n```\n" + "\n".join(read(file, folder)["texts"][name]) + "\n```\n\n"


def _from(file: str, _: str, folder: Path) -> str:
    data = read(file, folder)
    machine = data["machine"]
    level = f", {LEVELS[machine['level']]}" if machine["level"] else ""
    device = f"{machine['gpu']} beside {machine['processor']}" if machine["gpu"] else machine["processor"]
    threads = f"{data['threads']} thread{'s' if data['threads'] > 1 else ''}"
    return f"{device}{level}, {threads}; commit {data['commit']}, {data['date']}; beside it ran {data['beside']}."


def shown(value: Cell) -> str:
    """Return a cell as text: thousands have commas, and nothing is shown for null."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)


if __name__ == "__main__":
    main()
