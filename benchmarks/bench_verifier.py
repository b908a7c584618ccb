"""Reading a search with a verifier: incrementally over a forest, or by encoding every candidate's text again.

    python benchmarks/bench_verifier.py --shape smollm2 --layers 3
    python benchmarks/bench_verifier.py --shape qwen2-1.5b --layers 2 --sizes 64x10

``--sizes CxS`` names searches of C candidates and S rounds: in every round each candidate is one of the C / 4
survivors of the previous round, extended by a step of 50 tokens, and all are scored. Weights are random, in the layout
of Skywork's verifiers (a value head on the last token of each step); ``--layers`` uses fewer layers of the shape. Each
method runs in a process of its own:

``incremental``    `HFVerifier`.
``batched``        the whole text of all candidates again each round, padded, one forward of the body, the head where a
                   step ends; no cache. What a batched server without prefix caching does.
``logits``         the same in batches of 4 through the causal LM with all logits, as search-and-learn scores.

Reported: tokens forwarded; seconds of CPU time and of wall time; the peak of resident memory above that after loading
the weights. The two baselines are run only in ``--sampled-rounds`` rounds, spread evenly over the search, and their
time is scaled to all rounds by the number of tokens (the cost of a round grows with the text).
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters
from typing import Any

import record
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from tts_search import HFVerifier
from tts_search.search.protocol import Score

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "qwen2-1.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
MODES = ("incremental", "batched", "logits")


@dataclass
class Round:
    """The candidates of a round: their texts in steps, and the branches that they grow from."""

    paths: list[tuple[str, ...]]
    parents: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--sizes", nargs="+", default=["16x20"], help="candidates x steps of each search")
    parser.add_argument("--step-tokens", type=int, default=50)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, help="the most tokens of one of our forwards")
    parser.add_argument("--sampled-rounds", type=int, default=4, help="rounds at which the baselines are run")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--write", help="the name of a measurement in benchmarks/results")
    parser.add_argument("--beside", default="other work", help="what else ran, for --write")
    parser.add_argument("--run", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--candidates", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.run:
        print(json.dumps(measure(options)))
        return
    rows: dict[str, dict[str, record.Cell]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options)
        for size in options.sizes:
            candidates, steps = map(int, size.split("x"))
            found = {mode: in_process(mode, folder, candidates, steps) for mode in options.modes}
            rows |= rows_of(found, f"{candidates} x {steps}")
    report(rows, options)
    if options.write:
        record.write(
            options.write,
            what=f"Reading a search: random weights of the models' shapes, {options.dtype}, steps of "
            f"{options.step_tokens} tokens behind a prompt of {options.prompt_tokens}",
            command=f"python benchmarks/bench_verifier.py {shlex.join(sys.argv[1:])}",
            beside=options.beside,
            tables={options.shape: rows},
            packages=("torch", "transformers"),
        )


def in_process(mode: str, folder: str, candidates: int, steps: int) -> dict[str, float]:
    """Run one way in a process of its own, for its memory."""
    size = ["--candidates", str(candidates), "--steps", str(steps)]
    command = [sys.executable, __file__, *sys.argv[1:], *size, "--run", mode, "--checkpoint", folder]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def rows_of(found: dict[str, dict[str, float]], size: str) -> dict[str, dict[str, record.Cell]]:
    """The rows of a size; times are relative to the first way."""
    first = next(iter(found.values()))
    return {
        f"{size}, {mode}": {
            "candidates x steps": size,
            "way": mode,
            "tokens forwarded": round(one["tokens"]),
            "CPU s": float(f"{one['cpu']:.3g}"),
            "clock s": float(f"{one['clock']:.3g}"),
            "times ours": round(one["clock"] / first["clock"], 1),
            "peak MiB above the weights": round(one["memory"]),
        }
        for mode, one in found.items()
    }


def report(rows: dict[str, dict[str, record.Cell]], options: argparse.Namespace) -> None:
    """Print a table."""
    layers = options.layers or SHAPES[options.shape]["num_hidden_layers"]
    print(
        f"{options.shape}, {layers} layers, {options.dtype}, {options.threads} threads, prompt of "
        f"{options.prompt_tokens} tokens, steps of {options.step_tokens}"
    )
    columns = list(next(iter(rows.values())))
    for cells in (columns, ["---"] * len(columns), *(list(row.values()) for row in rows.values())):
        print(f"| {' | '.join(map(str, cells))} |")


def write(folder: Path, options: argparse.Namespace) -> None:
    """A checkpoint of the shape with random weights and a value head; a token a byte."""
    shape = dict(SHAPES[options.shape])
    kind = shape.pop("model_type")
    shape["num_hidden_layers"] = options.layers or shape["num_hidden_layers"]
    config = AutoConfig.for_model(kind, **shape, max_position_embeddings=8192)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).save_pretrained(folder)
    path = folder / "model.safetensors"
    head = {"v_head.summary.weight": torch.randn(1, config.hidden_size), "v_head.summary.bias": torch.zeros(1)}
    save_file({**load_file(path), **head}, path, {"format": "pt"})
    newline = "\u010a"  # as byte-level BPE writes it
    vocab = [newline, *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {newline})]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def search(options: argparse.Namespace) -> list[Round]:
    """The rounds of a random search; branch numbers run from 1, round after round."""
    rng = random.Random(0)

    def step() -> str:
        return "".join(rng.choice(ascii_letters) for _ in range(options.step_tokens - 1))

    rounds: list[Round] = []
    for number in range(options.steps):
        keep = rng.sample(range(options.candidates), k=max(1, options.candidates // 4))
        chosen = [keep[i % len(keep)] for i in range(options.candidates)]
        first = 1 + (number - 1) * options.candidates
        parents = [0 if number == 0 else first + i for i in chosen]
        before = [() if number == 0 else rounds[-1].paths[i] for i in chosen]
        rounds.append(Round([(*path, step()) for path in before], parents))
    return rounds


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Load the model and score the search in one way."""
    rounds = search(options)
    prompt = (ascii_letters * options.prompt_tokens)[: options.prompt_tokens - 1]
    run = {"incremental": incremental, "batched": again, "logits": again}[options.run]
    return run(options, rounds, prompt)


def incremental(options: argparse.Namespace, rounds: list[Round], prompt: str) -> dict[str, float]:
    unique = options.prompt_tokens + options.candidates * options.step_tokens * (options.steps + 1)
    heads = SHAPES[options.shape]
    layers = options.layers or heads["num_hidden_layers"]
    width = heads["hidden_size"] // heads["num_attention_heads"] * heads["num_key_value_heads"]
    size = 4 if options.dtype == "float32" else 2
    verifier = HFVerifier(
        str(options.checkpoint),
        format="skywork",
        kv_memory=2 * (unique + 2048) * layers * 2 * width * size,
        **({"batch_tokens": options.batch_tokens} if options.batch_tokens else {}),
    )
    start = Gauge()
    verifier.begin(0, prompt)
    branch, scored = 1, 0
    for number, each in enumerate(rounds):
        requests = [
            Score(0, branch + i, path, parent)
            for i, (path, parent) in enumerate(zip(each.paths, each.parents, strict=True))
        ]
        for answer in verifier.score(requests):
            assert not isinstance(answer, Exception), answer
            scored += len(answer) > number
        verifier.release(0, {parent for parent in each.parents if parent > 0})
        survivors = rounds[number + 1].parents if number + 1 < len(rounds) else []
        verifier.release(0, {*range(branch, branch + options.candidates)} - {*survivors})
        branch += options.candidates
    assert scored == options.candidates * options.steps
    usage = verifier.end(0)
    return start.read(usage.tokens + usage.prefill_tokens + usage.recomputed_tokens, 1.0)


@torch.inference_mode()
def again(options: argparse.Namespace, rounds: list[Round], prompt: str) -> dict[str, float]:
    """Encode the candidates of a round again, as one batch without logits or in batches of 4 with them."""
    whole = options.run == "batched"
    model = (AutoModel if whole else AutoModelForCausalLM).from_pretrained(options.checkpoint, dtype="auto").eval()
    head = load_file(options.checkpoint / "model.safetensors")["v_head.summary.weight"].to(model.dtype)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.checkpoint)
    size = options.candidates if whole else 4
    lead = [*tokenizer(prompt)["input_ids"], 0]
    every = max(1, options.steps // options.sampled_rounds)
    sampled = range(every - 1, options.steps, every)
    start, done = Gauge(), 0
    for number in sampled:
        ids = [lead + [t for step in path for t in (*tokenizer(step)["input_ids"], 0)] for path in rounds[number].paths]
        places = [len(lead) - 1 + (i + 1) * options.step_tokens for i in range(number + 1)]
        for begin in range(0, len(ids), size):
            batch = torch.tensor(ids[begin : begin + size])
            if whole:
                states = model(batch, use_cache=False).last_hidden_state
                torch.sigmoid(states[:, places] @ head.T).tolist()
            else:
                model(batch, use_cache=False).logits[:, :, :2].softmax(dim=-1)[:, places, 0].tolist()
            done += batch.numel()
    total = sum(
        options.candidates * (len(lead) + (number + 1) * options.step_tokens) for number in range(options.steps)
    )
    return start.read(total, total / done)


class Gauge:
    """CPU time, clock and peak memory since it was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        self.memory = self._memory("VmRSS")
        self.cpu, self.clock = time.process_time(), time.perf_counter()

    def read(self, tokens: float, scale: float) -> dict[str, float]:
        """What the work took, times ``scale``; memory in MiB, as it is."""
        return {
            "tokens": tokens,
            "cpu": (time.process_time() - self.cpu) * scale,
            "clock": (time.perf_counter() - self.clock) * scale,
            "memory": (self._memory("VmHWM") - self.memory) / 1024,
        }

    @staticmethod
    def _memory(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
