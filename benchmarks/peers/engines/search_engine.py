"""Our beam search: policy and verifier on a forked cache, in one process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from serve import answer_lines
from tts_search import HFPolicy, HFVerifier, SearchConfig, search

Step = Callable[[], Any]
NEVER = "\x00\x00"  # no step ends before its limit


def main(checkpoint: str, dtype: str) -> None:
    policy = HFPolicy(checkpoint, dtype=dtype, kv_memory="2GiB")
    policy._eos = frozenset()  # every step runs to its limit
    verifier = HFVerifier(checkpoint, format="yes_no", dtype=dtype, kv_memory="2GiB")

    spent = {"policy": 0.0, "verifier": 0.0}

    def timed(name: str, step: Step) -> Step:
        def run() -> Any:
            begin = time.perf_counter()
            try:
                return step()
            finally:
                spent[name] += time.perf_counter() - begin

        return run

    policy.step = timed("policy", policy.step)  # type: ignore[method-assign]
    verifier.step = timed("verifier", verifier.step)  # type: ignore[method-assign]

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        config = SearchConfig(
            n=job["n"], expand=job["expand"], max_steps=job["rounds"], max_step_tokens=job["step_tokens"],
            delimiter=NEVER, seed=job["seed"],
        )  # fmt: skip
        spent.update(policy=0.0, verifier=0.0)
        begin = time.perf_counter()
        (result,) = search([job["problem"]], policy, verifier, config, progress=False)
        seconds = time.perf_counter() - begin
        stats = result.stats
        tokens = {"policy": stats.policy_prefill_tokens + stats.policy_tokens, "verifier": stats.verifier_tokens}
        return {"seconds": seconds, "generated": stats.policy_tokens, "forwarded": tokens, "spent": dict(spent)}

    answer_lines(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
