"""Times ours and its baselines in turn, so that a change in the machine's load affects all of them equally.

On a GPU a time is that between two events of its stream around the calls, after all earlier work has ended: the
device's time, or the host's if that is longer. pytest-benchmark's own numbers are of the host's clock, from one
synchronisation of the device to the next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

Call = Callable[[], object]
_SPREAD_S: Final = 0.03


@dataclass(frozen=True)
class Bound:
    """What the work needs at least: bytes from memory (0 if it stays in cache) and operations in a dtype."""

    bytes: float = 0
    operations: float = 0
    dtype: torch.dtype = torch.float32

    def rates(self) -> dict[str, tuple[Call, float]]:
        """The calls that show the machine's rates, and their amounts."""
        block, square = _block(), _square(self.dtype)
        read = {"memory": (block.sum, 4.0 * block.numel())} if self.bytes else {}
        gemm = {"gemm": (partial(torch.mm, square, square), 2.0 * square.shape[0] ** 3)} if self.operations else {}
        return read | gemm

    def seconds(self, rate: dict[str, float]) -> dict[str, float]:
        """The least time at each of the rates."""
        amounts = {"memory": self.bytes, "gemm": self.operations}
        return {name: amounts[name] / rate[name] for name in rate}


def compare(
    benchmark: Any, ours: Call, baselines: dict[str, Call], *, rounds: int, repeats: int = 1, bound: Bound | None = None
) -> None:
    """Time ``ours`` by pytest-benchmark and, before each of its rounds, the baselines and the rates of the bound.

    A round is ``repeats`` calls. Prints medians; puts them, the ratios and the fraction of the bound into
    ``extra_info``.
    """
    rates = bound.rates() if bound else {}
    times: dict[str, list[float]] = {name: [] for name in [*baselines, *rates]}

    def before() -> None:
        for name, call in baselines.items():
            times[name].append(seconds(call, repeats))
        for name, (call, _) in rates.items():
            times[name].append(seconds(call))

    own: list[float] = []
    ours()
    before()
    for samples in times.values():
        samples.clear()
    benchmark.pedantic(lambda: own.append(seconds(ours, repeats)), setup=before, rounds=rounds)
    mine = statistics.median(own)
    theirs = {name: statistics.median(samples) for name, samples in times.items()}
    info: dict[str, Any] = {"us": 1e6 * mine}
    for name in baselines:
        info[f"us {name}"] = 1e6 * theirs[name]
        info[f"times faster than {name}"] = theirs[name] / mine
    if bound:
        rate = {name: amount / theirs[name] for name, (_, amount) in rates.items()}
        info |= {f"fraction of {name}": least / mine for name, least in bound.seconds(rate).items()}
    benchmark.extra_info.update(info, device=device_name())
    print(f"\n{benchmark.name}: " + ", ".join(f"{name} {value:.3g}" for name, value in info.items()))


def seconds(call: Call, repeats: int = 1) -> float:
    """Of one call, the mean of ``repeats``.

    On a CPU it begins as within a loop of such calls. Torch's threads spin for 2 to 4 ms after a call (libgomp), on
    cores that ours then lack, and ours sleep meanwhile: so the former may fall asleep first. Then this call's own
    threads wake, often on the core of the one who wakes them, and it takes Linux some milliseconds to spread them: so
    calls are repeated for some time before one counts.
    """
    on_device = torch.get_default_device().type == "cuda"
    if not on_device:
        time.sleep(0.01)
        begin = time.perf_counter()
        call()
        while time.perf_counter() - begin < _SPREAD_S:
            call()
    clock = _EventClock() if on_device else _HostClock()
    for _ in range(repeats):
        call()
    return clock.seconds() / repeats


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Seconds of each call, in turn, after one of each that does not count."""
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(one[name] for one in times) for name in calls}


def peak_bytes(call: Call) -> int:
    """Bytes that a call adds at most to what is allocated on a GPU, or to what this process has of memory (Linux).

    The latter takes a process that gives back what it frees: MALLOC_MMAP_THRESHOLD_=65536 in its environment.
    """
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def device_name() -> str:
    """What is timed: the GPU by its name, or the CPU."""
    return torch.cuda.get_device_name() if torch.get_default_device().type == "cuda" else "CPU"


class _HostClock:
    def __init__(self) -> None:
        self.begin = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.begin


class _EventClock:
    """Two events on the current stream of a GPU."""

    def __init__(self) -> None:
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.begin.record()

    def seconds(self) -> float:
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1000


@cache
def last_cache_bytes() -> int:
    """The size of the last-level cache as Linux tells it; 32 MiB where it does not."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kib = [int(text[:-1]) for path in sizes if (text := path.read_text().strip()).endswith("K")]
    return 1024 * max(kib, default=32 * 1024)


@cache
def _block() -> Tensor:
    return torch.ones(1 << 25)  # 128 MiB: more than a cache holds


@cache
def _square(dtype: torch.dtype) -> Tensor:
    return torch.randn(1024, 1024).to(multiplied(dtype))


def multiplied(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a large product of ``dtype`` is fastest: float32 where torch has none of bfloat16's.

    On a CPU without AVX-512 torch multiplies bfloat16 an element at a time, which bounds nothing.
    """
    on_cpu = torch.get_default_device().type == "cpu"
    widened = on_cpu and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if widened else dtype
