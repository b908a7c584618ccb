"""llama.cpp's fork: in a unified KV buffer a sequence's cells are given to other sequences, too."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import llama_cpp as llama
from serve import answer_lines

CHUNK = 2048
ROOM = 64  # cells for the tokens that each branch would get next


def main(gguf: str, threads: str) -> None:
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(gguf.encode(), llama.llama_model_default_params())

    def fork(job: dict[str, Any]) -> dict[str, Any]:
        """Seconds in which sequence 0 is given to all others, and seconds of as many calls that have nothing to do."""
        prefix, branches = job["prefix"], job["branches"]
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch = prefix + branches * ROOM, CHUNK
        params.n_seq_max, params.kv_unified = branches, True
        params.n_threads = params.n_threads_batch = int(threads)
        ctx = llama.llama_init_from_model(model, params)
        for begin in range(0, prefix, CHUNK):
            end = min(begin + CHUNK, prefix)
            tokens = (llama.llama_token * (end - begin))(*(100 + 7 * i % 40000 for i in range(begin, end)))
            if llama.llama_decode(ctx, llama.llama_batch_get_one(tokens, end - begin)):
                raise RuntimeError("llama_decode failed")
        memory, others = llama.llama_get_memory(ctx), range(1, branches)

        def seconds(copy: Callable[[int], None]) -> float:
            begin = time.perf_counter()
            for sequence in others:
                copy(sequence)
            return time.perf_counter() - begin

        forks, calls = [], []
        for _ in range(job["times"]):
            forks.append(seconds(lambda sequence: llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)))
            if any(llama.llama_memory_seq_pos_max(memory, sequence) != prefix - 1 for sequence in others):
                raise RuntimeError("a sequence does not have the tokens of sequence 0")
            for sequence in others:
                llama.llama_memory_seq_rm(memory, sequence, -1, -1)
            calls.append(seconds(lambda _: llama.llama_memory_seq_cp(memory, 0, 0, -1, -1)))
        llama.llama_free(ctx)
        return {"fork": statistics.median(forks), "calls": statistics.median(calls)}

    answer_lines(fork)


if __name__ == "__main__":
    main(*sys.argv[1:])
