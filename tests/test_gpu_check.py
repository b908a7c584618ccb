"""tools/gpu_check.py, as far as it can be tested on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools/gpu_check.py")
assert spec is not None
assert spec.loader is not None
gpu_check = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = gpu_check
spec.loader.exec_module(gpu_check)


def python(name: str, code: str, limit: float = 60, **more: object) -> gpu_check.Part:  # type: ignore[name-defined]
    return gpu_check.Part(name, [sys.executable, "-c", code], limit, **more)


def test_parts_name_files_that_exist() -> None:
    parts = gpu_check.parts()
    assert len({part.name for part in parts}) == len(parts)
    files = [word for part in parts for word in part.command if re.fullmatch(r"\w+/\w+\.py", word)]
    assert len(files) > len(parts)
    for file in files:
        assert (ROOT / file).is_file(), file
    for op in gpu_check.FEW:
        assert (ROOT / f"tests/test_{op}.py").is_file()


@pytest.mark.parametrize("op", gpu_check.FEW)
def test_what_a_sanitizer_runs_is_there(op: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        gpu_check.FEW[op],
    ]
    done = subprocess.run([*command, f"tests/test_{op}.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert re.search(r"test_\w+\.py(::|: [1-9])", done.stdout), done.stdout


def test_each_part_leaves_what_became_of_it(tmp_path: Path) -> None:
    write = "import sys; open(sys.argv[1] + '/answer', 'w').write('42')"
    reads = gpu_check.Part("reads", [sys.executable, "-c", write, "{folder}"], 60)
    reads.read = lambda folder: int((folder / "answer").read_text())
    chosen = [
        python("good", "print('hello')"),
        python("bad", "raise SystemExit('no GPU')"),
        python("slow", "import time; time.sleep(60)", 5.5),
        python("without a program", "", needs="no-such-program"),
        reads,
        python("unreadable", "", read=lambda folder: (folder / "missing").read_text()),
    ]
    out = tmp_path / "out.json"
    gpu_check.run(5, out, chosen, tmp_path / "work")
    report = json.loads(out.read_text())
    found = {part["name"]: part for part in report["parts"]}
    assert [part["status"] for part in report["parts"]] == [
        "passed", "failed", "timed out", "no no-such-program", "passed", "passed",
    ]  # fmt: skip
    assert "hello" in found["good"]["output"]
    assert "no GPU" in found["bad"]["output"]
    assert found["reads"]["data"] == 42
    assert found["unreadable"]["data"].startswith("nothing to read")
    assert report["machine"]["torch"] == torch.__version__


def test_when_time_is_up_the_rest_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    gpu_check.run(0.05, out, [python("first", ""), python("second", "")], tmp_path / "work")
    assert [part["status"] for part in json.loads(out.read_text())["parts"]] == ["no time left"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_parts_say_so(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "tools/gpu_check.py", "run", "--minutes", "5", "--out", str(out)]
    subprocess.run([*command, "--only", "FlashInfer|graphs|Nsight|memcheck: s"], cwd=ROOT, check=True)
    report = json.loads(out.read_text())
    assert report["machine"]["gpu"] is False
    found = {part["name"]: part for part in report["parts"]}
    assert "no GPU" in found["attention beside FlashInfer"]["output"]
    assert "no GPU" in found["CUDA graphs and torch.compile"]["output"]
    for program in ("ncu", "compute-sanitizer"):
        if not gpu_check.shutil.which(program):
            assert [part for part in found.values() if part["status"] == f"no {program}"]


def test_an_archive_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "one.whl").write_bytes(bytes(range(256)) * 64)
    out = tmp_path / "out.tar.gz"
    gpu_check.archive(out, [ROOT / "tools/gpu_check.py"], wheels)
    with tarfile.open(out) as tar:
        assert tar.getnames() == ["gpu_check/tools/gpu_check.py", "gpu_check/wheels/one.whl"]
    monkeypatch.setattr(gpu_check, "LIMIT", 1000)
    with pytest.raises(SystemExit, match="at most 1000 bytes"):
        gpu_check.archive(out, [ROOT / "tools/gpu_check.py"], wheels)
    assert not out.exists()
