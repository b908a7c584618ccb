"""vLLM on a CPU: prefix caching, n sequences of one request."""

from __future__ import annotations

import os
import sys

from serve import Job, serve


def main(checkpoint: str, dtype: str, block_size: str) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GB
    os.environ.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", f"0-{int(os.environ['OMP_NUM_THREADS']) - 1}"
    )  # else one is idle
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=checkpoint, dtype=dtype, block_size=int(block_size), max_model_len=4096, max_num_seqs=256,
        enable_prefix_caching=True, disable_log_stats=True,
    )  # fmt: skip

    def run(job: Job) -> list[list[int]]:
        params = SamplingParams(
            n=job.branches, max_tokens=job.tokens, ignore_eos=True, detokenize=False,
            temperature=job.temperature, top_p=job.top_p if job.temperature > 0 else 1.0, seed=None,
        )  # fmt: skip
        [request] = llm.generate([{"prompt_token_ids": job.prompt()}], params, use_tqdm=False)
        return [list(output.token_ids) for output in request.outputs]

    serve(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
