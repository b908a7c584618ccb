"""The report of an evaluation's folder: tables, plots, and a page with both and the search trees."""

from __future__ import annotations

from pathlib import Path

from tts_search.evaluation.manifest import read_configs
from tts_search.evaluation.page import report_page
from tts_search.evaluation.rows import read_folder, rows_of
from tts_search.evaluation.tables import report_tables
from tts_search.terminal import sanitize

__all__ = ["write_report"]


def write_report(folder: str | Path, out: str | Path, *, vote: str | None = None, plots: bool = True) -> str:
    """Write the report of an evaluation's folder and return its tables as text.

    The files are ``index.html``, ``tables.txt`` and, with matplotlib, plots.

    The page holds the tables, the plots and the search trees, and needs no other file.

    Raises
    ------
    ValueError
        If the folder holds no results, or a manifest or results of a newer version.
    MissingExtraError
        If plots are asked for and matplotlib is not installed.
    """
    for path in sorted(Path(folder).glob("manifest*.json")):
        read_configs(path)  # raises if the file is broken, or of a newer version
    records = read_folder(folder)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tables = sanitize(report_tables(records, vote))  # labels and levels may be text that anyone wrote
    (out / "tables.txt").write_text(tables + "\n", encoding="utf-8")
    drawn: list[Path] = []
    if plots:
        from tts_search.evaluation.plots import draw_plots

        drawn = draw_plots(rows_of(records, vote), out)
    (out / "index.html").write_text(report_page(records, tables, drawn), encoding="utf-8")
    return tables
