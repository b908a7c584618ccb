"""Searches in few bits, compared with the model's dtype and with another seed.

    python benchmarks/few_bits_search.py --kv int8 int4 [--count 60] [--n 64] [--write NAME]      # keys and values
    python benchmarks/few_bits_search.py --weights int8 int4 [--count 60] [--n 16] [--write NAME]
    python benchmarks/few_bits_search.py --kv int8 --policy PATH --verifier PATH --format yes_no --tasks FILE --limit 40

Without --tasks: the demo's problems, its smallest policy and its strong verifier. Policy and verifier have the same
form. The seed fixes the draws, so a result differs only if rounding changed a draw, or changed which candidates
survive. The last row shows how much such differences matter: the same search in the model's dtype with other draws.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import record
from tts_search import HFPolicy, HFVerifier, SearchConfig, SearchResult, search
from tts_search.domains.mathematics import equivalent
from tts_search.evaluation.tasks import Task, load_tasks
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import LEVELS
from tts_search.lab.demo import CONFIG, make_tasks
from tts_search.models.decoder import KvDtype
from tts_search.search.answers import boxed

Tokens = Callable[[str], int]


def results(
    options: argparse.Namespace, tasks: Sequence[Task], config: SearchConfig, **form: Any
) -> list[SearchResult]:
    """The searches of all problems, both models loaded in a form."""
    policy = HFPolicy(options.policy, system_prompt=options.system_prompt, **form)
    verifier = HFVerifier(options.verifier, format=options.format, **form)
    problems = [task.problem for task in tasks]
    return search(problems, policy, verifier, config, extract_answer=answer_of, progress=False)


def answer_of(text: str) -> str | None:
    """What stands in the box; of a model that draws none, the last number."""
    return boxed(text) or next(iter(re.findall(r"-?\d+(?:\.\d+)?", text)[::-1]), None)


def first_difference(one: SearchResult, other: SearchResult, count: Tokens) -> tuple[int, int] | None:
    """The first round with another candidate, and the tokens of its answer that are the same; None if there is none."""
    found = [
        (mine.round, count(_common(_text(one, mine.id), _text(other, theirs.id))))
        for mine, theirs in zip(one.tree.nodes, other.tree.nodes, strict=False)  # the longer one differs before its end
        if (mine.round, mine.parent, mine.text) != (theirs.round, theirs.parent, theirs.text)
    ]
    return min(found, default=None)


def _text(result: SearchResult, node: int) -> str:
    """The answer up to a node."""
    parts, at = [], result.tree.nodes[node]
    while at.parent is not None:
        parts.append(at.text)
        at = result.tree.nodes[at.parent]
    return "".join(reversed(parts))


def _common(one: str, other: str) -> str:
    """What both begin with."""
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def compare(
    tasks: Sequence[Task], found: Sequence[SearchResult], plain: Sequence[SearchResult], count: Tokens
) -> dict[str, record.Cell]:
    """The cells of a row."""
    share = 100 / len(tasks)
    right = sum(equivalent(one.answer(), task.answer) for one, task in zip(found, tasks, strict=True))
    pairs = list(zip(found, plain, strict=True))
    same = sum(one.answer() == other.answer() or equivalent(one.answer(), other.answer()) for one, other in pairs)
    differences = [first_difference(one, other, count) for one, other in pairs]
    moved = [each for each in differences if each is not None]
    return {
        "answered, %": round(share * sum(bool(one.answer()) for one in found), 1),
        "right, %": round(share * right, 1),
        "same answer, %": round(share * same, 1),
        "same tree, %": round(share * (len(tasks) - len(moved)), 1),
        "first other round, median": statistics.median(round_ for round_, _ in moved) if moved else None,
        "same tokens before, median": statistics.median(tokens for _, tokens in moved) if moved else None,
        "peak KV, KiB": round(statistics.mean(one.stats.peak_kv_bytes for one in found) / 1024),
    }


def main() -> None:
    """Print a row for each kind of keys and values, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(MODELS_DIR / "policy-0.1m"))
    parser.add_argument("--system-prompt", help="of the policy")
    parser.add_argument("--verifier", default=str(MODELS_DIR / "prm-strong"))
    parser.add_argument("--format", default="auto")
    parser.add_argument("--tasks", help="a file of problems with answers; else the demo's")
    parser.add_argument("--limit", type=int, default=40, help="problems of the file")
    parser.add_argument("--count", type=int, default=60, help="problems of each level of the demo's")
    parser.add_argument("--method", default="beam_search")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=CONFIG.max_tokens)
    forms = parser.add_mutually_exclusive_group(required=True)
    forms.add_argument("--kv", nargs="+", default=[], choices=get_args(KvDtype))
    forms.add_argument("--weights", nargs="+", default=[], choices=["int8", "int4"])
    parser.add_argument("--write", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    tasks = list(load_tasks(options.tasks))[: options.limit] if options.tasks else make_tasks(LEVELS, options.count, 0)
    base = CONFIG if options.tasks is None else SearchConfig()
    config = replace(base.with_method(options.method, n=options.n), max_tokens=options.max_tokens)
    plain = results(options, tasks, config)
    tokenizer = HFPolicy(options.policy, self_test=False).tokenizer

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    column = "weights" if options.weights else "kv"
    rows: dict[str, dict[str, record.Cell]] = {}

    def enter(name: str, found: Sequence[SearchResult]) -> None:
        rows[name] = {column: name, **compare(tasks, found, plain, count)}
        print(rows[name], flush=True)

    enter("bfloat16", plain)
    for kind in options.kv:
        enter(kind, results(options, tasks, config, kv_dtype=kind))
    for kind in options.weights:
        enter(kind, results(options, tasks, config, quantize=kind))
    enter("bfloat16, other draws", results(options, tasks, replace(config, seed=1)))
    if options.write:
        titles = " with ".join(Path(path).name for path in (options.policy, options.verifier))
        record.write(
            options.write,
            what=f"{titles}, {options.method}, n = {options.n}: {len(tasks)} problems of "
            f"{Path(options.tasks).stem if options.tasks else 'the demo'}",
            command=f"python benchmarks/few_bits_search.py {shlex.join(map(record.hidden, sys.argv[1:]))}",
            beside="other work (what is found does not depend on it)",
            tables={"search": rows},
            packages=("torch", "transformers"),
        )


if __name__ == "__main__":
    main()
