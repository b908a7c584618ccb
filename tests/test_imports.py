"""The search API stays thin: imports point down (the contracts are in pyproject.toml), and its core stays small."""

from __future__ import annotations

import ast
import tokenize
from pathlib import Path

import pytest

SEARCH = Path(__file__).parents[1] / "python" / "tts_search"
LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


def test_contracts(monkeypatch, capsys):
    cli = pytest.importorskip("importlinter.cli", reason="the extra lint is not installed")
    monkeypatch.chdir(Path(__file__).parents[1])
    status = cli.lint_imports(no_cache=True)
    assert status == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_the_core_is_small():
    files = [path for folder in ("search", "engine") for path in (SEARCH / folder).rglob("*.py")]
    assert len(files) > 30
    # the loops of other frameworks, told again, are no part of it
    assert sum(lines_of_code(path) for path in files if "peers" not in path.parts) < 3000


def test_a_name_is_one_thing():
    """No two modules define a public class, or a public alias of types, of the same name."""
    homes: dict[str, list[str]] = {}
    for path in sorted(SEARCH.rglob("*.py")):
        for name in types_of(ast.parse(path.read_text(encoding="utf-8"))):
            homes.setdefault(name, []).append(str(path.relative_to(SEARCH)))
    assert len(homes) > 200
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def types_of(module: ast.Module) -> list[str]:
    """The public names in CapWords that a module defines: classes and aliases."""
    defined = [node.name for node in module.body if isinstance(node, ast.ClassDef)]
    targets = [target for node in module.body if isinstance(node, ast.Assign) for target in node.targets]
    defined += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in defined if name[0].isupper() and name != name.upper()]


def test_lines_of_code(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""A module."""\n\n# a comment\ndef f(x):\n    """Doc.\n\n    More.\n    """\n    return (\n        x\n    )\n'
    )
    assert lines_of_code(path) == 4


def lines_of_code(path: Path) -> int:
    """Lines that are neither empty nor comments nor docstrings."""
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in LAYOUT]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)
