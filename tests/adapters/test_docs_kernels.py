"""The search in docs/kernels.md, which uses only tts_kernels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate

DOCS = Path(__file__).parents[2] / "docs"


def code_of(page: str, test: str) -> list[str]:
    """The Python blocks of a page that it says a test runs."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(rf"<!-- tested by tests/adapters/{test} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found
    return found


def test_a_search_in_fifty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    (code,) = code_of("kernels.md", "test_docs_kernels.py")
    search = code.partition("tokenizer = ")[0]
    assert len([line for line in search.splitlines() if line.strip()]) <= 51  # imports apart
    assert "tts_search" not in code
    problem = generate("test", 2, 1, seed=3)[0]
    names: dict[str, Any] = {
        "POLICY": str(MODELS_DIR / "policy-3m"), "PRM": str(MODELS_DIR / "prm-strong"), "PROBLEM": problem.problem,
    }  # fmt: skip
    exec(code, names)
    assert capsys.readouterr().out.rstrip().endswith(f"\\boxed{{{problem.answer}}}.")
    assert 0.5 < names["score"] <= 1
    for lane in (names["policy"], names["prm"]):  # the prompt, and what the beam added to it, once
        stats = lane.forest.stats()
        assert stats.branches == len(lane.beam) == 16
        assert stats.unique_tokens < stats.logical_tokens / 2
        lane.forest.free(lane.beam)
        assert lane.forest.stats().pages_free == lane.forest.num_pages
