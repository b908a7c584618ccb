"""search-and-learn's own searches on our policy and verifier, and the functions that replace them.

git clone https://github.com/huggingface/search-and-learn
python examples/adapters/with_search_and_learn.py search-and-learn/src
"""

from __future__ import annotations

import argparse
from types import ModuleType, SimpleNamespace
from typing import Any

from source import add_source
from tts_search.adapters import search_and_learn as adapter
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate

# The demo models know no system message; for models that do, leave this out.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MISSING = ("accelerate", "datasets", "latex2sympy2", "pebble", "tqdm", "word2number")


def config_of(approach: str, n: int, **options: Any) -> SimpleNamespace:
    """What its Config has, as far as a search reads it."""
    config = {
        "approach": approach, "n": n, "beam_width": 4, "n_beams": n // 4, "num_iterations": 16, "lookahead": 0,
        "temperature": 0.8, "top_p": 1.0, "max_tokens": 400, "agg_strategy": "last", "seed": 42,
        "filter_duplicates": False, "sort_completed": False, "system_prompt": "", "custom_chat_template": TEMPLATE,
    }  # fmt: skip
    return SimpleNamespace(**{**config, **options})


def theirs(source: str) -> ModuleType:
    """Its package `sal.search`, from a folder of its source."""
    adapter.stand_in_for_vllm()
    add_source(source, MISSING)
    from sal import search

    return search


def run(searches: ModuleType, approach: str, llm: Any, prm: Any, problems: list[str], n: int) -> dict[str, list[Any]]:
    """Search; its beam search takes one problem at a time."""
    config = config_of(approach, n)
    batches = [[problem] for problem in problems] if approach == "beam_search" else [problems]
    if searches is adapter:
        batches = [problems]
    results = [getattr(searches, approach)({"problem": batch}, config, llm, prm) for batch in batches]
    return {name: [row for result in results for row in result[name]] for name in ("completions", "pred", "scores")}


def main() -> None:
    """Run all three searches in both ways and compare what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the folder src of a checkout of search-and-learn")
    parser.add_argument("--problems", type=int, default=6)
    parser.add_argument("--n", type=int, default=16)
    args = parser.parse_args()
    searches = theirs(args.source)
    llm = adapter.LLM(str(MODELS_DIR / "policy-3m"), seed=42, dtype="float32", kv_memory="256MiB")
    prm = adapter.PRM(str(MODELS_DIR / "prm-strong"), dtype="float32", kv_memory="256MiB")
    tasks = generate("test", 5, args.problems, 0)
    problems = [task.problem for task in tasks]
    for approach in ("best_of_n", "beam_search", "dvts"):
        one = run(searches, approach, llm, prm, problems, args.n)
        llm.close(), prm.close()
        other = run(adapter, approach, llm, prm, problems, args.n)
        solved = sum(f"\\boxed{{{task.answer}}}" in text for task, text in zip(tasks, one["pred"], strict=True))
        same = sum(a == b for a, b in zip(one["completions"], other["completions"], strict=True))
        picked = sum(a == b for a, b in zip(one["pred"], other["pred"], strict=True))
        print(
            f"{approach}: {solved} of {len(tasks)} solved; with the function that replaces it, all completions are the "
            f"same for {same}, the chosen one for {picked}"
        )


if __name__ == "__main__":
    main()
