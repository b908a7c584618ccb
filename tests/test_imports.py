"""Imports point down, and no two modules import each other: the contracts stand in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_contracts(monkeypatch, capsys):
    cli = pytest.importorskip("importlinter.cli", reason="the extra lint is not installed")
    monkeypatch.chdir(Path(__file__).parents[1])
    status = cli.lint_imports(no_cache=True)
    assert status == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out
