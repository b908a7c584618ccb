"""One HTML page that needs no other file: the tables and plots of an evaluation, and its search trees.

Text that a model wrote is data. It is in the page as JSON without a single angle bracket, and the script shows it as
text only. Control characters that could reorder the screen are made visible. A content security policy allows no other
script, no other style and no loading of other files.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tts_search.evaluation.records import Record

__all__ = ["VIEW", "report_page"]

VIEW = Path(__file__).parent / "view"
"""The files that draw a search tree. The server's page uses them, too."""

_PLACE = re.compile("@([A-Z_]+)@")
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u061c\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def report_page(
    records: Iterable[Record], tables: str = "", plots: Iterable[Path] = (), *, max_trees: int = 300
) -> str:
    """Return the page of an evaluation.

    Parameters
    ----------
    records : iterable of Record
        Search trees in the records are drawn as on the server's page, round by round: the steps, their scores, what was
        pruned when and why, and how many branches share the KV cache of a step.
    tables : str
        Tables as text.
    plots : iterable of Path
        Files of plots, as SVG.
    max_trees : int
        The largest number of trees on the page. Each experiment in turn adds its next tree.
    """
    grown = [record for record in records if record.tree is not None]
    searches = [_search(record) for record in _dealt(grown, max_trees)]
    data = json.dumps(searches, ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    style, script = _sources("tree.css", "report.css"), _sources("tree.js", "report.js")
    parts = {
        "STYLE_DIGEST": _digest(style),
        "SCRIPT_DIGEST": _digest(script),
        "STYLE": style,
        "TABLES": html.escape(_HIDDEN.sub("\ufffd", tables)),
        "PLOTS": "\n".join(map(_picture, plots)),
        "COUNT": f"{len(searches)} of {len(grown)}" if len(searches) < len(grown) else str(len(grown)),
        "DATA": data,
        "SCRIPT": script,
    }
    return _PLACE.sub(lambda found: parts[found[1]], _sources("report.html"))  # in one pass: no text is searched twice


def _sources(*names: str) -> str:
    return "\n".join((VIEW / name).read_text(encoding="utf-8") for name in names)


def _digest(text: str) -> str:
    """The hash by which a content security policy names a script or style with this text."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _picture(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(file.stem)}">'


def _dealt(records: Sequence[Record], count: int) -> list[Record]:
    """Choose `count` records in their order: the same number of each experiment, as far as it has so many."""
    turns: Counter[str] = Counter()
    places = []
    for place, record in enumerate(records):
        places.append((turns[record.experiment], place))
        turns[record.experiment] += 1
    return [records[place] for place in sorted(place for _, place in sorted(places)[:count])]


def _search(record: Record) -> dict[str, Any]:
    assert record.tree is not None
    vote = "prm_max" if "prm_max" in record.answers else "majority"
    facts = {
        "title": f"{record.label}: {record.task}",
        "problem": record.problem,
        "gold": record.gold,
        "answer": record.answers.get(vote, ""),
        "right": record.is_correct(vote),
        "models": ", ".join(name for name in record.models if name),
        "nodes": json.loads(record.tree)["nodes"],
    }
    shown: dict[str, Any] = _visible(facts)
    return shown


def _visible(value: Any) -> Any:
    """Show hidden characters as U+FFFD, in all texts of a JSON value."""
    if isinstance(value, str):
        return _HIDDEN.sub("\ufffd", value)
    if isinstance(value, list):
        return [_visible(item) for item in value]
    if isinstance(value, dict):
        return {name: _visible(item) for name, item in value.items()}
    return value
