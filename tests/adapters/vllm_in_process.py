"""The script that test_vllm_policy.py runs if vLLM is installed. It prints what VLLMPolicy did, as one line of JSON."""

from __future__ import annotations

import json
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")

import vllm
from tts_search import HFVerifier, SearchConfig, best_of_n, search
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate
from tts_search.policies.vllm import VLLMPolicy
from tts_search.search.protocol import Expand
from tts_search.search.types import StepParams


def grow(policy: VLLMPolicy, problem: str) -> dict[str, object]:
    """A greedy branch, step by step; what it read."""
    params = StepParams(temperature=0.0, max_tokens=48)
    policy.begin(0, problem)
    steps: list[str] = []
    reasons: list[str] = []
    for branch in range(20):
        (answer,) = policy.expand([Expand(0, branch, (branch + 1,), tuple(steps), (0,), params)])
        if isinstance(answer, Exception):
            raise answer
        steps.append(answer[0].text)
        reasons.append(answer[0].reason)
        if answer[0].finished:
            break
        policy.release(0, [branch])
    usage = policy.end(0)
    return {"steps": steps, "reasons": reasons, "again": usage.recomputed_tokens, "sampled": usage.tokens}


def main() -> None:
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "block_size": 32,
        "max_num_batched_tokens": 1024,
    }
    policy = VLLMPolicy(str(MODELS_DIR / "policy-3m"), **engine)
    problems = generate("test", 3, 6, seed=5)
    texts = [problem.problem for problem in problems]
    branch = grow(policy, texts[0])
    prompt = {"prompt_token_ids": policy._encode(policy._prompt(texts[0]))}
    whole = policy.engine.generate([prompt], vllm.SamplingParams(temperature=0.0, max_tokens=400), use_tqdm=False)
    verifier = HFVerifier(str(MODELS_DIR / "prm-strong"))
    config = SearchConfig("beam_search", n=8, expand=4, max_steps=12, max_step_tokens=48, seed=3)
    results, again = (search(texts, policy, verifier, config, progress=False) for _ in range(2))
    (sampled,) = best_of_n(texts[:1], policy, None, n=4, max_step_tokens=6, progress=False)
    policy.begin(0, "long " * 2000)
    (error,) = policy.expand([Expand(0, 0, (1,), (), (0,), StepParams())])
    report = {
        "branch": branch,
        "whole": whole[0].outputs[0].text,
        "right": sum(r.answer() == p.answer for r, p in zip(results, problems, strict=True)),
        "problems": len(problems),
        "finished": all(c.finished for r in results for c in r.completions),
        "repeats": [r.best.text for r in results] == [r.best.text for r in again],
        "cut": [c.finished for c in sampled.completions],
        "error": f"{type(error).__name__}: {error}",
        "logprobs": all(isinstance(n.scores, tuple) for r in results for n in r.tree.nodes),
    }
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
