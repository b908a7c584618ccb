"""The compiler's data on every CUDA kernel: registers, spills, shared memory, occupancy. No GPU is needed.

``python benchmarks/gpu_static.py`` compiles csrc/cuda for each architecture and writes gpu_static.md, with the
predictions of gpu_model.py from these data. Occupancy follows the tables of compute capabilities in the CUDA C++
programming guide: how many blocks fit on an SM by registers, shared memory, warps and blocks. The launcher sets dynamic
shared memory, so it is given here for each kernel, at its largest.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import gpu_model

ROOT = Path(__file__).resolve().parents[1]
REPORT = Path(__file__).with_suffix(".md")


@dataclass(frozen=True)
class Architecture:
    """Limits of one SM: warps and blocks it holds, and shared memory in bytes, of all its blocks and of one.

    code: the architecture whose machine code the library has for it.
    """

    code: int
    warps: int
    blocks: int
    shared: int
    shared_of_a_block: int


ARCHITECTURES = {
    80: Architecture(80, 64, 32, 164 << 10, 163 << 10),
    86: Architecture(80, 48, 16, 100 << 10, 99 << 10),
    89: Architecture(80, 48, 24, 100 << 10, 99 << 10),
    90: Architecture(90, 64, 32, 228 << 10, 227 << 10),
    100: Architecture(100, 64, 32, 228 << 10, 227 << 10),
    120: Architecture(120, 48, 32, 100 << 10, 99 << 10),
}
REGISTERS, WARP, REGISTER_UNIT, SHARED_UNIT, SHARED_OF_THE_SYSTEM = 65536, 32, 256, 128, 1024

# Bytes of dynamic shared memory by kernel; kernels not listed have none. TensorTile and ScalarTile: kSharedBytes of
# csrc/cuda/matmul_nt.cuh. Attention: MmaShape, and FmaShape with the longest rows that each form is for (319; 1024).
# rope_append_: heads of 256.
DYNAMIC_SHARED = {
    r"TensorTile": 73728,
    r"QuantizedTile<\w+, 32": 40960,
    r"QuantizedTile<\w+, 16": 36864,
    r"ScalarTile<64>": 27648,
    r"ScalarTile<32>": 23040,
    r"ScalarTile<16>": 20736,
    r"rope_append_quantized_kernel<float>": 4096,
    r"rope_append_quantized_kernel<b?f16>": 2048,
    r"tree_attention_mma<\w+, 64, 4, false>": 41472,
    r"tree_attention_mma<\w+, 96, 4, false>": 71168,
    r"tree_attention_mma<\w+, 128, 4, false>": 91648,
    r"tree_attention_mma<\w+, 64, 8, false>": 46080,
    r"tree_attention_mma<\w+, 96, 8, false>": 89088,
    r"tree_attention_mma<\w+, 128, 8, false>": 113664,
    r"tree_attention_mma<\w+, 256, 4, false>": 93696,
    r"tree_attention_mma<\w+, 64, 4, true>": 43552,
    r"tree_attention_mma<\w+, 96, 4, true>": 73248,
    r"tree_attention_mma<\w+, 128, 4, true>": 93728,
    r"tree_attention_mma<\w+, 64, 8, true>": 48192,
    r"tree_attention_mma<\w+, 96, 8, true>": 91200,
    r"tree_attention_mma<\w+, 128, 8, true>": 115776,
    r"tree_attention_mma<\w+, 256, 4, true>": 94736,
    r"tree_attention_fma<\w+, 4, \w+>": 49152,
    r"tree_attention_fma<\w+, 1, \w+>": 41088,
}
# Launched on a device that has so much shared memory; others have another kernel for the same work.
WHERE_THERE_IS_ROOM = r"tree_attention_mma<\w+, \d+, 8, \w+>"


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture, as ptxas reports it."""

    file: str
    name: str
    architecture: int
    threads: int
    registers: int
    spilled: int
    stack: int
    shared: int

    @property
    def dynamic_shared(self) -> int:
        return next((size for form, size in DYNAMIC_SHARED.items() if re.search(form, self.name)), 0)

    @property
    def blocks(self) -> int:
        """Blocks that an SM holds at once."""
        limits = ARCHITECTURES[self.architecture]
        warps = -(-self.threads // WARP)
        registers_of_a_warp = -(-self.registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
        shared = -(-(self.shared + self.dynamic_shared) // SHARED_UNIT) * SHARED_UNIT + SHARED_OF_THE_SYSTEM
        return min(
            limits.warps // warps, limits.blocks, REGISTERS // registers_of_a_warp // warps, limits.shared // shared
        )

    @property
    def occupancy(self) -> float:
        return self.blocks * -(-self.threads // WARP) / ARCHITECTURES[self.architecture].warps

    def faults(self) -> list[str]:
        """What must not be: spills, and more shared memory than a block may have."""
        limit = ARCHITECTURES[self.architecture].shared_of_a_block
        if re.search(WHERE_THERE_IS_ROOM, self.name):
            limit = max(architecture.shared_of_a_block for architecture in ARCHITECTURES.values())
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared + self.dynamic_shared > limit:
            found.append(f"has {self.shared + self.dynamic_shared} bytes of shared memory, of {limit}")
        if self.blocks == 0 and not re.search(WHERE_THERE_IS_ROOM, self.name):
            found.append("does not fit on an SM")
        return [f"{self.name} for sm_{self.architecture} {fault}" for fault in found]


def compile_kernels(source: Path, architecture: int) -> list[Kernel]:
    """Compile one .cu file and read what ptxas says of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++20", "-O3", f"-arch=sm_{architecture}", f"-I{ROOT / 'csrc/include'}"]
        command = ["nvcc", *flags, "-cubin", "-Xptxas", "-v", "-keep", "-keep-dir", folder]
        done = subprocess.run(
            [*command, "-o", f"{folder}/cubin", str(source)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        ptx = next(Path(folder).glob("*.ptx")).read_text()
    bounds = re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx, re.S)
    return read_report(source.stem, architecture, done.stderr, {name: int(n) for name, n in bounds})


def read_report(file: str, architecture: int, report: str, threads: dict[str, int]) -> list[Kernel]:
    """The kernels in ptxas's output; `threads` are their launch bounds."""
    kernels = []
    for part in report.split("Compiling entry function '")[1:]:
        mangled = part.split("'", 1)[0]
        numbers = {
            what: sum(map(int, re.findall(pattern, part)))
            for what, pattern in {
                "registers": r"Used (\d+) registers",
                "spilled": r"(\d+) bytes spill (?:stores|loads)",
                "stack": r"(\d+) bytes stack frame",
                "shared": r"(\d+) bytes smem",
            }.items()
        }
        kernels.append(Kernel(file, demangle(mangled), architecture, threads[mangled], **numbers))
    return kernels


@functools.cache
def demangle(name: str) -> str:
    """A short form: no namespaces, no arguments."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    full = re.sub(r"tts::|cuda::|\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void ", "", full)
    return re.sub(r"\((\w+)\)(?=\d)", "", full[: _end_of_name(full)])


def _end_of_name(full: str) -> int:
    depth = 0
    for i, letter in enumerate(full):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return i
    return len(full)


def survey(architectures: Iterable[int] = ARCHITECTURES) -> list[Kernel]:
    """Every kernel of csrc/cuda, for each architecture."""
    wanted = list(architectures)
    codes = sorted({ARCHITECTURES[a].code for a in wanted})
    jobs = [(source, code) for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) for code in codes]
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        compiled = [kernel for kernels in pool.map(lambda job: compile_kernels(*job), jobs) for kernel in kernels]
    return [replace(k, architecture=a) for k in compiled for a in wanted if ARCHITECTURES[a].code == k.architecture]


def table(kernels: list[Kernel]) -> str:
    """One row for each kernel, one column for each architecture."""
    architectures = sorted({k.architecture for k in kernels})
    lines = [
        "| file | kernel | threads | shared, static + dynamic | " + " | ".join(f"sm_{a}" for a in architectures) + " |",
        "| --- | --- | ---: | ---: | " + " | ".join("---" for _ in architectures) + " |",
    ]
    for file, name in dict.fromkeys((k.file, k.name) for k in kernels):
        row = {k.architecture: k for k in kernels if (k.file, k.name) == (file, name)}
        first = next(iter(row.values()))
        cells = [cell(row[a]) for a in architectures]
        shared = f"{max(k.shared for k in row.values())} + {first.dynamic_shared}"
        lines.append(f"| {file} | `{name}` | {first.threads} | {shared} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(kernel: Kernel) -> str:
    return f"{kernel.registers}, {kernel.spilled}, {kernel.blocks} ({kernel.occupancy:.0%})"


def report(kernels: list[Kernel]) -> str:
    """The page."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V([\d.]+)", version)
    return f"""# CUDA kernels as compiled

`python benchmarks/gpu_static.py`, nvcc {release[1] if release else "?"}. Each cell: registers a thread, bytes spilled,
blocks that an SM holds at once (and the part of its warps that they are). sm_86 and sm_89 run the code for sm_80 within
their own limits.

{table(kernels)}

# What a model predicts

Predicted from a model, verified by emulation; not timed. Each cell: the least that the roofline allows / what the model
predicts = the predicted part of the roofline. The model is gpu_model.py; it takes for granted:

{gpu_model.ASSUMPTIONS}

{gpu_model.table(kernels)}
"""


def main() -> None:
    """Write gpu_static.md; with --check compare nothing and only look for faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only look for spills and too much shared memory")
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("gpu_static: no nvcc on PATH")
    kernels = survey(arguments.architectures)
    faults = [fault for kernel in kernels for fault in kernel.faults()]
    if not arguments.check:
        REPORT.write_text(report(kernels))
    print("\n".join(faults) or f"{len(kernels)} kernels, no spills, shared memory within limits")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
