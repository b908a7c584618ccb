"""The examples in the docstrings of tts_search run and give the results that they show.

An example with a checkpoint of the hub is marked as skipped, for other programs that run docstrings. Here the
checkpoint is replaced by a demo model, or a small one with the vocabulary of a language.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import tts_search
from layouts import llama3_tokenizer, save
from tts_search.adapters.search_and_learn import SamplingParams
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate
from tts_search.models.decoder import KVPool
from tts_search.models.transformers import register
from tts_search.policies.hf import HFPolicy
from tts_search.verifiers.hf import HFVerifier

transformers = pytest.importorskip("transformers")

FOUND = [one.name for one in pkgutil.walk_packages(tts_search.__path__, "tts_search.") if not one.ispkg]
MODULES = ["tts_search", *(name for name in FOUND if not name.endswith("__main__"))]
# What no stand-in can be: a server, vLLM, a cluster, a framework of others.
ELSEWHERE = (
    "tts_search.policies.vllm",
    "tts_search.adapters.its_hub",
    "tts_search.evaluation.ray.on_ray",
    "tts_search.verifiers.execution",
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


class Checker(doctest.OutputChecker):
    """Takes whatever an example shows of which the docstring says nothing, such as what a model wrote."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an example may use without having made it."""
    policy, verifier = str(MODELS_DIR / "policy-0.1m"), str(MODELS_DIR / "prm-strong")
    language = tmp_path_factory.mktemp("models") / "llama"
    save(language, llama3_tokenizer(), "llama")
    register()
    options = {"dtype": "float32", "attn_implementation": "tts_kernels"}
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    inputs = tokenizer(["Start with 1, add 2."], return_tensors="pt", return_token_type_ids=False)
    return {
        "path": policy,
        "model": model,
        "inputs": {**inputs, "max_new_tokens": 4},
        "token_ids": inputs["input_ids"][0].tolist(),
        "problems": [one.problem for one in generate("test", 1, 1, 0)],
        "policy": HFPolicy(policy),
        "verifier": HFVerifier(verifier),
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "SamplingParams": SamplingParams,
        "KVPool": KVPool,
        "stand-ins": {"policy": policy, "language": str(language)},
    }


@pytest.fixture
def stand_ins(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Load a small model wherever an example names one of the hub."""
    paths = names["stand-ins"]

    def load(kind: type, path: str) -> Any:
        return lambda given, **options: kind(given if Path(given).is_dir() else path, **options)

    monkeypatch.setattr(tts_search, "HFPolicy", load(HFPolicy, paths["policy"]), raising=False)
    monkeypatch.setattr(tts_search, "HFVerifier", load(HFVerifier, paths["language"]), raising=False)
    labels = importlib.import_module("tts_search.verifiers.labels")
    monkeypatch.setattr(labels, "LocalLabels", load(labels.LocalLabels, paths["language"]))
    adapter = importlib.import_module("tts_search.adapters.search_and_learn")
    monkeypatch.setattr(adapter, "HFPolicy", load(HFPolicy, paths["policy"]), raising=False)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs {error.name}")
    runner = doctest.DocTestRunner(Checker(), optionflags=FLAGS)
    for test in doctest.DocTestFinder().find(module, extraglobs=names):
        for example in test.examples:
            if not test.name.startswith(ELSEWHERE):
                example.options.pop(doctest.SKIP, None)
        runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out
