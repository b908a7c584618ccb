"""transformers: one prefill, its cache repeated for every branch, sampling by its own logits processors."""

from __future__ import annotations

import sys

import torch
from serve import Job, serve
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper


def main(checkpoint: str, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()

    def choose(logits: torch.Tensor, job: Job) -> torch.Tensor:
        if job.temperature == 0:
            return logits.argmax(-1)
        logits = TopPLogitsWarper(job.top_p)(None, TemperatureLogitsWarper(job.temperature)(None, logits.float()))
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]

    @torch.inference_mode()
    def run(job: Job) -> list[list[int]]:
        cache = DynamicCache(config=model.config)
        logits = model(torch.tensor([job.prompt()]), past_key_values=cache, logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(job.branches)
        tokens = [choose(logits.repeat(job.branches, 1), job)]
        while len(tokens) < job.tokens:
            logits = model(tokens[-1][:, None], past_key_values=cache, logits_to_keep=1).logits[:, -1]
            tokens.append(choose(logits, job))
        continuations: list[list[int]] = torch.stack(tokens, 1).tolist()
        return continuations

    serve(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
