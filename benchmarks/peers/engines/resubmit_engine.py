"""Beam search as search-and-learn does it.

In each round the whole text of every beam is sent to vLLM (with prefix caching), which answers with one step, and to a
verifier. This is a transformers model, which reads the text from the start, in batches of 4, and computes the logits of
all its tokens, as in search-and-learn. Or ("vllm") it is the fastest that a user could use instead: vLLM again, whose
prefix cache has the beams of the round before, and which returns only the log-probabilities of the next token.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
from serve import answer_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 4  # search-and-learn's prm_batch_size
QUESTION = (
    "Problem:\n{problem}\n\nSolution so far:\n{steps}\n\nIs every step of this solution so far correct? "
    "Answer with Yes or No."
)


def main(checkpoint: str, dtype: str, block_size: str, verifier: str) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{int(os.environ['OMP_NUM_THREADS']) - 1}")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=checkpoint, dtype=dtype, block_size=int(block_size), max_model_len=4096, max_num_seqs=256,
        enable_prefix_caching=True, disable_log_stats=True, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prm = None
    if verifier == "transformers":
        prm = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    labels = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")]
    forwarded = {"policy": 0, "verifier": 0}

    def chat(text: str) -> str:
        message = [{"role": "user", "content": text}]
        rendered: str = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return rendered

    asked = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, allowed_token_ids=labels)

    def score_by_vllm(problem: str, texts: list[str]) -> list[float]:
        prompts = [chat(QUESTION.format(problem=problem, steps=text)) for text in texts]
        scores = []
        for request in llm.generate(prompts, asked, use_tqdm=False):
            forwarded["verifier"] += len(request.prompt_token_ids) - (request.num_cached_tokens or 0)
            found = request.outputs[0].logprobs[0]
            scores.append(torch.tensor([found[label].logprob for label in labels]).softmax(-1)[0].item())
        return scores

    @torch.inference_mode()
    def score_by_transformers(problem: str, texts: list[str]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(texts), BATCH):
            batch = [chat(QUESTION.format(problem=problem, steps=text)) for text in texts[start : start + BATCH]]
            inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=False)
            logits = prm(**inputs).logits  # [B, T, V], as search-and-learn's verifiers
            scores += logits[:, -1, labels].float().softmax(-1)[:, 0].tolist()
            forwarded["verifier"] += inputs["input_ids"].numel()
        return scores

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        n, tokens = job["n"], job["step_tokens"]
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.8, top_p=1.0)
        forwarded.update(policy=0, verifier=0)
        prompt, texts, generated = chat(job["problem"]), [""] * n, 0
        spent = {"policy": 0.0, "verifier": 0.0}
        begin = time.perf_counter()
        for _ in range(job["rounds"]):
            start = time.perf_counter()
            requests = llm.generate([prompt + text for text in texts], params, use_tqdm=False)
            steps = [request.outputs[0] for request in requests]
            generated += sum(len(step.token_ids) for step in steps)
            forwarded["policy"] += sum(
                len(request.prompt_token_ids) - (request.num_cached_tokens or 0) + len(step.token_ids)
                for request, step in zip(requests, steps, strict=True)
            )
            texts = [text + step.text for text, step in zip(texts, steps, strict=True)]
            middle = time.perf_counter()
            scores = (score_by_transformers if prm else score_by_vllm)(job["problem"], texts)
            spent["policy"] += middle - start
            spent["verifier"] += time.perf_counter() - middle
            kept = sorted(sorted(range(n), key=lambda index: -scores[index])[: n // job["expand"]])
            texts = [texts[kept[index % len(kept)]] for index in range(n)]
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "generated": generated, "forwarded": dict(forwarded), "spent": spent}

    answer_lines(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
