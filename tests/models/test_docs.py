"""Every code block of the README and of docs/ runs, and the commands in shell blocks exist.

The Python blocks of a page run one after the other in one namespace, in an empty folder. Checkpoints of the hub are
replaced by small ones. A comment before a block says that another test runs it (``<!-- tested by FILE -->``), or that
it needs a package that is not installed everywhere (``<!-- needs PACKAGE -->``).
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from layouts import llama3_tokenizer, save
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate
from tts_search.lab.study import Grid, run_study
from tts_search.policies.hf import HFPolicy
from tts_search.search.protocol import Score
from tts_search.verifiers import FORMATS
from tts_search.verifiers.hf import HFVerifier

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON, SHELL = ("python",), ("sh", "bash", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block of code: where it is, what it says, and the comment before it."""

    page: Path
    line: int
    language: str
    text: str
    comment: str


def blocks(page: Path, languages: tuple[str, ...]) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    pattern = r"(?m)(?:^<!-- (.*) -->\n)?^```([\w+-]*)\n((?:.*\n)*?)^```$"
    found = (
        Block(page, text[: match.start(3)].count("\n"), match[2], match[3], match[1] or "")
        for match in re.finditer(pattern, text)
    )
    return [block for block in found if block.language in languages]


def named(pages: list[Path]) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


class StandIn:
    """Loads a small model wherever a page names a checkpoint that is not on this machine."""

    def __init__(self, load: type, path: Path, path_with_format: Path | None = None) -> None:
        self.load = load
        self.path = path
        self.path_with_format = path_with_format  # a given format needs the vocabulary of a language

    def __call__(self, path: str, **options: Any) -> Any:
        stand_in = self.path_with_format if "format" in options else self.path
        return self.load(path if Path(path).is_dir() else str(stand_in), **options)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What a page may use without having made it."""
    import tts_search

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FORMATS, "my_prm", FORMATS["yes_no"])  # taken back at the end
    llama = tmp_path / "my-prm-7b"
    save(llama, llama3_tokenizer(), "llama")
    monkeypatch.setattr(tts_search, "HFPolicy", StandIn(HFPolicy, MODELS_DIR / "policy-0.1m"), raising=False)
    monkeypatch.setattr(tts_search, "HFVerifier", StandIn(HFVerifier, MODELS_DIR / "prm-strong", llama), raising=False)
    problems = [one.problem for one in generate("test", 1, 2, 0)]
    return {"__name__": "docs", "path": str(llama), "instruction": "Judge.", "problems": problems}


def prepare(page: Path, names: dict[str, Any]) -> None:
    """Make the files that a page starts from."""
    if page.name == "study.md":
        grid = Grid(2, (1,), (1, 4, 16), None, policies=("policy-0.1m",), verifiers=("prm-strong",), seeds=(0, 1))
        for part in ("1/2", "2/2"):
            run_study(grid, "study-results", part=part, progress=False)
        names["policy"] = HFPolicy(str(MODELS_DIR / "policy-0.1m"))
        names["verifier"] = HFVerifier(str(MODELS_DIR / "prm-strong"))


def skip_reason(block: Block) -> str:
    """Why a block is not run here; empty if it is."""
    what, _, rest = block.comment.partition(" ")
    if what == "tested":
        test = ROOT / rest.removeprefix("by ")
        assert test.is_file(), f"{block.page.name}, line {block.line}: {test} is not there"
        return block.comment
    missing = [name for name in re.findall(r"[\w.]+", rest) if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(missing)}" if what == "needs" and missing else ""


@pytest.mark.parametrize("page", named([page for page in PAGES if blocks(page, PYTHON)]))
def test_python(page: Path, names: dict[str, Any]) -> None:
    own = [block for block in blocks(page, PYTHON) if not skip_reason(block)]
    if not own:
        pytest.skip("; ".join(skip_reason(block) for block in blocks(page, PYTHON)))
    prepare(page, names)
    for block in own:
        code = "\n" * block.line + block.text  # so that a traceback names the page's line
        exec(compile(code, str(page), "exec"), names)


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block; variables and comments apart."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s(?:&&|;|&|\|)(?:\s|$)", line):
            words = shlex.split(part, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield words


@pytest.mark.parametrize("page", named([page for page in PAGES if blocks(page, SHELL)]))
def test_shell(page: Path) -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    for block in blocks(page, SHELL):
        for program, *arguments in commands(block):
            where = f"{page.name}, line {block.line}: {program} {' '.join(arguments)}"
            if program == "make":
                assert {word for word in arguments if "=" not in word} <= targets, where
            elif program == "tts-search":
                check_options(arguments, where)
            elif program == "python" and arguments[0].endswith(".py"):
                assert (ROOT / arguments[0]).is_file(), where
            elif program == "python" and arguments[0] == "-m":
                assert importlib.util.find_spec(arguments[1]), where
            else:
                assert program in ("cmake", "ctest", "ray") or shutil.which(program), where


def check_options(arguments: list[str], where: str) -> None:
    """Every option of a call of tts-search is one that its command has."""
    import typer
    from tts_search.cli.serving import app

    command = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= known, where


@pytest.mark.parametrize("page", named(PAGES))
def test_languages_are_known(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"(?m)^```(.*)$", text)[::2]
    assert set(fences) <= {*PYTHON, *SHELL, "", "{eval-rst}", "{toctree}"} | {
        fence for fence in fences if fence.startswith("{include}")
    }


def test_a_new_format_in_ten_lines(names: dict[str, Any]) -> None:
    page = ROOT / "docs" / "verifiers.md"
    (block,) = [one for one in blocks(page, PYTHON) if "register_format(" in one.text]
    entry = block.text.partition("    VerifierFormat(\n")[2].partition("    )\n")[0]
    assert len(entry.splitlines()) <= 10
    exec(block.text, names)
    verifier = names["verifier"]
    assert verifier.format is FORMATS["my_prm"]
    verifier.begin(0, "Which?")
    (scores,) = verifier.score([Score(0, 1, ("one\n\n", "two"), 0)])
    assert len(scores) == 2
    assert all(0 < score < 1 for score in scores)


def test_every_format_is_in_the_table() -> None:
    text = (ROOT / "docs" / "verifiers.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)) == set(FORMATS)
