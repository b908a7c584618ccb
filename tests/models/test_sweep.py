"""The page of models agrees with the results of the sweep."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_models", ROOT / "tools" / "sweep_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_some_types(tool: ModuleType) -> None:
    found = tool.sweep(["llama", "falcon", "mamba", "musicgen"])
    assert {kind: what for kind, (what, _) in found.items()} == {
        "llama": "followed", "falcon": "refused", "mamba": "refused", "musicgen": "not checked",
    }  # fmt: skip
    page = tool.table(found)
    assert "**Followed** (1): `llama`." in page
    assert "| `falcon` | its attention does not go through transformers' AttentionInterface |" in page


def test_the_page_has_every_type_once(tool: ModuleType) -> None:
    page = tool.PAGE.read_text(encoding="utf-8")
    table = page.partition(tool.BEGIN)[2].partition(tool.END)[0]
    if f"Of transformers {transformers.__version__}," not in table:
        pytest.skip("the page is about another version of transformers")
    assert all(table.count(f"`{kind}`") >= 1 for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_says_what_the_sweep_finds(tool: ModuleType) -> None:
    page = tool.PAGE.read_text(encoding="utf-8")
    if f"Of transformers {transformers.__version__}," not in page:
        pytest.skip("the page is about another version of transformers")
    for kind, (what, why) in tool.sweep(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)).items():
        line = f"| `{kind}` | " if what != "followed" else f"`{kind}`"
        assert line in page, (kind, what, why)
