"""The package's metadata: one version, torch as its only requirement, the extras that the documents name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tts_kernels as tk

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version(project: dict) -> None:
    assert project["version"] == tk.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(tk.__version__)} ", changelog, re.MULTILINE)


def test_torch_is_all_that_it_requires(project: dict) -> None:
    assert project["dependencies"] == ["torch>=2.10"]


def test_extras(project: dict) -> None:
    assert {"search", "triton", "ray", "vllm", "dev", "docs"} <= set(project["optional-dependencies"])
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    named = {name for row in re.findall(r"^\| (`.*`) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named <= set(project["optional-dependencies"])


def test_a_wheel_has_the_demo_models(monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = pytest.importorskip("setuptools.config.pyprojecttoml")
    from setuptools import Distribution
    from setuptools.command.build_py import build_py

    monkeypatch.chdir(ROOT)
    whole = Distribution()
    pyproject.apply_configuration(whole, "pyproject.toml")
    command = build_py(whole)
    command.finalize_options()
    packed = {name for package, _, _, names in command.data_files if package == "tts_search" for name in names}
    folder = ROOT / "python" / "tts_search"
    models = {str(path.relative_to(folder)) for path in (folder / "lab" / "models").rglob("*") if path.is_file()}
    assert {f"lab/models/{name}/model.safetensors" for name in ("policy-0.1m", "prm-strong")} <= models <= packed


@pytest.mark.parametrize("package", ["tts_kernels", "tts_search"])
def test_imports_with_torch_alone(package: str) -> None:
    third = "transformers, tokenizers, safetensors, rich, typer, math_verify, matplotlib, datasets, ray, triton, vllm"
    code = f"""
import sys
for name in {third.split(", ")!r}:
    sys.modules[name] = None  # its import fails
import {package}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
