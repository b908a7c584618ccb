"""Reports: tables that say what the records say, plots, and the page of search trees, clicked through in a browser."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import asdict, replace

import pytest
from browser import Page, find_chromium
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier
from tts_search import SearchConfig, Step
from tts_search.evaluation.evaluate import Experiment, Record, evaluate, write_manifest
from tts_search.evaluation.page import tree_page
from tts_search.evaluation.report import write_report
from tts_search.evaluation.rows import read_folder, rows_of, strategy_map
from tts_search.evaluation.statistics import bootstrap
from tts_search.evaluation.tables import report_tables, rivals_table, strategy_table
from tts_search.evaluation.tasks import Task
from tts_search.terminal import sanitize

HOSTILE = [
    "</script><script>document.title='owned';alert(1)</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    "\u202eknilb\u202c \u2066x\u2069 \u2028 \x00\x9b31m",
    "]]><!-- @SCRIPT@ @DATA@ \\u003c/script\\u003e {{constructor}} ${alert(1)} javascript:alert(1)",
    '"><a href="javascript:alert(1)">x</a>',
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An evaluation with two methods and two budgets, in which models write hostile texts."""
    folder = tmp_path_factory.mktemp("evaluation")
    tree = RandomTree(1, end=0.3, answers=("1", "2"))

    def step(*args):
        sampled = tree.step(*args)
        return Step(HOSTILE[args[3] % len(HOSTILE)] + sampled.text, sampled.finished, 7, reason=sampled.reason)

    tasks = [Task(str(i), f"problem {i} {HOSTILE[i % len(HOSTILE)]}", "1", str(i % 2 + 1)) for i in range(8)]
    experiments = [
        Experiment(
            f"{method}, n={n}, seed={seed}",
            SearchConfig(max_steps=5, seed=seed).with_method(method, n=n),
            ScriptedPolicy(step),
            ScriptedVerifier(tree.scores),
            ("policy", "verifier"),
            keep_trees=True,
        )
        for method in ("best_of_n", "beam_search", "dvts", "rebase")
        for n in (4, 8)
        for seed in (0, 1)
    ]
    evaluate(tasks, experiments, folder / "results.jsonl", progress=False)
    write_manifest(folder / "manifest.json", experiments, "random")
    return folder


def test_bootstrap_covers_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for _ in range(300):
        values = [float(rng.random() < 0.4) for _ in range(80)]
        low, high = bootstrap(values, samples=400)
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / 300 <= 0.98
    assert bootstrap([1.0] * 9) == (1.0, 1.0)
    values = [rng.gauss(3, 2) for _ in range(200)]
    low, high = bootstrap(values)
    half = 1.96 * statistics.stdev(values) / 200**0.5
    assert (low, high) == pytest.approx((statistics.mean(values) - half, statistics.mean(values) + half), abs=0.06)
    assert bootstrap(values) == (low, high)


def test_rows_join_seeds(folder):
    rows = rows_of(read_folder(folder))
    assert len(rows) == 8
    assert {len(row.records) for row in rows} == {16}
    assert rows[0].label == "beam_search, n=4 [verifier]"
    right = [record.is_correct("prm_max") for record in rows[0].records]
    assert rows[0].accuracy() == pytest.approx(sum(right) / 16)
    some = {"1", "3"}
    chosen = [record.is_correct("majority") for record in rows[0].records if record.task in some]
    assert rows[0].accuracy("majority", some) == pytest.approx(sum(chosen) / len(chosen))


def test_tables(folder):
    records = read_folder(folder)
    tables = report_tables(records)
    row = next(row for row in rows_of(records) if row.label.startswith("best_of_n, n=8"))
    lines = [line for line in tables.splitlines() if line.startswith("best_of_n, n=8")]
    solved = sum(record.solved for record in row.records) / len(row.records)
    assert f" {100 * solved:.1f} (" in lines[0]  # pass@n
    assert f"{100 * row.accuracy():.1f} (" in lines[1].rpartition("  ")[2]
    assert "8 tasks; intervals: 95%, bootstrap over tasks; 0 searches failed" in tables
    assert tables == sanitize(tables)


def record(task, method, n, right, rate=0.5, verifier="v", **options):
    return Record(
        f"{method}{n}", task, f"{method}, n={n}", "", "", "", method, n, 0, ("p", verifier),
        correct={"prm_max": right}, num_completions=100, num_correct=round(100 * rate), **options,
    )  # fmt: skip


def test_strategy_map():
    records = [record(f"e{i}", "best_of_n", 4, right=True, rate=0.9) for i in range(4)]
    records += [record(f"e{i}", "dvts", 4, right=True, rate=0.0) for i in range(4)]  # a tie: best-of-N
    records += [record(f"h{i}", "best_of_n", 4, right=i == 0, rate=0.01) for i in range(4)]
    records += [record(f"h{i}", "dvts", 4, right=i < 3, rate=0.0) for i in range(4)]
    assert strategy_map(rows_of(records)) == {
        ("p", "v", "easy", 4): ("best_of_n", 1.0, 4),
        ("p", "v", "hard", 4): ("dvts", 0.75, 4),
    }


def test_a_strategy_beside_the_best_fixed_choice(folder):
    """Best-of-N solves the easy problems, DVTS the hard ones: only a strategy that tells them apart solves all."""
    configs = {f"{method}8": SearchConfig(method=method, n=8) for method in ("best_of_n", "dvts")}
    records = []
    for i in range(40):
        easy = i % 2 == 0
        records.append(record(str(i), "best_of_n", 8, right=easy, rate=0.9 if easy else 0.0, pass_estimate=0.5))
        records.append(record(str(i), "dvts", 8, right=not easy, rate=0.0))
    lines = strategy_table(records, configs).splitlines()
    names = ["p, v, difficulty from 8 samples", "p, v, difficulty known", "p, v, one for all"]
    assert [line.rpartition("  ")[0].strip() for line in lines[2:]] == names
    estimated, known, fixed = (float(line.split()[-1]) for line in lines[2:])
    assert known == 100.0
    assert max(estimated, fixed) <= 52.5  # the estimates are all the same
    assert "difficulty known" in report_tables(records, configs=configs)
    failed = [record(str(i), "best_of_n", 8, right=False, verifier="w", error="no") for i in range(9)]
    failed = [replace(one, num_completions=0, num_correct=0, correct={}) for one in failed]
    assert strategy_table([*records, *failed], configs).splitlines() == lines
    write_report(folder, folder / "with-strategy", plots=False)
    assert "cross-validated accuracy" in (folder / "with-strategy" / "tables.txt").read_text()


def test_rivals():
    def row(policy, label, n, right, flops, verifier=""):
        records = [
            Record(
                label, str(i), label, "", "", "", "best_of_n", n, 0, (policy, verifier),
                correct={"majority": i < right, "prm_max": i < right},
                stats={"flops_policy": flops, "flops_verifier": flops if verifier else 0.0},
            )
            for i in range(10)
        ]  # fmt: skip
        return rows_of(records)[0]

    rows = [
        row("small", "small, greedy, n=1", 1, 3, 10.0),
        row("large", "large, greedy, n=1", 1, 6, 400.0),
        row("small", "small, best_of_n, n=4", 4, 5, 40.0, "v"),
        row("small", "small, best_of_n, n=16", 16, 6, 160.0, "v"),
        row("small", "small, best_of_n, n=64", 64, 8, 640.0, "v"),
        row("small", "small, best_of_n, n=64", 64, 5, 640.0, "w"),
    ]
    lines = rivals_table(rows).splitlines()
    assert lines[2].split()[-4:] == ["best_of_n,", "n=16", "60.0", "0.8x"]
    assert lines[3].split()[-3:] == ["none", "-", "-"]
    assert len(lines) == 4


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match=r"expected results in results\*.jsonl, found none"):
        write_report(tmp_path, tmp_path / "report")


def test_report_and_plots(folder, tmp_path):
    pytest.importorskip("matplotlib")
    assert write_report(folder, tmp_path) in (tmp_path / "tables.txt").read_text()
    names = {path.stem for path in tmp_path.glob("*.svg")}
    bins = {f"accuracy-n-{name}" for name in ("easy", "medium", "hard")}
    assert names == {"accuracy-n", "accuracy-flops", "accuracy-seconds", "strategy-map", *bins}
    drawn = (tmp_path / "accuracy-n.svg").read_text()
    assert all(f">{text}</text>" in drawn for text in ("accuracy %", "n", "majority"))
    assert drawn.count("clip-path=") >= 3  # the lines
    again = tmp_path / "again"
    write_report(folder, again)
    assert (again / "accuracy-n.svg").read_text() == drawn


def test_the_page_holds_texts_as_data_only(folder):
    page = tree_page(read_folder(folder))
    body, _, rest = page.partition('<script type="application/json" id="data">')
    data, _, script = rest.partition("</script>")
    assert not set(data) & set("<>&")
    assert page.count("<script") == page.count("</script>") == 2
    assert "owned" not in body
    assert "owned" not in script
    searches = json.loads(data)
    assert len(searches) == 128
    assert "</script><script>" in json.dumps(searches)  # it is all there, as text
    assert not any(character in json.dumps(searches, ensure_ascii=False) for character in "\u202e\u2028\x1b\x9b")
    assert (
        len(json.loads(tree_page(read_folder(folder), max_trees=3).split('id="data">')[1].split("</script>")[0])) == 3
    )


def test_lone_surrogates_can_be_written(tmp_path):
    tree = {"format": 1, "nodes": [{"id": 0, "parent": None, "text": "a\ud800"}]}
    one = Record("e", "t", "label \ud800", "", "\udfff", "", tree=json.dumps(tree))
    (tmp_path / "trees.html").write_text(tree_page([one]), encoding="utf-8")
    assert "\\ufffd" in (tmp_path / "trees.html").read_text(encoding="utf-8")


def test_the_page_in_a_browser(folder, tmp_path):
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium to look at the page with: apt-get install chromium")
    file = tmp_path / "trees.html"
    file.write_text(tree_page(read_folder(folder)))
    with Page(program, file, tmp_path / "profile") as page:
        count = "document.querySelectorAll('.node').length"
        assert page.evaluate("document.querySelectorAll('#search option').length") == 128
        page.type("#find", "beam_search, n=8")
        assert page.evaluate("document.querySelectorAll('#search option').length") == 16
        assert page.evaluate("current.title.startsWith('beam_search, n=8')")
        nodes = page.evaluate("current.nodes")
        assert page.evaluate(count) == len(nodes) - 1
        lost = next(node for node in nodes if node["state"] == "pruned" and "by score" in node["why"])
        page.click(f".node[data-id='{lost['id']}']")
        detail = page.evaluate("document.getElementById('detail').textContent")
        assert f"pruned in round {lost['pruned_in']}" in detail
        assert lost["why"] in detail
        step = page.evaluate("document.querySelector('#detail pre').textContent")
        assert step == lost["text"]  # markup and all, as text
        assert page.evaluate("document.querySelectorAll('#detail pre *, .text *').length") == 0
        parent = next(node for node in nodes[1:] if node["state"] == "expanded")
        page.click(f".node[data-id='{parent['id']}']")
        assert "branches read its 7 tokens" in page.evaluate("document.getElementById('detail').textContent")
        page.screenshot(tmp_path / "page.png")
        page.click(f"li:has(> .row > .node[data-id='{parent['id']}']) > .row > .fold")
        below = {parent["id"]}
        for node in nodes:
            if node["parent"] in below:
                below.add(node["id"])
        assert page.evaluate(count) == len(nodes) - len(below)
        page.click(f"li:has(> .row > .node[data-id='{parent['id']}']) > .row > .fold")
        page.click("#pruned")
        assert page.evaluate(count) == sum(node["state"] != "pruned" for node in nodes[1:])
        page.click("#pruned")
        page.evaluate("document.getElementById('round').value = 1; document.getElementById('round').oninput()")
        assert page.evaluate(count) == sum(node["round"] == 1 for node in nodes)
        assert page.evaluate("document.title") == "Search trees"
        page.type("#find", " nothing like it")
        assert page.evaluate(count) == 0
        assert page.complaints == []
        page.evaluate(
            "var s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
        )
        assert page.evaluate("document.title") == "Search trees"  # the policy lets no other script run


def test_the_page_knows_when_a_node_was_pruned(tmp_path):
    """Node 1 was made in round 1 and lost in round 2; node 2's tree was written before trees said so."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium to look at the page with: apt-get install chromium")
    rest = {"text": "a", "scores": [0.5], "score": 0.5, "num_tokens": 1}
    nodes = [
        {"id": 0, "parent": None, "round": 0, "state": "expanded", **rest},
        {"id": 1, "parent": 0, "round": 1, "state": "pruned", "why": "late", "pruned_in": 2, **rest},
        {"id": 2, "parent": 0, "round": 1, "state": "pruned", "why": "at once", **rest},
        {"id": 3, "parent": 0, "round": 2, "state": "finished", "why": "", "pruned_in": None, **rest},
    ]
    file = tmp_path / "trees.html"
    file.write_text(tree_page([Record("e", "t", "l", "", "", "", tree=json.dumps({"format": 1, "nodes": nodes}))]))
    states = "[...document.querySelectorAll('.node')].map(one => one.className).join()"
    with Page(program, file, tmp_path / "profile") as page:
        assert page.evaluate(states) == "node pruned,node pruned,node finished"
        for node, number in ((1, 2), (2, 1)):
            page.click(f".node[data-id='{node}']")
            assert f"pruned in round {number}" in page.evaluate("document.getElementById('detail').textContent")
        page.evaluate("document.getElementById('round').value = 1; document.getElementById('round').oninput()")
        assert page.evaluate(states) == "node open,node pruned"
        page.click("#pruned")
        assert page.evaluate(states) == "node open"
        assert page.complaints == []


def test_rows_tell_settings_apart():
    def one(key, seed, correct):
        return Record(
            f"a #{key}", "t", f"a, n=4, seed={seed}", "", "p", "", "dvts", 4, seed, ("p", "v"), correct=correct
        )

    records = [
        one("cold 0", 0, {}),  # failed
        one("cold 1", 1, {"majority": False, "prm_max": True, "prm_prod_vote": False}),
        one("hot 0", 0, {"majority": True, "prm_max": False}),
    ]
    configs = {
        record.experiment: SearchConfig("dvts", 4, temperature=0.1 if "cold" in record.experiment else 1.0, seed=seed)
        for seed, record in zip((0, 1, 0), records, strict=True)
    }
    rows = rows_of(records, configs=configs)
    assert [(row.label, len(row.records), row.vote) for row in rows] == [
        ("a, n=4 [v], temperature=0.1", 2, "prm_max"),
        ("a, n=4 [v], temperature=1.0", 1, "prm_max"),
    ]
    assert [row.accuracy() for row in rows] == [0.5, 0.0]
    first = next(line for line in report_tables(records, configs=configs).splitlines() if "temperature=0.1" in line)
    assert "50.0 (50-50)" in first  # prm_max, of which the first record knows nothing


def test_votes_are_checked(folder):
    records = read_folder(folder)
    assert {row.vote for row in rows_of(records, "prm_avg_max")} == {"prm_mean_max"}
    for call in (lambda: rows_of(records, "prm_maxx"), lambda: records[0].is_correct("prm_maxx")):
        with pytest.raises(ValueError, match=r"^vote: expected one of majority, .* got 'prm_maxx'"):
            call()
    one = record("t", "dvts", 4, right=True)
    assert not replace(one, correct={"majority": True, "prm_max": False}).is_correct("prm_mean_max")
    assert replace(one, correct={"majority": True}).is_correct("prm_mean_max")  # there was no verifier


def test_the_page_takes_trees_of_all_experiments():
    tree = json.dumps({"format": 1, "nodes": [{"id": 0, "parent": None, "text": ""}]})
    records = [Record(name, str(task), name, "", "", "", tree=tree) for name in "ab" for task in range(4)]
    page = tree_page(records, max_trees=5)
    searches = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [one["title"] for one in searches] == ["a: 0", "a: 1", "a: 2", "b: 0", "b: 1"]
    assert "5 of 8 searches." in page
    assert "8 searches." in tree_page(records)
    assert "of 8 searches." not in tree_page(records)


def test_tables_on_disk_hold_no_control_sequences(tmp_path):
    one = Record("e", "t", "a\x1b[31mb", "\x1b]0;owned\x07", "p", "", "dvts", 4, correct={"majority": True})
    (tmp_path / "results.jsonl").write_text(json.dumps(asdict(one)) + "\n")
    write_report(tmp_path, tmp_path, plots=False)
    text = (tmp_path / "tables.txt").read_text()
    assert "ab" in text
    assert text == sanitize(text)


def test_every_verifier_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from tts_search.evaluation.plots import draw_plots

    names = [f"verifier {number}" for number in range(6)]
    draw_plots(rows_of([record("t", "dvts", 4, right=True, verifier=name) for name in names]), tmp_path)
    drawn = (tmp_path / "accuracy-n.svg").read_text()
    assert all(f"dvts, {name}<" in drawn for name in names)
