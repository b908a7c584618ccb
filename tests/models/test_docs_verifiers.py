"""The format that docs/verifiers.md adds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from layouts import llama3_tokenizer, save
from tts_search.protocol import Score
from tts_search.verifiers import FORMATS

DOCS = Path(__file__).parents[2] / "docs" / "verifiers.md"


def test_a_new_format_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"test_docs_verifiers.py -->\n```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    entry = code[1].partition("    VerifierFormat(\n")[2].partition("    )\n")[0]
    assert len(entry.splitlines()) <= 10
    monkeypatch.setitem(FORMATS, "my_prm", FORMATS["yes_no"])  # taken back at the end
    save(tmp_path / "my-prm-7b", llama3_tokenizer(), "llama")
    names = {"path": str(tmp_path / "my-prm-7b")}
    exec(code[1], names)
    verifier = names["verifier"]
    assert verifier.format is FORMATS["my_prm"]
    verifier.begin(0, "Which?")
    (scores,) = verifier.score([Score(0, 1, ("one\n\n", "two"), 0)])
    assert len(scores) == 2
    assert all(0 < score < 1 for score in scores)


def test_every_format_is_in_the_table() -> None:
    table = set(re.findall(r"^\| `([\w.]+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    assert table == set(FORMATS)
