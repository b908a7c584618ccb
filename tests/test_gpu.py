"""On a real GPU: the ops' own tests there, CUDA graphs, torch.compile, and whole searches against the CPU's.

``make test-gpu`` runs them, ``make test-gpu SANITIZE=1`` under compute-sanitizer.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tts_kernels as tk

GPU = torch.device("cuda")
HERE = Path(__file__).parent
OPS = ["step_scores", "aggregate_steps", "prune", "score_and_prune", "append_kv", "copy_pages", "tree_attention",
       "merge_states", "linear_logprob", "sample", "linear", "rms_norm", "rope_append", "swiglu",
       "decoder_layers"]  # fmt: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_the_tests_of_the_op_pass_on_the_gpu(op: str, backend: str) -> None:
    """The same cases and the same tolerances, in a process of their own."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    options = ["-p", "on_gpu", "--on-backend", backend, "-p", "no:cacheprovider", "--timeout=1200"]
    done = subprocess.run(
        [*sanitizer(), sys.executable, "-m", "pytest", *options, str(HERE / f"test_{op}.py")],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=HERE.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_row_of_linear_does_not_depend_on_its_company(quantize: Any, dtype: torch.dtype) -> None:
    x, weight = torch.randn(300, 2056, device=GPU).to(dtype), torch.randn(130, 2056, device=GPU).to(dtype)
    packed = tk.pack_linear(weight, quantize=quantize)
    with tk.deterministic(True):
        whole = tk.linear(x, packed)
        for rows in (1, 5, 16, 17, 64, 129):
            picked = torch.randperm(300, device=GPU)[:rows]
            assert torch.equal(tk.linear(x[picked], packed), whole[picked]), rows


def sanitizer() -> list[str]:
    """The command that compute-sanitizer is, if it was asked for: its errors become the exit status."""
    return ["compute-sanitizer", "--error-exitcode=9"] if os.environ.get("TTS_SANITIZE") == "1" else []


class Step:
    """One decode step's ops on tensors that stay: append, attend, score and prune, sample."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.forest = tk.KVForest(64)
        root = self.forest.add_root()
        self.forest.append([root], [100])
        self.branches = self.forest.fork([root] * 4)
        self.slots = self.forest.append(self.branches, [1] * 4).slots.to(GPU)
        self.heads: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "device": GPU}
        self.plan = self.forest.plan(self.branches, **self.heads)
        self.k, self.v = torch.randn(2, 64, 16, 2, 64, device=GPU, dtype=torch.bfloat16)
        self.q = torch.randn(4, 8, 64, device=GPU, dtype=torch.bfloat16)
        self.new = torch.randn(2, 4, 2, 64, device=GPU, dtype=torch.bfloat16)
        self.head = tk.ScoreHead.label_pair(torch.randn(512), torch.randn(512)).to(GPU)
        self.rows, self.groups = torch.arange(4, device=GPU), torch.tensor([0, 2, 4], device=GPU)
        self.ends = torch.arange(5, device=GPU)

    def run(self) -> tuple[Tensor, ...]:
        tk.append_kv_(self.k, self.v, *self.new, self.slots)  # type: ignore[call-arg]
        states = tk.tree_attention(self.q, self.k, self.v, self.plan).flatten(1)
        pruned = tk.score_and_prune(states, self.rows, self.ends, self.head, self.groups, 1)
        drawn = tk.sample(states.float(), temperature=0.7, top_p=0.9, seeds=self.rows, offsets=self.rows)
        return states, pruned.indices, pruned.candidate_scores, drawn.tokens

    def advance(self) -> None:
        """Another token in each branch, in the same buffers."""
        self.slots.copy_(self.forest.append(self.branches, [1] * 4).slots)
        self.forest.plan(self.branches, **self.heads, out=self.plan)
        self.q.normal_()
        self.new.normal_()


def assert_all_equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_a_captured_step_replays_on_refilled_buffers() -> None:
    step = Step()
    step.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    for _ in range(20):  # into the next page, too
        step.advance()
        graph.replay()
        assert_all_equal(captured, step.run())


def test_a_step_compiles_without_a_break() -> None:
    step = Step()
    compiled: Callable[[], tuple[Tensor, ...]] = torch.compile(step.run, fullgraph=True)
    assert_all_equal(compiled(), step.run())


@pytest.mark.parametrize("name", ["best_of_n", "beam_search", "dvts"])
def test_a_search_decides_as_on_the_cpu(name: str) -> None:
    """The models that come with the package, in float32; a draw that rounding flips is rare, but not impossible."""
    from tts_search import HFPolicy, HFVerifier, SearchConfig, search
    from tts_search.lab import MODELS_DIR
    from tts_search.lab.demo import make_tasks

    problems = [task.problem for task in make_tasks([2, 4], 4, seed=0)]

    def run(device: str) -> list[Any]:
        policy, verifier = (
            kind(str(MODELS_DIR / part), device=device, dtype="float32", kv_memory="64MiB")
            for kind, part in ((HFPolicy, "policy-3m"), (HFVerifier, "prm-strong"))
        )
        return search(problems, policy, verifier, SearchConfig(name, n=8, max_step_tokens=64), progress=False)

    same = [
        [(node.parent, node.text, node.state) for node in mine.tree.nodes]
        == [(node.parent, node.text, node.state) for node in theirs.tree.nodes]
        for mine, theirs in zip(run("cuda"), run("cpu"), strict=True)
    ]
    assert sum(same) >= len(same) - 1
