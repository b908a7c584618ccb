"""Mistakes on the command line: one line that names the option, and an exit status that is not 0."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import torch
from tts_search.cli.main import main
from tts_search.domains.code import Level, Sandbox
from tts_search.evaluation.evaluate import read_records
from tts_search.evaluation.records import Journal
from tts_search.lab import MODELS_DIR

POLICY, VERIFIER = str(MODELS_DIR / "policy-0.1m"), str(MODELS_DIR / "prm-strong")
SOLVE = ["solve", "1 + 2", "--policy", POLICY, "--verifier", VERIFIER]
EVAL = ["eval", "data.jsonl", "--policy", POLICY, "--n", "2", "--out", "out"]
SERVE = ["serve", "--policy", POLICY]
ALONE = ["solve", "1 + 2", "--policy", POLICY, "--method", "best_of_n"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a command in a folder with a small data set; returns status, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import
    Path("data.jsonl").write_text('{"problem": "1 + 2", "answer": "3"}\n{"problem": "2 + 2", "answer": "4"}\n')

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tts-search", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return call


def check_line(status: object, text: str, named: str) -> None:
    assert status not in (0, None)
    lines = [line for line in text.splitlines() if line.startswith("tts-search: ")]
    assert len(lines) == 1, text
    assert re.search(named, lines[0]), text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "command"),
        (["nonsense"], "nonsense"),
        (["--nonsense"], "--nonsense"),
        (["solve"], "problem|--policy"),
        (["solve", "p"], "--policy"),
        (["eval", "data.jsonl"], "--policy"),
        ([*SOLVE, "--nonsense", "1"], "--nonsense"),
        (["solve", " ", *SOLVE[2:]], "PROBLEM"),
        # models
        (["solve", "p", "--policy", "nowhere", "--method", "best_of_n"], "--policy: nowhere"),
        (["solve", "p", "--policy", "", "--method", "best_of_n"], "--policy"),
        (["solve", "p", "--policy", "no/such/place/at/all", "--method", "best_of_n"], "--policy"),
        (["solve", "p", "--policy", ".", "--method", "best_of_n"], "--policy"),
        (["solve", "p", "--policy", "data.jsonl", "--method", "best_of_n"], "--policy"),
        (["solve", "p", "--policy", POLICY, "--verifier", "nowhere"], "--verifier: nowhere"),
        (["solve", "p", "--policy", POLICY, "--verifier", "data.jsonl"], "--verifier"),
        (["solve", "p", "--policy", POLICY, "--verifier", "judge:nowhere"], "--verifier: judge:nowhere"),
        (["solve", "p", "--policy", POLICY, "--verifier", "judge:http://127.0.0.1:9x"], "--verifier: judge:http"),
        ([*ALONE, "--verifier", f"judge:{POLICY}", "--format", "skywork"], "--format: expected outcome, or none, with"),
        (["solve", "p", "--policy", POLICY], "--method: beam_search needs --verifier"),
        ([*EVAL, "--n", "4", "--method", "beam_search"], "--method: beam_search needs --verifier"),
        ([*SOLVE, "--dtype", "float8"], "--dtype"),
        ([*SOLVE, "--dtype", "int8"], "--dtype"),
        ([*EVAL, "--dtype", ""], "--dtype"),
        ([*SOLVE, "--device", "gpu"], "--device"),
        ([*SOLVE, "--device", "cuda:x"], "--device"),
        ([*SOLVE, "--device", "meta"], "--device"),
        ([*EVAL, "--device", ""], "--device"),
        ([*SOLVE, "--kv-memory", "much"], "--kv-memory"),
        ([*SOLVE, "--quantize", "int2"], "--quantize"),
        ([*SOLVE, "--kv-memory", "-1GiB"], "--kv-memory"),
        ([*EVAL, "--kv-memory", "0"], "--policy: kv_memory|--kv-memory"),
        ([*SOLVE, "--format", "nonsense"], "--format"),
        ([*EVAL, "--format", "yes_no"], "--format"),
        # the search
        ([*SOLVE, "--method", "nonsense"], "--method"),
        ([*EVAL, "--method", "best_of_n", "--method", "nonsense"], "--method"),
        ([*SOLVE, "--n", "0"], "--n"),
        ([*SOLVE, "--n", "-4"], "--n"),
        ([*SOLVE, "--n", "many"], "--n"),
        ([*SOLVE, "--n", "1.5"], "--n"),
        ([*SOLVE, "--n", "10"], "--n or --set: keep \\* expand: expected"),
        ([*SOLVE, "--n", "10", "--method", "dvts"], "--n: expected a multiple of expand"),
        ([*EVAL, "--n", "4", "--n", "0"], "--n"),
        ([*SOLVE, "--temperature", "-1"], "--temperature"),
        ([*SOLVE, "--temperature", "nan"], "--temperature"),
        ([*SOLVE, "--temperature", "inf"], "--temperature"),
        ([*SOLVE, "--temperature", "hot"], "--temperature"),
        ([*SOLVE, "--seed", "x"], "--seed"),
        ([*EVAL, "--seed", "1.5"], "--seed"),
        ([*SOLVE, "--set", "lookahead"], "--set: expected NAME=VALUE"),
        ([*SOLVE, "--set", "beam_width=4"], "--set: expected NAME=VALUE"),
        ([*SOLVE, "--set", "_rules=1"], "--set: expected NAME=VALUE"),
        ([*SOLVE, "--set", "lookahead=-1"], "--set lookahead"),
        ([*SOLVE, "--set", "top_p=2"], "--set top_p"),
        ([*SOLVE, "--set", "delimiter="], "--set delimiter"),
        ([*SOLVE, "--set", "max_steps=[1]"], "--set max_steps"),
        ([*SOLVE, "--set", "thinking={\"x\": 1}"], "--set thinking"),
        ([*SOLVE, "--set", "aggregate=best"], "--set aggregate"),
        ([*SOLVE, "--vote", "nonsense"], "--vote"),
        ([*SOLVE, "--vote", ""], "--vote"),
        ([*ALONE, "--vote", "prm_max"], "--vote: prm_max needs --verifier"),
        ([*EVAL, "--vote", "prm_vote"], "--vote: prm_vote needs --verifier"),
        # the evaluation
        (["eval", "nothing.jsonl", *EVAL[2:]], "DATA: .*nothing.jsonl"),
        (["eval", "", *EVAL[2:]], "DATA"),
        (["eval", ".", *EVAL[2:]], "DATA: .*folder"),
        ([*EVAL, "--limit", "-1"], "--limit"),
        ([*EVAL, "--limit", "0"], "--limit"),
        ([*EVAL, "--limit", "all"], "--limit"),
        ([*EVAL, "--in-flight", "0"], "--in-flight"),
        ([*EVAL, "--in-flight", "-2"], "--in-flight"),
        ([*EVAL, "--actors", "0"], "--actors"),
        ([*SERVE, "--pooling", "tokens"], "--pooling: expected steps without a --verifier"),
        ([*SERVE, "--verifier", POLICY, "--format", "yes_no", "--pooling", "tokens"], "head that classifies tokens"),
        ([*EVAL, "--written-tests", "2"], "--written-tests: expected with --verifier execution only"),
        ([*EVAL, "--verifier", VERIFIER, "--written-tests", "2"], "--written-tests: expected with"),
        ([*EVAL, "--verifier", "execution", "--written-tests", "2"], "--written-tests: expected tasks of programming"),
        ([*EVAL, "--verifier", "execution", "--written-tests", "0"], "--written-tests"),
        ([*EVAL, "--actors", "2"], "--actors: expected with --ray"),
        ([*EVAL[:-1], "data.jsonl"], "--out"),
        ([*EVAL[:-1], "data.jsonl/below"], "--out"),
        ([*EVAL[:-1], "/proc/nowhere"], "--out"),
        # the others
        (["report", "nowhere"], "folder.*nowhere"),
        (["report", "data.jsonl"], "folder.*data.jsonl"),
        (["report", "."], "expected results in results"),
        (["report", ".", "--vote", "nonsense"], "--vote"),
        (["report", ".", "--out", "data.jsonl"], "--out"),
        (["demo", "--problems", "0"], "--problems"),
        (["demo", "--problems", "1000000"], "--problems"),
        (["demo", "--budgets", "1,x"], "--budgets"),
        (["demo", "--budgets", ""], "--budgets"),
        (["demo", "--budgets", "0"], "--budgets"),
        (["demo", "--budgets", "1,6"], "--budgets"),
        (["demo", "--out", "data.jsonl"], "--out"),
        (["demo", "--seed", "x"], "--seed"),
        (["study", "--problems", "-1"], "--problems"),
        (["study", "--problems", "1000000", "--plan"], "--problems"),
        (["study", "--budgets", "1,-4"], "--budgets"),
        (["study", "--largest", "-1"], "--largest"),
        (["study", "--seeds", "0"], "--seeds"),
        (["study", "--part", "3/2"], "--part"),
        (["study", "--part", "half"], "--part"),
        (["study", "--out", "data.jsonl"], "--out"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_option(run, arguments, named):
    status, out, err = run(*arguments)
    if not arguments:
        assert (status, err) == (0, "")
        assert "Commands:" in out
        return
    check_line(status, err, named)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [SOLVE, EVAL])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu"])
def test_a_device_that_is_not_there(run, command, device):
    status, _, err = run(*command, "--device", device)
    check_line(status, err, "--device")


@pytest.mark.parametrize("content", ["", "nonsense", '{"model_type": "of_the_future"}', "[]"])
def test_a_checkpoint_that_is_none(run, content):
    shutil.copytree(POLICY, "model")
    Path("model/config.json").write_text(content)
    status, _, err = run("solve", "p", "--policy", "model", "--method", "best_of_n")
    check_line(status, err, "--policy")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\0" * 100])
def test_weights_that_are_none(run, content):
    shutil.copytree(POLICY, "model")
    Path("model/model.safetensors").write_bytes(content)
    status, _, err = run("solve", "p", "--policy", "model", "--method", "best_of_n")
    check_line(status, err, "--policy")


def test_models_of_the_package_have_names(run):
    status, named, _ = run(*SOLVE[:2], "--policy", "policy-0.1m", "--verifier", "prm-strong")
    assert status == 0
    assert named.partition(" rounds")[0] == run(*SOLVE)[1].partition(" rounds")[0]
    status, _, err = run("solve", "p", "--policy", "policy-0.1m", "--verifier", "judge:policy-0.6m")
    assert "judge:policy-0.6m: We couldn't" not in err
    Path("policy-0.1m").mkdir()  # a folder of one's own goes before
    status, _, err = run("solve", "p", "--policy", "policy-0.1m", "--method", "best_of_n")
    check_line(status, err, "--policy: policy-0.1m")


def test_who_mistypes_a_model_is_told_which_ones_there_are(run):
    known = "The package has these models: policy-0.1m, policy-0.6m, policy-3m, prm-strong, prm-weak[.]$"
    status, _, err = run("solve", "p", "--policy", "policy-01m", "--method", "best_of_n")
    check_line(status, err, f"--policy: policy-01m: .* {known}")
    status, _, err = run("solve", "p", "--policy", POLICY, "--verifier", "prm-stronger")
    check_line(status, err, f"--verifier: prm-stronger: .* {known}")
    status, _, err = run("solve", "p", "--policy", "someone/policy-0.1m", "--method", "best_of_n")
    assert "The package has" not in err


def test_a_broken_manifest_is_found_before_models_are_loaded(run):
    Path("out").mkdir()
    Path("out/manifest.json").write_text("{")
    status, _, err = run("eval", "data.jsonl", "--policy", "nowhere", "--out", "out")
    check_line(status, err, "--out: out/manifest.json: the manifest is broken .* move it away")


def test_an_evaluation_and_its_report(run):
    status, out, err = run(*EVAL)
    assert (status, err) == (0, "")
    assert "accuracy % (95% interval)" in out
    assert len(read_records("out/results.jsonl")) == 2
    status, out, err = run(*EVAL)  # all is there
    assert (status, err) == (0, "")
    assert len(read_records("out/results.jsonl")) == 2
    assert run("report", "out", "--no-plots")[0] == 0


def test_two_temperatures_are_two_rows_without_a_manifest(run):
    for temperature in ("0.2", "0.9"):
        assert run(*EVAL, "--temperature", temperature)[0] == 0
    whole = run("report", "out", "--no-plots")[1]
    Path("out/manifest.json").unlink()
    status, out, _ = run("report", "out", "--no-plots")
    assert (status, out) == (0, whole)
    assert "temperature=0.2" in out
    assert "temperature=0.9" in out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda manifest: manifest.update(format=9), "newer version"),
        (lambda manifest: next(iter(manifest["experiments"].values()))["config"].update(of_the_future=1), "newer"),
    ],
)
def test_a_newer_manifest(run, change, named):
    assert run(*EVAL)[0] == 0
    path = Path("out/manifest.json")
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    for command in (["report", "out", "--no-plots"], EVAL):
        status, _, err = run(*command)
        check_line(status, err, f"out/manifest.json: .*{named}")


def test_no_success_is_no_success(run):
    """Every search fails: the table says 0%, and so does the exit status."""
    shutil.copytree(POLICY, "model")
    Path("model/chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    status, out, err = run("eval", "data.jsonl", "--policy", "model", "--n", "2", "--out", "out")
    assert "0.0 (0-66)" in out
    check_line(status, err, "no search succeeded; .*System role not supported")
    status, _, err = run("solve", "1 + 2", "--policy", "model", "--method", "best_of_n")
    check_line(status, err, "System role not supported")


def test_one_success_is_a_success(run):
    shutil.copytree(POLICY, "model")
    fails = "{% if '2 + 2' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    Path("model/chat_template.jinja").write_text(fails + "{{ messages[0]['content'] }}")
    status, out, err = run("eval", "data.jsonl", "--policy", "model", "--n", "2", "--out", "out")
    assert (status, err) == (0, "")
    assert "1 search failed and counts as wrong" in out


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version(run, option):
    status, out, err = run(option)
    assert (status, err) == (0, "")
    assert ("tts-search 0." in out) == (option == "--version")


@pytest.mark.parametrize("command", ["demo", "solve", "eval", "report", "study", "serve"])
def test_every_command_has_an_example_that_its_options_allow(run, command):
    import typer
    from tts_search.cli.serving import app

    status, out, _ = run(command, "--help")
    assert status == 0
    example = " ".join(out.partition("Example: ")[2].split())
    assert example.startswith(f"tts-search {command}")
    known = {name for one in typer.main.get_command(app).commands[command].params for name in one.opts}  # type: ignore[attr-defined]
    assert {word for word in example.split() if word.startswith("--")} <= known


def test_shell_completion():
    """What a shell asks after ``tts-search ev<Tab>``. (`--show-completion` wants a shell for its parent.)"""
    code = "import sys; from tts_search.cli.main import main; sys.argv = ['tts-search']; main()"
    question = {"_TTS_SEARCH_COMPLETE": "complete_bash", "COMP_WORDS": "tts-search ev", "COMP_CWORD": "1"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **question}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["eval"]


def process(*arguments: str, **options) -> subprocess.CompletedProcess:
    path = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tts_search.cli", *arguments]
    return subprocess.run(command, env=environment, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.usefixtures("run")
def test_output_that_cannot_be_written(tmp_path):
    """A full disk under the tables: the results are there, and the exit status says that they were not shown."""
    with open("/dev/full", "w") as full:
        done = process(*EVAL, cwd=tmp_path, stdout=full)
    check_line(done.returncode, done.stderr, "No space left on device")
    assert len(done.stderr.splitlines()) == 1
    assert len(read_records(tmp_path / "out" / "results.jsonl")) == 2


def test_a_folder_that_vanishes_in_mid_run(run, monkeypatch):
    """One line says so; the same command then makes the folder anew and finds nothing that the first left."""
    append = Journal.append

    def once_removed(journal, record):
        if Path("out").exists() and len(journal):
            shutil.rmtree("out")
        return append(journal, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", once_removed)
        status, _, errors = run(*EVAL)
    check_line(status, errors, "vanished .*results.jsonl")
    assert not Path("out").exists()
    assert run(*EVAL)[0] == 0
    assert len(read_records("out/results.jsonl")) == 2


def test_a_reader_that_goes_away(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = process("--help", cwd=tmp_path, stdout=writing)
    os.close(writing)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_the_test_while_loading_can_be_switched_off(run, monkeypatch):
    asked = []
    monkeypatch.setattr("tts_search.models.loading.check_decoder", lambda *arguments: asked.append(arguments))
    assert run(*SOLVE, "--n", "1", "--method", "best_of_n", "--no-self-test")[0] == 0
    assert run(*EVAL, "--verifier", VERIFIER, "--no-self-test")[0] == 0
    assert not asked
    assert run(*SOLVE, "--n", "1", "--method", "best_of_n")[0] == 0
    assert len(asked) == 2


def on_a_small_disk(folder: Path, script: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount the folder ``disk``, in a namespace of its own; skip where none may be."""
    (folder / "disk").mkdir()
    trial = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        not shutil.which("unshare")
        or subprocess.run(
            [*trial, "mount", "-t", "tmpfs", "tmpfs", str(folder / "disk")], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no mounts in a namespace on this machine")
    return subprocess.run(
        [*trial, "sh", "-ec", script, "sh", *command], cwd=folder, capture_output=True, text=True, check=True
    )


FULL = """
mount -t tmpfs -o size=1m tmpfs disk
head -c 1015000 /dev/zero > disk/ballast
status=0; "$@" 2> said > out || status=$?
echo $status > status
cp -r disk/out after
rm disk/ballast
status=0; "$@" 2>> said_again > out || status=$?
echo $status > status_again
cp -r disk/out again
"""
READ_ONLY = """
mount -t tmpfs -o size=64k tmpfs disk
mkdir disk/out
mount -o remount,ro disk
status=0; "$@" 2> said > out || status=$?
echo $status > status
cp -r disk/out after
"""


def eval_on_disk(folder: Path) -> list[str]:
    problems = "".join(json.dumps({"problem": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(30))
    (folder / "data.jsonl").write_text(problems)
    program = "from tts_search.cli.main import main; main()"
    options = ["--policy", POLICY, "--n", "1", "--n", "2", "--out", "disk/out", "--no-self-test"]
    return [sys.executable, "-c", program, "eval", "data.jsonl", *options]


@pytest.mark.slow
def test_a_disk_that_gets_full_in_mid_run(tmp_path):
    """One line, whole records; with room again the same command goes on."""
    on_a_small_disk(tmp_path, FULL, *eval_on_disk(tmp_path))
    check_line(int((tmp_path / "status").read_text()), (tmp_path / "said").read_text(), "No space left on device")
    text = (tmp_path / "after" / "results.jsonl").read_bytes()
    before = read_records(tmp_path / "after" / "results.jsonl")
    assert text.endswith(b"\n")
    assert 0 < len(before) == text.count(b"\n") < 60
    assert (tmp_path / "status_again").read_text() == "0\n"
    after = read_records(tmp_path / "again" / "results.jsonl")
    assert after[: len(before)] == before
    assert len({record.key for record in after}) == len(after) == 60


@pytest.mark.slow
def test_a_disk_that_cannot_be_written(tmp_path):
    on_a_small_disk(tmp_path, READ_ONLY, *eval_on_disk(tmp_path))
    check_line(
        int((tmp_path / "status").read_text()),
        (tmp_path / "said").read_text(),
        "--out: expected a folder that can be written",
    )
    assert list((tmp_path / "after").iterdir()) == []


def test_tests_are_written_once(run):
    """What a policy wrote stays: the same command draws nothing again, and says the same of what it cost."""
    if not sys.platform.startswith("linux") or Sandbox().level() < Level.FULL:
        pytest.skip("no sandbox of the full level")
    task = {"task_id": 1, "text": "The larger.", "test_list": ["assert larger(1, 2) == 2", "assert larger(3, 2) == 3"]}
    Path("code.jsonl").write_text(json.dumps(task))
    options = ("--policy", POLICY, "--verifier", "execution", "--written-tests", 2, "--n", 2, "--out", "out")
    command = ("eval", "code.jsonl", *options, "--set", "max_step_tokens=32", "--no-self-test")
    status, shown, _ = run(*command)
    assert not status
    assert "written tests: 0 in 2 texts for each of 1 tasks (1 without any); " in shown
    lines = {path.name: path.read_bytes() for path in Path("out").glob("*.jsonl")}
    assert sorted(lines) == ["results.jsonl", "written-tests.jsonl"]
    assert run(*command)[1] == shown
    assert {path.name: path.read_bytes() for path in Path("out").glob("*.jsonl")} == lines
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["runs"][-1]["written_tests"] in shown
    assert not run(*command, "--seed", 1)[0]
    assert len(read_records("out/written-tests.jsonl")) == 2, "other draws have other tests"
