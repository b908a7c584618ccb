"""Numbers in the pages are those of benchmarks/results: the files are complete, and no page has other numbers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import pages  # noqa: E402
import record  # noqa: E402

NAMES = sorted(path.stem for path in (BENCHMARKS / "results").glob("*.json"))
# Units of what can only have been measured. A number in front of one belongs to a file.
MEASURED = re.compile(r"\d[\d.,]*(?: ms| us| GB/s| GFLOP/s| tokens/s|x faster| times faster| times slower)\b")


def named(found):
    return [pytest.param(page, id=page.name) for page in found]


@pytest.mark.parametrize("name", NAMES)
def test_files_are_whole(name):
    assert record.read(name)["tables"]


@pytest.mark.parametrize("page", named(pages.PAGES))
def test_pages_say_what_the_files_say(page):
    text = page.read_text(encoding="utf-8")
    assert text == pages.render(text), "python benchmarks/pages.py writes the page anew"


@pytest.mark.parametrize("page", named(pages.PAGES))
def test_comments_are_whole_and_break_no_paragraph(page):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"<!-- (?:=|table|text|from) ", text)) == len(pages.MARK.findall(text))
    assert not re.search(r"(?m)^ *<!-- =", text), "a comment at the beginning of a line begins a block of HTML"


@pytest.mark.parametrize("page", named(pages.PAGES))
def test_nothing_measured_stands_outside_of_comments(page):
    prose = re.sub(r"(?s)```.*?```", "", pages.MARK.sub("", page.read_text(encoding="utf-8")))
    assert MEASURED.findall(prose) == []


def test_results_say_where_each_number_is_from():
    text = (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")
    sources = {what for kind, what, _ in pages.MARK.findall(text) if kind == "from"}
    for page in pages.PAGES:
        assert pages.references(page.read_text(encoding="utf-8")) <= sources, page.name


@pytest.fixture
def folder(tmp_path):
    rows = {"a": {"n": 4, "ms": 2.5}, "b": {"n": 20_000, "ms": None}}
    path = record.write(
        "mine", what="w", command="c", beside="nothing", tables={"t": rows}, texts={"x": ["1", "2"]}, folder=tmp_path
    )
    assert json.loads(path.read_text())["machine"]["processor"]
    return tmp_path


@pytest.mark.parametrize(
    ("comment", "shown"),
    [
        ("= mine/t/a/ms", "2.5"),
        ("= mine/t/a/ms | .0f", "2"),
        ("= mine/t/b/n", "20,000"),
        ("= mine/t/b/n over mine/t/a/n | .1f", "5000.0"),
        ("table mine/t", "\n\n| n | ms |\n| --- | --- |\n| 4 | 2.5 |\n| 20,000 |  |\n\n"),
        ("table mine/t | ms", "\n\n| ms |\n| --- |\n| 2.5 |\n|  |\n\n"),
        ("text mine/x", "\n\n```\n1\n2\n```\n\n"),
    ],
)
def test_what_comments_become(folder, comment, shown):
    assert pages.render(f"a <!-- {comment} -->old<!-- . --> b", folder) == f"a <!-- {comment} -->{shown}<!-- . --> b"


def test_where_it_was_measured(folder):
    text = pages.render("<!-- from mine --><!-- . -->", folder)
    assert record.processor() in text
    assert text.endswith("; beside it ran nothing.<!-- . -->")


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("= none/t/a/ms", "none: no such measurement"),
        ("= mine/t/c/ms", "mine/t/c/ms: expected one of a, b, got 'c'"),
        ("= mine/t/a", "expected file/table/row/column"),
    ],
)
def test_what_no_file_has(folder, comment, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pages.render(f"<!-- {comment} --><!-- . -->", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beside": ""}, "expected beside"),
        ({"machine": {"processor": "p"}}, "machine: expected cores, memory_gib, level, gpu"),
        ({"tables": {"t": {"a/b": {"n": 1}}}}, "expected names without /"),
        ({"tables": {"t": {"a": {"n": [1]}}}}, "expected numbers and texts"),
        ({"threads": None}, "expected threads"),
    ],
)
def test_files_that_are_not_whole(folder, change, message):
    path = folder / "mine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        record.read("mine", folder)
