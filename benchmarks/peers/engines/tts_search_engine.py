"""Our engine: a request for N texts after a prompt. The prompt is read once and then forked."""

from __future__ import annotations

import sys

from serve import Job, serve
from tts_search import Engine, HFPolicy
from tts_search.search.protocol import Generate, GenerateParams


def main(checkpoint: str, dtype: str, quantize: str = "none") -> None:
    policy = HFPolicy(
        checkpoint, dtype=dtype, kv_memory="2GiB", quantize={"none": None, "int8": "int8", "int4": "int4"}[quantize]
    )
    with Engine(policy) as engine:

        def run(job: Job) -> list[list[int]]:
            params = GenerateParams(job.temperature, job.top_p, max_tokens=job.tokens, ignore_eos=True, stream=False)
            seeds = tuple(1000 * job.fresh + number for number in range(job.branches))
            samples = engine.generate(Generate(tuple(job.prompt()), params, job.branches, seeds)).result()
            return [list(sample.tokens) for sample in samples]

        serve(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
