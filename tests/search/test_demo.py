"""The demo and the command line, on scripted models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from arithmetic_models import policy, verifier
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier
from tts_search import SearchConfig, SearchError, Step, search
from tts_search.cli import main as cli
from tts_search.evaluation.evaluate import Experiment, read_records
from tts_search.evaluation.runs import check_success, failures, run_experiments
from tts_search.evaluation.tasks import Task
from tts_search.lab.demo import Models, load_models, run_demo
from tts_search.serve.results import result_as_dict

HOSTILE = "\x1b[31m\x1b]0;owned\x07"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    models = Models(
        {"policy-0.1m": policy(0.3, HOSTILE), "policy-0.6m": policy(0.15), "policy-3m": policy(0.1)},
        {"prm-strong": verifier(0.1, HOSTILE), "prm-weak": verifier(0.5, HOSTILE)},
    )
    out = tmp_path_factory.mktemp("demo")
    printed: list[str] = []
    records = run_demo(models, out, levels=(2, 4), count=5, budgets=(1, 4, 16), emit=printed.append, progress=False)
    return out, "\n".join(printed), records


def test_demo_prints_its_tables(demo):
    out, text, _ = demo
    for method in ("best-of-N", "majority vote", "beam search", "DVTS"):
        assert f"\npolicy-0.1m, {method}, n=16 " in text
    assert "\npolicy-0.1m, beam search, n=16, prm-weak " in text
    assert "\npolicy-3m, greedy " in text
    assert "level 2" in text
    assert "level 4" in text
    assert "level 1" not in text
    assert "KV shared" in text
    assert "unshared" in text
    assert "Does policy-0.1m with search beat policy-3m alone" in text
    verdict = next(line for line in text.splitlines() if line.startswith("  policy-0.1m, beam search, n=16: "))
    assert "points over all levels (p = " in verdict
    searches = text.partition("corrected for ")[2]
    assert int(searches.split()[0]) == text.count("points over all levels") == 9
    assert "ahead on level 2, 4, behind on no level" in verdict  # greedily, even the largest one errs every time
    assert str(out / "results.jsonl") in text


def test_demo_shows_a_tree_that_search_solved_and_greedy_did_not(demo):
    _, text, records = demo
    shown = text[text.index("A search tree") :].splitlines()
    problem = shown[1].strip()
    solved = {record.label: record.is_correct("prm_max") for record in records if record.problem == problem}
    assert solved["policy-0.1m, beam search, n=16"]
    assert not solved["policy-0.1m, greedy"]
    assert shown[3].startswith("problem")
    assert sum("\\boxed{" in line for line in shown) >= 1


def test_demo_strips_control_sequences(demo):
    _, text, records = demo
    assert any(HOSTILE in record.best for record in records)  # the results file has the texts as they are
    assert "\x1b" not in text
    assert "owned" not in text


def test_demo_writes_everything(demo):
    out, _, records = demo
    written = read_records(out / "results.jsonl")
    assert len(written) == len(records) == 10 * (6 + 6 + 3)
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["experiments"]) == {record.experiment for record in records}
    assert manifest["runs"][0]["count"] == 5


def test_demo_finds_what_is_there(demo):
    _, _, records = demo

    def right(label):
        return sum(record.is_correct("prm_max") for record in records if record.label == label)

    assert right("policy-0.1m, beam search, n=16") > right("policy-0.1m, one sample")
    assert right("policy-0.1m, greedy") == 0


def test_demo_without_models(tmp_path):
    with pytest.raises(SearchError, match=r"policy-0.1m.* not found in .*examples/demo_models"):
        load_models(tmp_path)


@pytest.fixture
def commands():
    pytest.importorskip("typer")
    from tts_search.cli import commands

    return commands


def run_cli(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tts_search.cli", *arguments], capture_output=True, text=True)


def test_help():
    pytest.importorskip("typer")
    done = run_cli("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("demo", "solve", "eval"))


def test_without_typer_the_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "typer is not installed: pip install 'tts-kernels[search]'" in capsys.readouterr().err


def test_settings(commands):
    config = commands.make_config("dvts", 8, 3, 0.5, ["lookahead=1", "dedupe=true", "delimiter=##", "max-tokens=99"])
    assert config == SearchConfig(
        method="dvts", n=8, seed=3, temperature=0.5, lookahead=1, dedupe=True, delimiter="##", max_tokens=99
    )


def searched(scored=True):
    tree = RandomTree(2, end=0.3, marker=f"{HOSTILE} \\boxed{{7}}")
    drivers = ScriptedPolicy(tree.step), ScriptedVerifier(tree.scores) if scored else None
    config = SearchConfig(n=4, max_steps=5).with_method("beam_search" if scored else "best_of_n")
    return search(["p"], *drivers, config, progress=False)[0]


def test_result_as_text(commands):
    text = commands.result_as_text(searched(), "prm_max", show_tree=True)
    assert "answer (prm_max): 7" in text
    assert "problem" in text.splitlines()[-1 - text.count("─")] or "\nproblem" in text
    assert "\x1b" not in text
    assert "owned" not in text
    assert "step scores: none" in commands.result_as_text(searched(scored=False), "majority")


def test_a_result_as_json_has_no_number_that_json_lacks():
    for scored, vote in ((True, "prm_max"), (False, "majority")):
        result = searched(scored)
        text = json.dumps(result_as_dict(result, vote, tree=True), allow_nan=False)
        data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert data["answer"] == result.answer(vote)
        assert len(data["completions"]) == len(result.completions)
        assert data["config"]["n"] == 4
        assert len(data["tree"]["nodes"]) == len(result.tree.nodes)


INTERRUPTED = """
import sys
from tts_search import Step, TextPolicy
from tts_search.cli import commands
from tts_search.cli import main as cli

def generate(requests):
    if any(request.problem == "third" for request in requests):
        raise KeyboardInterrupt
    return [[Step(r"\\boxed{1}", True)] * request.num_samples for request in requests]

commands.load_checkpoints = lambda *_, **__: (TextPolicy(generate), None)
sys.argv = ["tts-search", "eval", *sys.argv[1:]]
cli.main()
"""


def test_interrupted_eval_saves_what_it_has(tmp_path):
    pytest.importorskip("typer")
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"problem": p, "answer": "1"}) + "\n" for p in ("first", "second", "third")))
    arguments = [str(data), "--policy", "x", "--out", str(out), "--in-flight", "1"]
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert f"interrupted; finished tasks are in {out / 'results.jsonl'}, run it again" in done.stderr
    assert [record.problem for record in read_records(out / "results.jsonl")] == ["first", "second"]
    assert (out / "manifest.json").exists()


def test_run_experiments(tmp_path):
    tree = RandomTree(2, end=0.3, marker=" \\boxed{7}")
    experiment = Experiment(
        "mine", SearchConfig(n=4, max_steps=3), ScriptedPolicy(tree.step), ScriptedVerifier(tree.scores)
    )
    tasks = [Task("1", "p", "7", "1\x1b[2J\x1b]0;owned\x07"), Task("2", "", "8", "2")]
    printed: list[str] = []
    (row,) = run_experiments(tasks, [experiment], tmp_path, data="data.jsonl", emit=printed.append, progress=False)
    assert sorted(row.records, key=lambda one: one.task) == sorted(
        read_records(tmp_path / "results.jsonl"), key=lambda one: one.task
    )
    assert printed[0].startswith("mine: ")
    assert failures([row]).startswith(
        "1 search failed and counts as wrong; the first one: mine, 2: problem 1, round 0: "
    )
    check_success([row])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["runs"][0]["versions"]["torch"]
    assert manifest["runs"][0]["data"] == "data.jsonl"


def test_no_success_is_an_error(tmp_path):
    failing = Experiment("mine", SearchConfig("best_of_n", n=2), ScriptedPolicy(lambda *_: Step("", False)), None)
    printed: list[str] = []
    rows = run_experiments([Task("1", "p", "7")], [failing], tmp_path, data="d", emit=printed.append, progress=False)
    with pytest.raises(SearchError, match=r"^mine: no search succeeded; the first one: problem 0, round 1: policy"):
        check_success(rows)


def test_report_of_a_folder(tmp_path):
    pytest.importorskip("typer")
    test_interrupted_eval_saves_what_it_has(tmp_path)
    results = tmp_path / "out" / "results.jsonl"
    results.write_text(results.read_text().replace('"level": ""', '"level": "\\u001b[2J\\u009b31m"'))
    done = run_cli("report", str(tmp_path / "out"), "--no-plots")
    assert done.returncode == 0, done.stderr
    assert "2 tasks; intervals: 95%, Wilson's over tasks" in done.stdout
    assert not set(done.stdout) & set("\x1b\x9b")
    assert (tmp_path / "out" / "report" / "index.html").exists()


def test_plan_of_the_study():
    pytest.importorskip("typer")
    done = run_cli("study", "--plan", "--problems", "10", "--largest", "0", "--budgets", "1,4")
    assert done.returncode == 0, done.stderr
    assert "M tokens sampled" in done.stdout
    assert "n=256" not in done.stdout
