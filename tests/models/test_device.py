"""Searches on ``device="cuda"`` without a GPU: the device of tensors, and how often the host waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import CUDA, GpuTensor, HostWaitError, PretendGpu
from test_local_search import PROBLEMS, READING, assert_same
from tiny import save_checkpoint, talkative, tiny_model
from tts_search import HFPolicy, HFVerifier, SearchConfig, SearchError, search
from tts_search.models.device import read_scores, read_tokens, upload
from tts_search.models.generation import SampledStreams
from tts_search.verifiers.jobs import HeadScorer
from tts_search.verifiers.log_ratio import LogRatioScorer

import tts_kernels as tk

CONFIG = SearchConfig(n=4, expand=2, max_steps=3, max_step_tokens=8, lookahead=1)
LOG_RATIO = {"head": "log_ratio", "prompt": "{problem}{steps}", "boundary": "<|step|>"}
ASKED = {
    "head": "label_pair",
    "score_at": "closing",
    "prompt": "<|user|>{problem}{steps}",
    "labels": ["Yes", "No"],
    "judge": {"question": "<|user|>Is it right?<|assistant|>", "decision": "\n\n", "samples": 2, "max_tokens": 5},
}
# Policy, verifier, its format, and its reference model.
MODELS: dict[str, tuple[str, str, dict[str, Any], str | None]] = {
    "lean decoders": ("llama", "qwen2", READING, None),
    "transformers": ("gemma2", "qwen2", READING, None),
    "log ratio": ("qwen3", "llama", LOG_RATIO, "qwen2"),
    "judge": ("llama", "llama", ASKED, None),
}


def run(folder: Path, models: tuple[str, str, dict[str, Any], str | None], device: str, **options: Any) -> list[Any]:
    """Policy, verifier and results of a search on a device."""
    kind, other, form, reference = models
    paths = [folder / name for name in ("policy", "verifier", "reference")]
    if not paths[0].exists():
        save_checkpoint(paths[0], talkative(tiny_model(kind)))
        save_checkpoint(paths[1], tiny_model(other, seed=3), verifier=form)
        save_checkpoint(paths[2], tiny_model(reference or other, seed=4))
    gpu = options.pop("gpu", None)
    policy = HFPolicy(str(paths[0]), kv_memory="4MiB", device=device)
    verifier = HFVerifier(
        str(paths[1]), kv_memory="4MiB", device=device, reference=str(paths[2]) if reference else None, **options
    )
    if gpu is not None:
        gpu.watches = True
        for pool in (policy._pool, verifier._pool):
            pool.graphs = None  # there is nothing here to record with
    return [policy, verifier, search(PROBLEMS, policy, verifier, CONFIG, progress=False)]


@pytest.mark.parametrize("name", MODELS)
def test_a_search_on_a_gpu_waits_once_a_token_and_at_most_once_a_round(name: str, tmp_path: Path) -> None:
    options = {"decoder": "transformers"} if name == "transformers" else {}
    *_, wanted = run(tmp_path, MODELS[name], "cpu", **options)
    calls: dict[str, int] = {"sample": 0, "score": 0}

    def counted(name: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return call(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch, PretendGpu(watches=False) as gpu:
        patch.setattr(tk, "sample", counted("sample", tk.sample))
        for scorer, method in ((HeadScorer, "score"), (HeadScorer, "score_and_prune"), (LogRatioScorer, "score")):
            patch.setattr(scorer, method, counted("score", getattr(scorer, method)))
        policy, verifier, found = run(tmp_path, MODELS[name], "cuda", gpu=gpu, **options)
    assert_same(found, wanted)
    assert {tensor.device for pool in (policy._pool, verifier._pool) for tensor in pool.pool.kv.k} == {CUDA}
    assert gpu.waits == {"read_tokens": calls["sample"], "read_scores": calls["score"]}
    assert calls["sample"] > 20
    rounds = [result.stats.rounds for result in found]
    assert max(rounds) <= calls["score"] <= sum(rounds)
    assert gpu.uploads > 5 * calls["sample"]


def test_a_round_in_many_forwards_waits_once(tmp_path: Path) -> None:
    """However few tokens fit a forward of the verifier."""
    with PretendGpu(watches=False) as gpu:
        *_, found = run(tmp_path, MODELS["lean decoders"], "cuda", gpu=gpu, batch_tokens=16)
    rounds = [result.stats.rounds for result in found]
    assert max(rounds) <= gpu.waits["read_scores"] <= sum(rounds)


PLANTED = {
    "item": lambda logits: logits[0, 0].item(),
    "tolist": lambda logits: logits.tolist(),
    "cpu": lambda logits: logits.cpu(),
    "to": lambda logits: logits.to("cpu", non_blocking=True),
    "numpy": lambda logits: logits.numpy(),
    "bool": lambda logits: bool(logits.isnan().any()),
    "int": lambda logits: int(logits[0, 0]),
    "float": lambda logits: float(logits[0, 0]),
    "range": lambda logits: range(logits.argmax()),
    "in": lambda logits: 0.0 in logits,
    "nonzero": lambda logits: (logits > 0).nonzero(),
    "mask": lambda logits: logits[logits > 0],
    "where to write": lambda logits: logits.__setitem__(logits > 0, 0.0),
    "copy": lambda logits: torch.empty(logits.shape).copy_(logits),
    "pageable memory": lambda logits: logits + torch.ones(1).to(logits.device, non_blocking=True),
    "blocking upload": lambda logits: logits + torch.ones(1).pin_memory().to(logits.device),
    "tensor of numbers": lambda logits: logits + torch.tensor([1.0], device=logits.device),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_wait_is_found(name: str) -> None:
    logits = torch.randn(3, 5)
    with PretendGpu(), pytest.raises((HostWaitError, RuntimeError), match=r"Tensor\.|host|device"):
        PLANTED[name](GpuTensor(logits))


def test_a_planted_wait_fails_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SampledStreams._draw

    def curious(generation: SampledStreams, forwarded: Any) -> Any:
        assert bool(torch.isfinite(forwarded.outputs).all())
        return plain(generation, forwarded)

    monkeypatch.setattr(SampledStreams, "_draw", curious)
    with PretendGpu(watches=False) as gpu, pytest.raises(SearchError, match=r"HostWaitError: Tensor\.__bool__"):
        run(tmp_path, MODELS["lean decoders"], "cuda", gpu=gpu)


def test_tensors_of_two_devices_do_not_meet() -> None:
    with PretendGpu():
        there, here = upload(torch.ones(2), CUDA), torch.ones(2)
        assert (there + torch.tensor(1.0)).device == CUDA  # a number may come from anywhere
        with pytest.raises(RuntimeError, match="two devices"):
            there + here
        with pytest.raises(ValueError, match="weight: expected a tensor on cuda:0"):
            tk.rms_norm(there[None], here, 1e-5)


def test_reads_give_values_and_wait_once() -> None:
    with PretendGpu() as gpu:
        tokens, logprobs = (upload(t, CUDA) for t in (torch.tensor([4, 2**40]), torch.tensor([-0.5, -1.5])))
        drawn = read_tokens(tk.Sampled(tokens, logprobs))
        assert [column.tolist() for column in drawn] == [[4, 2**40], [-0.5, -1.5]]
        assert read_scores(logprobs, tokens, tokens > 4) == [[-0.5, -1.5], [4, 2**40], [False, True]]
    assert gpu.waits == {"read_tokens": 1, "read_scores": 1}
    assert upload(torch.ones(1), torch.device("cpu")).device.type == "cpu"


def test_plans_are_refilled_from_pinned_memory() -> None:
    forest = tk.KVForest(64)
    root = forest.add_root()
    forest.append([root], [40])
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    with PretendGpu() as gpu:
        plan = forest.plan([root], **heads, device="cuda")
        address = plan.pages.data_ptr()
        forest.append([root], [1])
        assert forest.plan([root], **heads, out=plan) is plan
        assert plan.positions.values_.tolist() == [40]  # type: ignore[attr-defined]
        assert plan.pages.data_ptr() == address
    assert gpu.uploads == 2
