"""llama.cpp: one KV buffer, the prompt's cells given to every sequence, one batch for each step."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as llama
from serve import Job, serve

THREADS = 2


def main(gguf: str) -> None:
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(gguf.encode(), llama.llama_model_default_params())

    def context(job: Job) -> ctypes.c_void_p:
        params = llama.llama_context_default_params()
        params.n_ctx = job.prefix + job.branches * (job.tokens + 1) + 64
        params.n_batch = 2048
        params.n_seq_max = job.branches
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = THREADS
        return llama.llama_init_from_model(model, params)

    def sampler(job: Job, number: int) -> ctypes.c_void_p:
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        if job.temperature == 0:
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_greedy())
            return chain
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(job.temperature))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_top_p(job.top_p, 1))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(1000 * job.fresh + number))
        return chain

    def decode(ctx: ctypes.c_void_p, entries: list[tuple[int, int, int, bool]]) -> None:
        """One batch of (token, position, sequence, whether its logits are wanted)."""
        batch = llama.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if llama.llama_decode(ctx, batch):
            raise RuntimeError("llama_decode failed")
        llama.llama_batch_free(batch)

    def run(job: Job) -> list[list[int]]:
        ctx, samplers = context(job), [sampler(job, number) for number in range(job.branches)]
        prompt = job.prompt()
        for begin in range(0, job.prefix, 2048):
            chunk = prompt[begin : begin + 2048]
            decode(ctx, [(t, begin + i, 0, begin + i == job.prefix - 1) for i, t in enumerate(chunk)])
        memory = llama.llama_get_memory(ctx)
        for sequence in range(1, job.branches):
            llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        continuations = [[int(llama.llama_sampler_sample(each, ctx, -1))] for each in samplers]
        for position in range(job.prefix, job.prefix + job.tokens - 1):
            decode(ctx, [(own[-1], position, sequence, True) for sequence, own in enumerate(continuations)])
            for sequence, own in enumerate(continuations):
                own.append(int(llama.llama_sampler_sample(samplers[sequence], ctx, sequence)))
        for each in samplers:
            llama.llama_sampler_free(each)
        llama.llama_free(ctx)
        return continuations

    serve(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
