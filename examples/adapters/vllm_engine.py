"""A search whose policy runs in vLLM and whose verifier on our kernels, in one process::

    python examples/adapters/vllm_engine.py POLICY PRM --n 16

Both with prefix caching in vLLM and without: what the policy reads again, and the time.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from typing import Any


def main() -> None:
    from tts_search.lab import MODELS_DIR

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", nargs="?", default=str(MODELS_DIR / "policy-3m"))
    parser.add_argument("verifier", nargs="?", default=str(MODELS_DIR / "prm-strong"))
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--without-cache", action="store_true", help="a second search without prefix caching")
    args = parser.parse_args()

    # vLLM's engine in this process; on a CPU, a pool of 1 GB and one thread, so that the verifier has the others.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")
    from tts_search import HFVerifier, SearchConfig, search
    from tts_search.lab.arithmetic import generate
    from tts_search.policies.vllm import VLLMPolicy

    problems = generate("test", 3, args.problems, seed=5)
    config = SearchConfig("beam_search", n=args.n, expand=4, max_steps=12, max_step_tokens=48, seed=3)
    verifier = HFVerifier(args.verifier)
    for caching in (True, False) if args.without_cache else (True,):
        options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": 32}
        policy = VLLMPolicy(args.policy, enable_prefix_caching=caching, **options)
        start = time.perf_counter()
        results = search([problem.problem for problem in problems], policy, verifier, config)
        seconds = time.perf_counter() - start
        right = sum(result.answer() == problem.answer for result, problem in zip(results, problems, strict=True))
        total = sum((result.stats for result in results[1:]), results[0].stats)
        print(
            f"prefix caching {'on' if caching else 'off'}: {right} of {len(problems)} right, {seconds:.1f} s; the "
            f"policy sampled {total.policy_tokens} tokens, read {total.policy_prefill_tokens} of prompts and "
            f"{total.recomputed_tokens} again; the verifier read {total.verifier_tokens}",
            flush=True,
        )
        del policy
        gc.collect()


if __name__ == "__main__":
    main()
