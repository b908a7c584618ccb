"""Our engine: `HFPolicy.expand`, which is what a search calls for a step."""

from __future__ import annotations

import sys

from serve import Job, serve
from tts_search import HFPolicy, StepParams
from tts_search.models.meter import Meter
from tts_search.models.pool import Branch
from tts_search.policies import hf
from tts_search.search.protocol import Expand


def main(checkpoint: str, dtype: str) -> None:
    policy = HFPolicy(checkpoint, dtype=dtype, kv_memory="2GiB")
    policy._eos = frozenset()  # every continuation runs to its limit
    policy._whole_characters = lambda _, own: len(own)  # and is not cut back to whole characters there

    def run(job: Job) -> list[list[int]]:
        root = Branch(Meter(), tokens=job.prompt(), given=job.prefix)
        problem = hf._Problem(root, {0: hf._Node(root, "")})
        policy._problems[0] = problem
        children = tuple(range(1, job.branches + 1))
        seeds = tuple(1000 * job.fresh + child for child in children)
        params = StepParams(job.temperature, job.top_p, 0, job.tokens, None)
        policy.expand([Expand(0, 0, children, (), seeds, params)])
        continuations = [problem.nodes[child].branch.path()[job.prefix :] for child in children]
        policy.end(0)
        return continuations

    serve(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
