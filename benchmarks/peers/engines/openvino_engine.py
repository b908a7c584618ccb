"""openvino-genai: paged attention with continuous batching, n sequences of one request."""

from __future__ import annotations

import sys

import numpy as np
import openvino as ov
import openvino_genai as genai
from serve import Job, serve


def main(gguf: str, dtype: str) -> None:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB
    scheduler.max_num_seqs = 256
    scheduler.max_num_batched_tokens = 2048
    hints = {"INFERENCE_PRECISION_HINT": {"float32": "f32"}.get(dtype, dtype)} if dtype != "default" else {}
    pipeline = genai.LLMPipeline(gguf, "CPU", scheduler_config=scheduler, **hints)

    def run(job: Job) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens = job.tokens
        config.ignore_eos = True
        config.num_return_sequences = job.branches
        config.do_sample = job.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p, config.rng_seed = job.temperature, job.top_p, job.fresh
        prompt = ov.Tensor(np.array([job.prompt()], dtype=np.int64))
        return [list(tokens) for tokens in pipeline.generate(prompt, config).tokens]

    serve(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
