"""Everything that a GPU can tell about this repository in a few minutes, from one archive, without a network.

Here, where there is nvcc but no GPU, and a Python 3.12 beside this one::

    python tools/gpu_check.py pack                 # build/gpu_check.tar.gz, at most 64 MiB

On a machine with an H100-class GPU, Python 3.12 and a torch with CUDA (triton with it)::

    tar xzf gpu_check.tar.gz && cd gpu_check && python3.12 tools/gpu_check.py run --minutes 9

What comes first is worth most: the operators' own tests on the GPU, compute-sanitizer on the four intricate kernels,
benchmarks beside torch's attention (and FlashInfer's, if it is there), a whole search, Nsight Compute's report of
attention. Each part has a limit of its own, and gpu_check.json is written anew after each: when time is up, what is
known is in it. Without a GPU a part says so, which is how the whole is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu_check"
LIMIT = 64 * 2**20  # bytes of the archive
PYTHON, ARCHITECTURE = "3.12", "90"
# Beside torch and triton, which are there; what the wheels need themselves comes with them, but for what torch brings.
WHEELS = ("pytest", "pytest-timeout", "pytest-xdist", "pytest-benchmark", "hypothesis", "transformers", "safetensors",
          "jinja2", "math-verify", "rich", "typer")  # fmt: skip
WITH_TORCH = ("numpy", "sympy", "mpmath", "networkx", "setuptools")
INSIDE = ("tests", "benchmarks", "tools", "examples", "pyproject.toml", "constraints.txt", "README.md", "csrc")
FEW = {  # for compute-sanitizer, which takes ten to a hundred times as long
    "tree_attention": "test_head_sizes and (64 or 128)",
    "score_and_prune": "equals_its_parts and last",
    "sample": "draws_exactly and 37 or ends_decide",
    "linear_logprob": "test_equals_the_definition and (size2 or size6)",
}


# ---- parts ---------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One thing to find out: a command, the seconds that it may take, and what of its files is kept."""

    name: str
    command: Sequence[str]
    limit: float
    needs: str = ""  # a program that must be on PATH
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[Path], Any] | None = None  # of the part's folder, which the command has as {folder}


@dataclass
class Outcome:
    """What became of a part: passed, failed, timed out, or why it did not run."""

    name: str
    status: str
    command: str
    seconds: float
    output: str
    data: Any = None


def pytest_part(name: str, *files: str, limit: float, only: str = "", plugin: Sequence[str] = (), **more: Any) -> Part:
    """A part that is a run of pytest, several tests at a time."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-n", "4", *plugin]
    command += ["-k", only] if only else []
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return Part(name, [*command, *files], limit, environment={"PYTHONPATH": paths}, **more)


def sanitized(tool: str, op: str) -> Part:
    """An op's tests, few of them, under one of compute-sanitizer's tools."""
    part = pytest_part(f"{tool}: {op}", f"tests/test_{op}.py", limit=60, only=FEW[op], plugin=("-p", "on_gpu"))
    python = [word for word in part.command if word not in ("-n", "4")]
    part.command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *python]
    part.needs = "compute-sanitizer"
    return part


def benchmark(op: str, limit: float = 60) -> Part:
    """An op's benchmark on the GPU, beside its baselines."""
    command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{op}.py", "--benchmark-only", "--device=cuda", "-q"]
    command += ["-p", "no:cacheprovider", "-o", "python_files=bench_*.py", "--benchmark-json={folder}/bench.json"]
    return Part(f"benchmark: {op}", command, limit, read=read_benchmarks)


def read_benchmarks(folder: Path) -> list[dict[str, Any]]:
    """Medians in seconds, and what a benchmark says beside them."""
    kept = json.loads((folder / "bench.json").read_text())["benchmarks"]
    return [{"name": one["fullname"], "median_s": one["stats"]["median"], **one["extra_info"]} for one in kept]


def read_report(folder: Path) -> str:
    """What Nsight Compute wrote, as text."""
    return (folder / "ncu.csv").read_text()[-200_000:]


def parts() -> list[Part]:
    """All of them, what is worth most first."""
    on_gpu = ("-p", "on_gpu")
    first = [f"tests/test_{op}.py" for op in ("tree_attention", "score_and_prune", "sample", "linear_logprob")]
    rest = [f"tests/test_{op}.py" for op in ("append_kv", "copy_pages", "merge_states", "step_scores", "prune",
                                             "aggregate_steps", "linear", "rms_norm", "rope_append",
                                             "swiglu")]  # fmt: skip
    triton = (*on_gpu, "--on-backend", "triton")
    ncu = ["ncu", "--set", "full", "--kernel-name", "regex:tree_attention", "--launch-skip", "3", "--launch-count", "1",
           "--csv", "--page", "details", "--log-file", "{folder}/ncu.csv"]  # fmt: skip
    return [
        pytest_part("CUDA: attention, pruning, sampling, scoring", *first, limit=100, plugin=on_gpu),
        pytest_part("CUDA graphs and torch.compile", "tests/test_gpu.py", limit=60, only="captured or compiles"),
        pytest_part("CUDA: the other operators", *rest, limit=60, plugin=on_gpu),
        benchmark("tree_attention"),
        sanitized("racecheck", "score_and_prune"),
        sanitized("racecheck", "tree_attention"),
        pytest_part("Triton: attention, pruning, sampling, scoring", *first, limit=90, plugin=triton),
        pytest_part("a search on the GPU decides as on the CPU", "tests/test_gpu.py", limit=60, only="search_decides"),
        Part("attention beside FlashInfer", [sys.executable, "benchmarks/gpu_peers.py"], 40),
        benchmark("sample", 40),
        benchmark("linear_logprob", 40),
        sanitized("memcheck", "tree_attention"),
        sanitized("memcheck", "sample"),
        sanitized("racecheck", "sample"),
        sanitized("memcheck", "linear_logprob"),
        Part("Nsight Compute: attention",
             [*ncu, sys.executable, "-m", "pytest", "benchmarks/bench_tree_attention.py", "--benchmark-disable",
              "--device=cuda", "-q", "-o", "python_files=bench_*.py", "-k", "64 and bfloat16"],
             60, needs="ncu", read=read_report),
        *(benchmark(op, 30) for op in ("append_kv", "copy_pages", "score_and_prune", "step_scores", "prune",
                                       "merge_states", "linear", "fork")),
        pytest_part("Triton: the other operators", *rest, limit=60, plugin=triton),
    ]  # fmt: skip


# ---- run -----------------------------------------------------------------------------------------------------------


def run(minutes: float, out: Path, chosen: Iterable[Part], work: Path) -> dict[str, Any]:
    """Run parts until the time is up; ``out`` holds what is known after each."""
    deadline = time.monotonic() + 60 * minutes
    report: dict[str, Any] = {"minutes": minutes, "machine": machine(), "parts": []}
    for i, part in enumerate(chosen):
        folder = work / str(i)
        folder.mkdir(parents=True)
        outcome = outcome_of(part, min(part.limit, deadline - time.monotonic()), folder)
        report["parts"].append(asdict(outcome))
        print(f"{outcome.status:>12} {outcome.seconds:6.1f} s  {outcome.name}", flush=True)
        out.write_text(json.dumps(report, indent=1))
    return report


def outcome_of(part: Part, seconds: float, folder: Path) -> Outcome:
    """Run one part for at most so many seconds."""
    command = [word.replace("{folder}", str(folder)) for word in part.command]
    outcome = Outcome(part.name, "", " ".join(command), 0.0, "")
    if seconds < 5:
        outcome.status = "no time left"
    elif part.needs and shutil.which(part.needs) is None:
        outcome.status = f"no {part.needs}"
    else:
        start = time.monotonic()
        outcome.status, outcome.output = call(command, part.environment, seconds)
        outcome.seconds = time.monotonic() - start
        if part.read is not None:
            try:
                outcome.data = part.read(folder)
            except (OSError, ValueError, KeyError) as error:
                outcome.data = f"nothing to read: {error}"
    return outcome


def call(command: Sequence[str], environment: dict[str, str], seconds: float) -> tuple[str, str]:
    """A command's status and the end of its output; with all that it has started it ends when time is up."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "timed out"
        log.seek(0)
        return status, log.read()[-6000:].decode(errors="replace")


ABOUT = """
import json, torch
import tts_kernels as tk
gpu = torch.cuda.is_available()
about = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": gpu, "backends": str(tk.backend_info())}
if gpu:
    p = torch.cuda.get_device_properties(0)
    about |= {"name": p.name, "capability": [p.major, p.minor], "sms": p.multi_processor_count, "bytes": p.total_memory}
print(json.dumps(about))
"""


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    _, about = call([sys.executable, "-c", ABOUT], {}, 60)
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    lines = about.strip().splitlines()
    try:
        found |= json.loads(lines[-1])
    except (IndexError, ValueError):
        found["fault"] = about
    if shutil.which("nvidia-smi"):
        found["nvidia-smi"] = call(["nvidia-smi"], {}, 20)[1]
    return found


def install(work: Path) -> Path:
    """An environment over this Python's packages, with the archive's wheels in it; its interpreter."""
    wheels = sorted((ROOT / "wheels").glob("*.whl"))
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(work)], check=True)
    inside = work / "bin" / "python"
    subprocess.run(
        [str(inside), "-m", "pip", "install", "-q", "--no-index", "--no-deps", *map(str, wheels)], check=True
    )
    return inside


# ---- pack ----------------------------------------------------------------------------------------------------------


def pack(out: Path) -> None:
    """Build the wheel and the CUDA library, fetch the wheels that the tests need, and put all into one archive."""
    wheels = BUILD / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    step([sys.executable, "tools/wheels.py", "build", "--python", PYTHON])
    tag = PYTHON.replace(".", "")
    (built,) = sorted((ROOT / "dist").glob(f"tts_kernels-*-cp{tag}-*.whl"), key=lambda p: p.stat().st_mtime)[-1:]
    cmake = BUILD / "cmake"
    step(["cmake", "-S", ".", "-B", str(cmake), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", "-DTTS_CUDA=ON",
          "-DTTS_BUILD_TESTS=OFF", f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURE}"])  # fmt: skip
    step(["cmake", "--build", str(cmake), "--target", "tts_cuda"])
    put_into(built, cmake / "_cuda.so", wheels / built.name)
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", f"--python-version={PYTHON}",
             "--platform=manylinux_2_28_x86_64", "--platform=manylinux2014_x86_64", "-c",
             "constraints.txt"]  # fmt: skip
    step([*fetch, "-d", str(wheels), *WHEELS])
    leave_out(wheels)
    listed = subprocess.run(["git", "ls-files", *INSIDE], cwd=ROOT, capture_output=True, text=True, check=True)
    archive(out, [ROOT / name for name in listed.stdout.split()], wheels)


def leave_out(wheels: Path) -> None:
    """Remove what comes with torch: a third of the archive."""
    for wheel in wheels.glob("*.whl"):
        if wheel.name.partition("-")[0] in WITH_TORCH:
            wheel.unlink()


def step(command: Sequence[str]) -> None:
    print("==", " ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def put_into(wheel: Path, library: Path, out: Path) -> None:
    """The wheel with the CUDA library in it."""
    tool = [sys.executable, "-m", "wheel"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*tool, "unpack", "-d", folder, str(wheel)], check=True, stdout=subprocess.DEVNULL)
        (unpacked,) = Path(folder).iterdir()
        shutil.copy(library, unpacked / "tts_kernels" / "_cuda.so")
        subprocess.run([*tool, "pack", "-d", str(out.parent), str(unpacked)], check=True, stdout=subprocess.DEVNULL)


def archive(out: Path, files: Iterable[Path], wheels: Path) -> None:
    """Write the archive; SystemExit, and none is left, if it is larger than the limit."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:gz") as tar:
        for path in files:
            tar.add(path, f"gpu_check/{path.relative_to(ROOT)}")
        for path in sorted(wheels.glob("*.whl")):
            tar.add(path, f"gpu_check/wheels/{path.name}")
    size = out.stat().st_size
    if size > LIMIT:
        out.unlink()
        sys.exit(f"gpu_check: expected an archive of at most {LIMIT} bytes, got {size}")
    print(f"{out}: {size / 2**20:.1f} MiB")


def main() -> None:
    """Pack here, run there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    packing = commands.add_parser("pack", help="make the archive")
    packing.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check.tar.gz")
    running = commands.add_parser("run", help="find out what there is time for")
    running.add_argument("--minutes", type=float, default=9.0)
    running.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    running.add_argument("--only", default="", help="parts whose names match this pattern")
    arguments = parser.parse_args()
    if arguments.what == "pack":
        pack(arguments.out)
        return
    with tempfile.TemporaryDirectory() as work:
        if (ROOT / "wheels").is_dir() and "--installed" not in os.environ.get("GPU_CHECK", ""):
            start = time.monotonic()
            inside = install(Path(work) / "env")
            left = arguments.minutes - (time.monotonic() - start) / 60
            command = [str(inside), __file__, "run", "--minutes", str(left), "--out", str(arguments.out.resolve())]
            environment = {**os.environ, "GPU_CHECK": "--installed"}
            sys.exit(subprocess.run([*command, "--only", arguments.only], env=environment, check=False).returncode)
        chosen = [part for part in parts() if re.search(arguments.only, part.name)]
        run(arguments.minutes, arguments.out, chosen, Path(work))


if __name__ == "__main__":
    main()
