"""Reports: tables that agree with the records, plots, and the page of search trees, tested in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from dataclasses import asdict, replace

import pytest
from browser import Page, find_chromium, pictures_in
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier
from tts_search import SearchConfig, Step
from tts_search.evaluation.evaluate import Experiment, Record, evaluate, write_manifest
from tts_search.evaluation.page import VIEW, report_page
from tts_search.evaluation.report import write_report
from tts_search.evaluation.rows import Difficulty, read_folder, rows_of, strategy_map
from tts_search.evaluation.tables import comparisons_table, report_tables, rivals_table, strategy_table
from tts_search.evaluation.tasks import Task
from tts_search.lab.arithmetic import generate
from tts_search.lab.checkpoints import load_models
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


def test_rows_join_seeds(folder):
    rows = rows_of(read_folder(folder))
    assert len(rows) == 8
    assert {len(row.records) for row in rows} == {16}
    assert rows[0].label == "beam_search, n=4 [verifier]"
    right = [record.is_correct("prm_max") for record in rows[0].records]
    assert rows[0].accuracy() == pytest.approx(sum(right) / 16)
    some = {"1", "3"}
    chosen = [record.is_correct("majority") for record in rows[0].records if record.task in some]
    majority = replace(rows[0], vote="majority")
    assert majority.accuracy(lambda record: record.task in some) == pytest.approx(sum(chosen) / len(chosen))


def test_tables(folder):
    records = read_folder(folder)
    tables = report_tables(records)
    row = next(row for row in rows_of(records) if row.label.startswith("best_of_n, n=8"))
    lines = [line for line in tables.splitlines() if line.startswith("best_of_n, n=8")]
    solved = sum(record.solved for record in row.records) / len(row.records)
    assert f"{100 * row.accuracy():.1f} (" in lines[0].rpartition("  ")[2]
    assert f" {100 * solved:.1f} (" in lines[1]  # pass@n
    assert "8 tasks; intervals: 95%, Wilson's over tasks; 0 searches failed" in tables
    assert tables == sanitize(tables)


def record(task, method, n, right, rate=0.5, verifier="v", seed=0, **options):
    return Record(
        f"{method}{n} {seed}", task, f"{method}, n={n}, seed={seed}", "", "", "", method, n, seed, ("p", verifier),
        config=SearchConfig(method=method, n=n, seed=seed).as_dict(),
        correct={"prm_max": right}, num_completions=100, num_correct=round(100 * rate), **options,
    )  # fmt: skip


def test_strategy_map():
    records = []
    for seed in (0, 1):
        records += [record(f"e{i}", "best_of_n", 4, right=True, rate=0.9, seed=seed) for i in range(4)]
        records += [record(f"e{i}", "dvts", 4, right=True, rate=0.0, seed=seed) for i in range(4)]  # a tie: best-of-N
        records += [record(f"h{i}", "best_of_n", 4, right=i == 0, rate=0.01, seed=seed) for i in range(4)]
        records += [record(f"h{i}", "dvts", 4, right=i < 3, rate=0.0, seed=seed) for i in range(4)]
    assert strategy_map(rows_of(records)) == {
        ("p", "v", "easy", 4): ("best_of_n", 1.0, 4),
        ("p", "v", "hard", 4): ("dvts", 0.75, 4),
    }
    assert (
        strategy_map(rows_of([one for one in records if one.seed == 0])) == {}
    )  # no samples but those that are judged


def test_bins_do_not_come_from_the_samples_that_are_judged():
    """One policy, problems that are all alike, two searches that are the same: no bin says that one is better."""
    rng = random.Random(0)
    records = []
    for i in range(800):
        for seed in (0, 1):
            for method in ("best_of_n", "dvts"):
                right = sum(rng.random() < 0.3 for _ in range(4))
                one = record(str(i), method, 4, right=rng.random() < right / 4, rate=right / 4, seed=seed)
                records.append(one)
    rows = {row.method: row for row in rows_of(records)}
    difficulty = Difficulty(rows.values())
    for name in ("easy", "medium", "hard"):
        accuracies = [row.accuracy(difficulty.within(name)) for row in rows.values()]
        assert accuracies == pytest.approx([0.3, 0.3], abs=0.06)


def test_a_strategy_beside_the_best_fixed_choice(folder):
    """Best-of-N solves the easy problems, DVTS the hard ones: only a strategy that tells them apart solves all."""
    records = []
    for i in range(40):
        easy, rate = i % 2 == 0, 0.9 * (i % 2 == 0)
        for seed in (0, 1):
            records.append(record(str(i), "best_of_n", 8, right=easy, rate=rate, pass_estimate=0.5, seed=seed))
            records.append(record(str(i), "dvts", 8, right=not easy, rate=0.0, seed=seed))
    lines = strategy_table(records).splitlines()
    names = ["p, v, difficulty from 8 samples", "p, v, difficulty known", "p, v, one for all"]
    assert [line.rpartition("  ")[0].strip() for line in lines[2:]] == names
    estimated, known, fixed = (float(line.split()[-1]) for line in lines[2:])
    assert known == 100.0
    assert max(estimated, fixed) <= 52.5  # the estimates are all the same
    assert "difficulty known" in report_tables(records)
    one_seed = strategy_table([one for one in records if one.seed == 0])
    assert "one for all" in one_seed
    assert "difficulty known" not in one_seed
    failed = [record(str(i), "best_of_n", 8, right=False, verifier="w", error="no") for i in range(9)]
    failed = [replace(one, num_completions=0, num_correct=0, correct={}) for one in failed]
    assert strategy_table([*records, *failed]).splitlines() == lines
    write_report(folder, folder / "with-strategy", plots=False)
    assert "cross-validated accuracy" in (folder / "with-strategy" / "tables.txt").read_text()


def test_comparisons_are_corrected_for_their_number():
    records = []
    for n in (4, 8):
        records += [record(str(i), "best_of_n", n, right=False) for i in range(10)]
        records += [record(str(i), "dvts", n, right=i < (6 if n == 4 else 10)) for i in range(10)]
    lines = comparisons_table(rows_of(records)).splitlines()
    assert lines[0].endswith("p, corrected for 2 tests")
    assert [line.split()[-3:] for line in lines[2:]] == [["+60.0", "0.031", "0.031"], ["+100.0", "0.002", "0.0039"]]


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
    assert {"accuracy-n", "accuracy-seconds", "strategy-map"} <= names
    assert "accuracy-flops" not in names  # scripted models do not count: there is nothing to draw
    drawn = (tmp_path / "accuracy-n.svg").read_text()
    assert all(f">{text}</text>" in drawn for text in ("accuracy %", "n", "majority"))
    assert drawn.count("clip-path=") >= 3  # the lines
    again = tmp_path / "again"
    write_report(folder, again)
    assert (again / "accuracy-n.svg").read_text() == drawn


def test_the_page_holds_texts_as_data_only(folder):
    page = report_page(read_folder(folder))
    body, _, rest = page.partition('<script type="application/json" id="data">')
    data, _, script = rest.partition("</script>")
    assert not set(data) & set("<>&")
    assert page.count("<script") == page.count("</script>") == 2
    policy = page.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        text = page.rpartition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert (VIEW / "tree.js").read_text(encoding="utf-8") in page  # the drawing that the server's page shows
    assert "owned" not in body
    assert "owned" not in script
    searches = json.loads(data)
    assert len(searches) == 128
    assert "</script><script>" in json.dumps(searches)  # it is all there, as text
    assert not any(character in json.dumps(searches, ensure_ascii=False) for character in "\u202e\u2028\x1b\x9b")
    assert (
        len(json.loads(report_page(read_folder(folder), max_trees=3).split('id="data">')[1].split("</script>")[0])) == 3
    )


def test_lone_surrogates_can_be_written(tmp_path):
    tree = {"format": 1, "nodes": [{"id": 0, "parent": None, "text": "a\ud800"}]}
    one = Record("e", "t", "label \ud800", "", "\udfff", "", tree=json.dumps(tree))
    (tmp_path / "index.html").write_text(report_page([one]), encoding="utf-8")
    assert "\\ufffd" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.fixture
def chromium():
    return find_chromium() or pytest.skip("no Chromium to look at the page with: apt-get install chromium")


def test_the_page_in_a_browser(chromium, folder, tmp_path):
    pytest.importorskip("matplotlib")
    write_report(folder, tmp_path / "report")
    with Page(chromium, tmp_path / "report" / "index.html", tmp_path / "profile") as page:
        assert "accuracy %" in page.evaluate("document.querySelector('#tables pre').textContent")
        assert page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        assert page.evaluate("document.images.length") == len(list((tmp_path / "report").glob("*.svg")))
        count = "document.querySelectorAll('.node').length"
        assert page.evaluate("document.querySelectorAll('#search option').length") == 128
        page.type("#find", "beam_search, n=8")
        assert page.evaluate("document.querySelectorAll('#search option').length") == 16
        assert page.evaluate("current.title.startsWith('beam_search, n=8')")
        nodes = page.evaluate("current.nodes")
        assert page.evaluate(count) == len(nodes)
        lost = next(node for node in nodes if node["state"] == "pruned" and "by score" in node["why"])
        page.evaluate(f"view.choose({lost['id']})")
        detail = page.evaluate("document.getElementById('detail').textContent")
        assert f"pruned in round {lost['pruned_in']}" in detail
        assert lost["why"] in detail
        step = page.evaluate("document.querySelector('#detail pre').textContent")
        assert step == lost["text"]  # markup and all, as text
        assert page.evaluate("document.querySelectorAll('#detail pre *, #tables pre *').length") == 0
        parent = next(node for node in nodes[1:] if node["state"] == "expanded")
        page.click(f".node[data-id='{parent['id']}']")
        detail = page.evaluate("document.getElementById('detail').textContent")
        inner = {node["parent"] for node in nodes}
        below = {parent["id"]}
        for node in nodes:
            if node["parent"] in below:
                below.add(node["id"])
        assert f"{len(below - inner)} branches read its 7 tokens" in detail
        best = max((node for node in nodes if node["state"] == "finished"), key=lambda node: node["score"])
        assert page.evaluate("document.querySelectorAll('.node.best').length") == page.evaluate(
            f"view.pathTo({best['id']}).length"
        )
        page.screenshot(tmp_path / "page.png")
        page.click("#pruned")
        assert page.evaluate(count) == sum(node["state"] != "pruned" for node in nodes)
        page.click("#pruned")
        page.evaluate("at('round').value = 1; at('round').dispatchEvent(new Event('input'))")
        assert page.evaluate(count) == sum(node["round"] <= 1 for node in nodes)
        assert page.evaluate("document.title") == "Report"
        page.type("#find", " nothing like it")
        assert page.evaluate(count) == 0
        assert page.complaints == []
        page.evaluate(
            "var s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
        )
        assert page.evaluate("document.title") == "Report"  # the policy lets no other script run


@pytest.mark.slow
def test_the_page_can_be_read_in_both_schemes(chromium, tmp_path):
    """Of a small evaluation of the demo's models."""
    loaded = load_models()
    models = loaded.policies["policy-0.1m"], loaded.verifiers["prm-weak"]
    tasks = [Task(str(i), one.problem, one.answer, "4") for i, one in enumerate(generate("test", 4, 4, 0))]
    experiments = [
        Experiment(
            f"{method}, n={n}",
            SearchConfig(max_step_tokens=64, seed=2).with_method(method, n=n),
            *models,
            ("policy-0.1m", "prm-weak"),
            keep_trees=True,
        )
        for method in ("best_of_n", "beam_search", "dvts")
        for n in (4, 8)
    ]
    evaluate(tasks, experiments, tmp_path / "results.jsonl", progress=False)
    write_manifest(tmp_path / "manifest.json", experiments, "random")
    write_report(tmp_path, tmp_path / "report", plots=False)
    with Page(chromium, tmp_path / "report" / "index.html", tmp_path / "profile") as page:
        page.emulate("dark")
        page.assert_readable("dark")
        page.emulate("light")
        page.type("#find", "dvts, n=8: 0")
        page.evaluate("view.choose(bestLeaf(current.nodes).id)")
        page.assert_readable("light")
        page.evaluate("document.activeElement.blur()")
        page.evaluate("at('trees').scrollIntoView()")
        page.screenshot(pictures_in(tmp_path) / "report.png")


def test_the_page_knows_when_a_node_was_pruned(chromium, tmp_path):
    """Node 1 was made in round 1 and lost in round 2; node 2's tree was written before trees said so."""
    rest = {"text": "a", "scores": [0.5], "score": 0.5, "num_tokens": 1}
    nodes = [
        {"id": 0, "parent": None, "round": 0, "state": "expanded", **rest},
        {"id": 1, "parent": 0, "round": 1, "state": "pruned", "why": "late", "pruned_in": 2, **rest},
        {"id": 2, "parent": 0, "round": 1, "state": "pruned", "why": "at once", **rest},
        {"id": 3, "parent": 0, "round": 2, "state": "finished", "why": "", "pruned_in": None, **rest},
    ]
    file = tmp_path / "index.html"
    file.write_text(report_page([Record("e", "t", "l", "", "", "", tree=json.dumps({"format": 1, "nodes": nodes}))]))
    states = "[...document.querySelectorAll('.node')].slice(1).map(one => one.getAttribute('class')).join()"
    with Page(chromium, file, tmp_path / "profile") as page:
        assert page.evaluate(states) == "node pruned,node pruned,node finished best"
        for node, number in ((1, 2), (2, 1)):
            page.evaluate(f"view.choose({node})")
            assert f"pruned in round {number}" in page.evaluate("document.getElementById('detail').textContent")
        page.evaluate("at('round').value = 1; at('round').dispatchEvent(new Event('input'))")
        assert page.evaluate(states) == "node open,node pruned"
        page.click("#pruned")
        assert page.evaluate(states) == "node open"
        assert page.complaints == []


def test_tables_and_names_are_text_on_the_page(tmp_path):
    plot = tmp_path / 'a"><b>.svg'
    plot.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    page = report_page([], "a <b>&@DATA@\x1b[1m\u202e", [plot])
    assert "<pre>a &lt;b&gt;&amp;@DATA@\ufffd[1m\ufffd</pre>" in page
    assert "<b>" not in page


def searched(key, seed=0, correct=None, models=("p", "v"), config=None, instruction_set="avx2", **settings):
    known = SearchConfig("dvts", 4, seed=seed, **settings).as_dict() if config is None else config
    label = f"a, n=4, seed={seed}"
    return Record(
        f"a #{key}", "t", label, "", "p", "", "dvts", 4, seed, models, known, instruction_set, correct=correct or {}
    )


def test_rows_tell_settings_apart():
    records = [
        searched("cold 0", 0, temperature=0.1),  # failed
        searched("cold 1", 1, {"majority": False, "prm_max": True, "prm_prod_vote": False}, temperature=0.1),
        searched("hot 0", 0, {"majority": True, "prm_max": False}, temperature=1.0),
    ]
    rows = rows_of(records)
    assert [(row.label, len(row.records), row.vote) for row in rows] == [
        ("a, n=4 [v], temperature=0.1", 2, "prm_max"),
        ("a, n=4 [v], temperature=1.0", 1, "prm_max"),
    ]
    assert [row.accuracy() for row in rows] == [0.5, 0.0]
    first = next(line for line in report_tables(records).splitlines() if "temperature=0.1" in line)
    assert "50.0 (" in first  # prm_max, of which the first record knows nothing


@pytest.mark.parametrize(
    ("other", "labels"),
    [
        (searched("b", instruction_set="avx512"), ["a, n=4 [v], level=avx2", "a, n=4 [v], level=avx512"]),
        (searched("b", config={}), ["a, n=4 [v]", "a, n=4 [v], experiment=a #b"]),
        (searched("b", config={}, seed=1), ["a, n=4 [v]", "a, n=4 [v], experiment=a #b"]),
        (searched("b", models=("p", "v", "Think.")), ["a, n=4 [v]", "a, n=4 [v], Think."]),
        (searched("b", top_k=5), ["a, n=4 [v], top_k=0", "a, n=4 [v], top_k=5"]),
    ],
)
def test_what_is_not_known_to_be_equal_is_apart(other, labels):
    """Of a record without settings nothing is known, so it is in a row of its own."""
    rows = rows_of([searched("a"), other])
    assert [len(row.records) for row in rows] == [1, 1]
    assert all(label in {row.label for row in rows} for label in labels[1:])


def test_two_experiments_of_which_nothing_is_known_are_two_rows():
    assert len(rows_of([searched("a", config={}), searched("b", config={})])) == 2
    assert len(rows_of([searched("a", config={}), replace(searched("a", config={}), task="u")])) == 1


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
    page = report_page(records, max_trees=5)
    searches = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [one["title"] for one in searches] == ["a: 0", "a: 1", "a: 2", "b: 0", "b: 1"]
    assert "5 of 8 searches." in page
    assert "8 searches." in report_page(records)
    assert "of 8 searches." not in report_page(records)


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
