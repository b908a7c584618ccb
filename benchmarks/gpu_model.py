"""A model of the cost of each CUDA kernel, and its predicted part of the roofline. No GPU has timed the kernels.

For each launch it has the grid, as csrc/cuda makes it; the bytes moved from memory and through L2; the operations on
tensor cores, with the padding of tiles, and on CUDA cores; and the bytes that a block has in flight. With the number of
blocks on an SM (gpu_static.py, from the compiler's output) this gives a time on a GPU. The least work of the op
(costs.py) at the rates of the data sheet gives the roofline. The prediction is the quotient of the two.
tests/gpu_emulator checks the grids against launches of the operators.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import costs
import torch
from measure import Bound

from tts_kernels.plan import SEGMENT_INTS, TASK_INTS

BF16, F32 = torch.bfloat16, torch.float32

ASSUMPTIONS = """\
* Memory, tensor and float32 rates are the data sheets' (A100 80GB SXM: 2,039 GB/s, 312 and 19.5 TFLOP/s; H100 SXM:
  3.35 TB/s, 989 and 67 TFLOP/s; HGX B200, a GPU: 8 TB/s, 2,250 and 80 TFLOP/s; bfloat16 without sparsity). The
  roofline is the larger of bytes and operations over these.
* Of the memory's rate 92% are reached at best; a byte from memory is 700 ns under way (about twice the latency of an
  idle GPU: 466 and 479 clocks on A100 and H100, Luo et al., arXiv 2402.13499), so blocks that keep too little under
  way get less (Little's law).
* L2 gives an SM 32 bytes a clock, half of what its port takes; shared memory 128 (counted where attention's warps
  load the same keys and values).
* `mma.sync` reaches the whole tensor rate on A100 and 63% on H100 (Luo et al.: 62.9% on average); of B200 nothing is
  published: A100's rate an SM and clock, 26% of the data sheet's, is assumed.
* The SM with the most blocks ends last; a launch costs 2 us beside its work (as a node of a CUDA graph).
* CUDA cores: a lane does one instruction a clock at the float32 rate. `sample`: 25 instructions an element of a pass
  that weighs it, 10 of one that compares it; with a cut 4 passes weigh and 6 compare, without one 3 and 1. Where
  blocks share a row, they meet after each pass, which takes a write and a read of memory."""

SUSTAINED, LATENCY, LAUNCH = 0.92, 700e-9, 2e-6
L2_BYTES_A_CLOCK, SHARED_BYTES_A_CLOCK = 32, 128


class Kernel(Protocol):
    """What has to be known of a compiled kernel: gpu_static.py's."""

    @property
    def architecture(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def blocks(self) -> int:
        """That an SM holds at once."""
        ...


@dataclass(frozen=True)
class GPU:
    """Rates a second: bytes of memory, operations of tensor cores and in float32. mma_share: what mma.sync reaches."""

    architecture: int
    sms: int
    clock: float
    memory: float
    tensor: float
    float32: float
    mma_share: float

    def roofline(self, bound: Bound) -> float:
        """Seconds, at the data sheet's rates."""
        rate = self.float32 if bound.dtype == F32 else self.tensor
        return max(bound.bytes / self.memory, bound.operations / rate)


GPUS = {
    "A100": GPU(80, 108, 1.41e9, 2.039e12, 312e12, 19.5e12, 1.0),
    "H100": GPU(90, 132, 1.755e9, 3.35e12, 989e12, 67e12, 0.63),
    "B200": GPU(100, 148, 1.965e9, 8e12, 2250e12, 80e12, 148 * 2048 * 1.965e9 / 2250e12),
}


@dataclass(frozen=True)
class Launch:
    """One launch. ``kernel`` is a pattern of gpu_static's names; ``l2``: bytes that go through L2 beside ``memory``;
    ``shared``: bytes that warps load from shared memory. Where SMs are left over, ``most`` blocks at most do the work
    of one, and meet ``meetings`` times."""

    kernel: str
    blocks: int
    under_way: float
    memory: float = 0
    l2: float = 0
    tensor: float = 0
    instructions: float = 0
    shared: float = 0
    most: int = 1
    meetings: int = 0

    def grid(self, sms: int) -> int:
        """Blocks on a GPU of so many SMs."""
        return self.blocks * max(1, min(self.most, sms // max(1, self.blocks)))

    def seconds(self, gpu: GPU, blocks_an_sm: int) -> float:
        """What the model predicts."""
        if self.blocks == 0:
            return 0.0
        blocks = self.grid(gpu.sms)
        resident = min(blocks, gpu.sms * blocks_an_sm)
        busy = blocks / (math.ceil(blocks / gpu.sms) * gpu.sms)
        arriving = resident * self.under_way / LATENCY
        clocks = busy * gpu.sms * gpu.clock
        together = LAUNCH + 2 * LATENCY * self.meetings if blocks > self.blocks else 0.0  # clears counters first
        return (
            LAUNCH
            + together
            + max(
                self.memory / min(SUSTAINED * gpu.memory, arriving),
                (self.memory + self.l2) / (clocks * L2_BYTES_A_CLOCK),
                self.shared / (clocks * SHARED_BYTES_A_CLOCK),
                self.tensor / (busy * gpu.mma_share * gpu.tensor),
                self.instructions / (busy * gpu.float32 / 2),
            )
        )


# ---- launches, as csrc/cuda/<op>.cu makes them -------------------------------------------------------------------


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def step_scores(steps: int, width: int) -> list[Launch]:
    """A block of 128 threads for each step; a thread has 16 bytes of each of up to four turns under way."""
    row = 2 * width
    return [
        Launch(r"^step_kernel<OneRow<bf16", steps, min(row, 8192), steps * row, 2 * steps * row, 0, 4 * steps * width),
    ]


def product(rows: int, width: int, columns: int, columns_a_block: int) -> tuple[int, int, float, float, float]:
    """A product by TensorTile: rows of a tile, blocks, bytes under way, bytes through L2, operations."""
    tile = 16 if rows <= 16 else 64
    row_blocks, column_blocks = ceil_div(rows, tile), ceil_div(columns, columns_a_block)
    slices_ahead = (4 if tile == 16 else 3) - 1
    blocks, tiles = row_blocks * column_blocks, columns_a_block // 128
    again = (row_blocks - 1) * 2 * columns * width + blocks * tiles * tile * 2 * width
    operations = 2.0 * blocks * tiles * tile * 128 * 64 * ceil_div(width, 64)
    return tile, blocks, slices_ahead * (tile + 128) * 128, again, operations


def hidden_layer(steps: int, width: int, units: int) -> list[Launch]:
    """128 hidden units per block, then a block for each step adds them up."""
    tile, blocks, under_way, l2, tensor = product(steps, width, units, 128)
    parts = 4 * steps * ceil_div(units, 128)
    return [
        Launch(rf"^hidden_kernel<TensorTile<bf16, {tile}>", blocks, under_way, 2 * units * width, l2, tensor),
        Launch(r"^step_kernel<HiddenLayer", steps, parts / steps, 0, parts),
    ]


def linear_logprob(rows: int, width: int, vocabulary: int) -> list[Launch]:
    """256 words per block; then a warp for each row merges what the chunks left."""
    tile, blocks, under_way, l2, tensor = product(rows, width, vocabulary, 256)
    parts = 8 * rows * ceil_div(vocabulary, 256)
    return [
        Launch(rf"^logprob_kernel<TensorTile<bf16, {tile}>", blocks, under_way, 2 * vocabulary * width, l2, tensor),
        Launch(r"^merge_kernel", ceil_div(rows, 4), 4 * 32 * 8, 0, parts),
    ]


LINEAR_CHUNK = 1024  # csrc/cuda/linear.h, of 16 bits


def linear(rows: int, width: int, columns: int, bits: int = 16) -> list[Launch]:
    """128 columns a block, and a chunk of the width each where rows are few; a thread then adds up an element's chunks.

    In 8 or 4 bits a tile of more than 16 rows has 32, and one slice is ahead.
    """
    tile, blocks, under_way, l2, tensor = product(rows, width, columns, 128)
    splits = ceil_div(width, LINEAR_CHUNK) if rows <= 16 else 1
    if bits < 16:
        many, tile = ceil_div(rows, 64), min(tile, 32)
        blocks, under_way = blocks // many * ceil_div(rows, tile), tile * 128 + 64 * 128 * bits / 8
        tensor = 2.0 * blocks * tile * 128 * 64 * ceil_div(width, 64)
        l2 = (ceil_div(rows, tile) - 1) * bits / 8 * columns * width + blocks * tile * 2 * width
    kind = "TensorTile<bf16, {}>" if bits == 16 else "QuantizedTile<bf16, {}, " + f"{bits}>"
    kernel = rf"^linear_kernel<{kind.format(tile)}"
    parts = 8 * splits * rows * columns if splits > 1 else 0
    bytes_ = bits / 8 * columns * width + 2 * rows * columns
    launches = [Launch(kernel, blocks * splits, under_way, bytes_, l2 + parts / 2, tensor)]
    if splits > 1:
        launches.append(Launch(r"^add_kernel", ceil_div(rows * columns, 256), 4 * 256, 0, parts / 2))
    return launches


def aggregate_steps(scores: int, chains: int) -> list[Launch]:
    """A thread per chain: one score after another."""
    return [Launch(r"^aggregate_kernel", ceil_div(chains, 128), 128 * 4, 4 * scores + 12 * chains)]


def prune(groups: int, size: int, k: int) -> list[Launch]:
    """A block for each group; above 256 candidates it is read five times."""
    again = 4 * 4 * groups * size if size > 256 else 0
    work = groups * size * (min(size, 256) if size <= 256 else 60)
    under_way = min(4 * size, 256 * 4)
    return [Launch(r"^prune_kernel<float", groups, under_way, 4 * groups * size + 12 * groups * k, again, 0, work)]


def score_and_prune(candidates: int, width: int, groups: int, k: int) -> list[Launch]:
    """A block for each candidate and one for each group; the last of a group prunes it."""
    row, size = 2 * width, candidates // groups
    bytes_ = candidates * row + 12 * groups * k
    work = 4 * candidates * width + groups * size * min(size, 256)
    under_way = min(row, 256 * 16)
    return [Launch(r"^round_kernel<OneRow<bf16", candidates + groups, under_way, bytes_, 2 * candidates * row, 0, work)]


def append_kv(tokens: int, kv_heads: int, dim: int) -> list[Launch]:
    """A block for each token: a row of k, then one of v."""
    row = 2 * kv_heads * dim
    return [Launch(r"^append_kv_kernel<uint4", tokens, min(row, 128 * 16), 4 * tokens * row)]


def rope_append(tokens: int, heads: int, kv_heads: int, dim: int) -> list[Launch]:
    """A warp for each head of a token, four a block; at most two pairs of a lane under way."""
    bytes_ = costs.rope_append(tokens, heads, kv_heads, dim, BF16).bytes
    blocks = tokens * ceil_div(heads + 2 * kv_heads, 4)
    return [Launch(r"^rope_append_kernel<bf16", blocks, 4 * 2 * min(dim, 128), bytes_)]


def copy_pages(pages: int, caches: int, page_bytes: int) -> list[Launch]:
    """A block of 256 threads for each page of a cache, up to 448 caches a launch."""
    counts = [min(448, caches - begin) for begin in range(0, caches, 448)]
    return [Launch(r"^copy_pages_kernel<uint4", pages * n, 256 * 16, 2 * pages * n * page_bytes) for n in counts]


def merge_states(rows: int, heads: int, dim: int) -> list[Launch]:
    """A warp for each row: two of 16 bytes per lane."""
    bytes_ = costs.merge_states(rows, heads, dim, BF16).bytes
    return [Launch(r"^merge_states_kernel<bf16, 8", ceil_div(rows * heads, 4), 4 * 2 * 2 * dim, bytes_)]


def sample(rows: int, vocabulary: int, cut: bool) -> list[Launch]:
    """A block of 512 threads for each row, two turns of eight float32 logits under way in each; up to eight blocks."""
    weigh, compare = (4, 6) if cut else (3, 1)
    work = rows * vocabulary * (25.0 * weigh + 10 * compare)
    bytes_ = 4 * rows * vocabulary
    most, passes = min(8, max(1, vocabulary // 8192)), weigh + compare
    again = (passes - 1) * bytes_
    return [Launch(r"^sample_kernel<float", rows, 512 * 64, bytes_, again, 0, work, most=most, meetings=passes)]


@dataclass(frozen=True)
class Task:
    """A task of an attention plan: query rows, and the tokens of its segments."""

    rows: int
    tokens: Sequence[int]


def tree_attention(
    tasks: Sequence[Task], slots: int, rows: int, heads: int, kv_heads: int, dim: int, tokens: int, head_bytes: int = 0
) -> list[Launch]:
    """A task and KV head at a time, in tiles of lanes, 64 keys at a time; then a warp merges a row.

    A lane is a query head of a row. With more than 64 of them a block has 8 warps and takes tiles of 128 or 32, else 4
    warps, 64 or 16; a warp loads keys and values for 16. A tile reads its keys anew, from L2 but for the first.
    ``blocks`` counts tasks and heads: the grid has no more blocks than the device holds at once, and each takes every
    so many-th of them. Head sizes up to 128. ``head_bytes``: of a quantised head of a token; of its elements each takes
    about four instructions.
    """
    group, read, tensor, shared, made = heads // kv_heads, 0.0, 0.0, 0.0, 0.0
    kv_bytes = 2 * (head_bytes or 2 * dim)
    warps = 8 if rows * group > 64 else 4
    for task in tasks:
        wide, rest = divmod(task.rows * group, 16 * warps)
        lanes = 16 * warps * (wide + (rest > 4 * warps)) + 4 * warps * (0 < rest <= 4 * warps)
        tiles = wide + (rest > 0)
        padded = sum(64 * ceil_div(n, 64) for n in task.tokens)
        read += tiles * sum(task.tokens) * kv_bytes * kv_heads
        made += tiles * padded * 2 * dim * kv_heads if head_bytes else 0
        tensor += 4.0 * lanes * padded * dim * kv_heads
        shared += lanes / 16 * padded * 4 * dim * kv_heads
    unique, partial = tokens * kv_heads * kv_bytes, slots * heads * (4 * dim + 8)
    form = f"{next(d for d in (64, 96, 128) if dim <= d)}, {warps}, {'true' if head_bytes else 'false'}"
    kernel, stage = rf"^tree_attention_mma<bf16, {form}>", 64 * kv_bytes  # K and V of a block of keys
    again = read - unique + partial
    return [
        Launch(kernel, len(tasks) * kv_heads, stage, unique, again, tensor, 4 * made, shared),
        Launch(r"^merge_partials<bf16", ceil_div(rows * heads, 4), 4 * 128, 0, partial + 2 * rows * heads * dim),
    ]


# ---- sizes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An op at a size: the least that it takes, and its launches."""

    op: str
    size: str
    bound: Bound
    launches: list[Launch]


def attention_case(name: str, fan_out: list[int], lengths: list[int], head_bytes: int = 0) -> Case:
    """32 query heads on 8 of 128, cut by the planner's rules for GPUs."""
    from bench_tree_attention import grow

    forest, leaves = grow(fan_out, lengths)
    buffer = forest._forest.plan(leaves, None, 32, 8, 0, True, None)
    flat: torch.Tensor = torch.frombuffer(buffer, dtype=torch.int32)
    sizes, _, _, _, tasks, segments, *_ = torch.split_with_sizes(flat, buffer.lengths)
    num_segments, num_tasks, slots, _ = sizes.tolist()
    length = segments.view(-1, SEGMENT_INTS)[:num_segments, 2].tolist()
    plan = [Task(t[3] - t[2], length[t[0] : t[1]]) for t in tasks.view(-1, TASK_INTS)[:num_tasks].tolist()]
    rows, tokens = fan_out[-1], sum(n * length for n, length in zip(fan_out, lengths, strict=True))
    bound = costs.tree_attention(tokens, rows * sum(lengths), 32, 8, 128, BF16, head_bytes)
    return Case("tree_attention", name, bound, tree_attention(plan, slots, rows, 32, 8, 128, tokens, head_bytes))


def cases() -> list[Case]:
    """The sizes of the benchmarks, bfloat16 where an op has a choice."""
    from bench_tree_attention import DECODE

    width, vocabulary, page = 1536, 151_936, 16 * 8 * 128 * 2
    return [
        *(attention_case(name, *tree) for name, tree in DECODE.items()),
        attention_case("64 branches, 8192 + 64", [1, 64], [8192, 64]),
        attention_case("64 branches, 2048 + 64, int8", [1, 64], [2048, 64], 130),
        attention_case("64 branches, 2048 + 64, int4", [1, 64], [2048, 64], 68),
        Case("merge_states", "1024 x 32 x 128", costs.merge_states(1024, 32, 128, BF16), merge_states(1024, 32, 128)),
        *(
            Case(
                "linear_logprob",
                f"{n} rows, {width}, {vocabulary:,}",
                costs.linear_logprob(n, width, vocabulary, BF16),
                linear_logprob(n, width, vocabulary),
            )
            for n in (4, 32, 128)
        ),
        *(
            Case(
                "linear",
                f"{n} rows, 4096 x 4096",
                costs.linear(n, 4096 * 4096, BF16),
                linear(n, 4096, 4096),
            )
            for n in (4, 64, 2048)
        ),
        *(
            Case(
                "linear",
                f"{n} rows, 4096 x 4096 in {bits} bits",
                costs.linear_quantized(4096 * 4096, bits, 128, 4096),
                linear(n, 4096, 4096, bits),
            )
            for n in (4, 64)
            for bits in (8, 4)
        ),
        *(
            Case("sample", f"{n} x 151,936, {how}", costs.sample(n, vocabulary, F32), sample(n, vocabulary, cut))
            for n in (64, 4)
            for how, cut in (("top-p", True), ("plain", False))
        ),
        *(
            Case("step_scores", f"32 steps of {h}", costs.step_scores(32, h, BF16), step_scores(32, h))
            for h in (1536, 8192)
        ),
        Case(
            "step_scores",
            "32 steps of 3584, hidden layer",
            costs.hidden_layer(32, 3584, 3584, BF16),
            hidden_layer(32, 3584, 3584),
        ),
        Case(
            "aggregate_steps",
            "65,536 chains of 10",
            costs.aggregate_steps(655_360, 65_536),
            aggregate_steps(655_360, 65_536),
        ),
        Case("prune", "64 groups of 64, k = 4", costs.prune(4096, 64, 4), prune(64, 64, 4)),
        Case("prune", "64 groups of 4096, k = 8", costs.prune(262_144, 64, 8), prune(64, 4096, 8)),
        Case(
            "score_and_prune",
            "16 groups of 16, 4096",
            costs.score_and_prune(256, 4096, 16, 4, BF16),
            score_and_prune(256, 4096, 16, 4),
        ),
        *(
            Case("append_kv_", f"{n} tokens, 8 x 128", costs.append_kv(n, 8, 128, BF16), append_kv(n, 8, 128))
            for n in (64, 2048)
        ),
        *(
            Case(
                "rope_append_",
                f"{n} tokens, 32 and 8 x 128",
                costs.rope_append(n, 32, 8, 128, BF16),
                rope_append(n, 32, 8, 128),
            )
            for n in (64, 2048)
        ),
        Case("copy_pages_", "48 pages, 64 caches", costs.copy_pages(48, 64, page), copy_pages(48, 64, page)),
    ]


def seconds(case: Case, gpu: GPU, find: Callable[[str, int], Kernel]) -> float:
    """Predicted for all launches of a case; ``find`` gives a kernel by pattern and architecture."""
    return sum(launch.seconds(gpu, find(launch.kernel, gpu.architecture).blocks) for launch in case.launches)


def table(kernels: Sequence[Kernel]) -> str:
    """One row for each case: roofline, prediction and their quotient on each GPU."""

    def find(pattern: str, architecture: int) -> Kernel:
        return next(k for k in kernels if k.architecture == architecture and re.search(pattern, k.name))

    lines = [
        f"| op | size | least bytes | least operations | {' | '.join(f'{name}, us' for name in GPUS)} |",
        f"| --- | --- | ---: | ---: |{' --- |' * len(GPUS)}",
    ]
    for case in cases():
        cells = []
        for gpu in GPUS.values():
            least, predicted = gpu.roofline(case.bound), seconds(case, gpu, find)
            cells.append(f"{1e6 * least:.3g} / {1e6 * predicted:.3g} = {least / predicted:.0%}")
        numbers = f"{case.bound.bytes / 1e6:.3g} MB | {case.bound.operations / 1e9:.3g} G"
        lines.append(f"| {case.op} | {case.size} | {numbers} | {' | '.join(cells)} |")
    return "\n".join(lines)
