"""Decode steps as CUDA graphs, because starting hundreds of small kernels takes more time than running them.

A decode step processes one token of each branch. Its kernels, their arguments and their memory are the same for any
step with as many rows. So the whole step is recorded as one CUDA graph, and only the batch's tensors are filled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from tts_search.models.decoder import Batch, Decoder, KVPool

__all__ = ["CudaGraphs", "DecodeGraphs", "Recorder", "decode_graphs"]

MAX_ROWS: Final = 256


class Recorder(Protocol):
    """Records work on a device, and repeats it on the current content of its tensors."""

    def capture(self, work: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        """Return an object to replay, and the tensor that has ``work``'s result after each replay."""
        ...

    def replay(self, recorded: Any) -> None:
        """Run it."""
        ...


class CudaGraphs:
    """`Recorder` by CUDA graphs on a device. All graphs share the memory of their intermediate results."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: Any = None

    def capture(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Run ``work`` once, to compile kernels and initialise libraries, then record it."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory):
                output = work()
        self._memory = graph.pool()
        return graph, output

    def replay(self, recorded: torch.cuda.CUDAGraph) -> None:
        """Start it on the current stream."""
        recorded.replay()


@dataclass(frozen=True, slots=True)
class _Step:
    """A recorded decode step, the batch that it reads, and its logits."""

    batch: Batch
    recorded: Any
    logits: Tensor


class DecodeGraphs:
    """Decode steps of a decoder over a pool, recorded by their number of rows.

    A batch is filled up to the next recorded size: a power of two up to a page's tokens, then a multiple of them. The
    additional rows are the first tokens of a branch that is only used for this; it keeps one page of the pool.

    Parameters
    ----------
    decoder : Decoder
        A decoder with ``records``.
    pool : KVPool
        A pool with at least one free page.
    recorder : Recorder
        Records and replays the steps.
    """

    def __init__(self, decoder: Decoder, pool: KVPool, recorder: Recorder) -> None:
        self.decoder = decoder
        self.pool = pool
        self.recorder = recorder
        self._steps: dict[int, _Step] = {}
        self._spare = pool.forest.add_root()
        pool.append([self._spare], [1])

    def logits(
        self,
        branches: Sequence[int] | Tensor,
        tokens: Sequence[int] | Tensor,
        positions: Sequence[int] | Tensor,
        slots: Tensor,
    ) -> Tensor | None:
        """Logits [B, V] of the newest token of each branch, valid until the next call; None if there are too many.

        A step of a new size is recorded. If an attention plan has outgrown the tables of a step, it is recorded again.
        """
        rows = len(branches)
        size = self._size(rows)
        if size > MAX_ROWS:
            return None
        branches, tokens, positions = map(torch.as_tensor, (branches, tokens, positions))
        counts = torch.ones(rows, dtype=torch.int64)
        if spare := size - rows:
            self.pool.forest.truncate(self._spare, 0)  # its page is free for the next line
            slots = torch.cat([slots, self.pool.append([self._spare], [spare])])
            branches = torch.cat([branches, torch.tensor([self._spare])])
            counts = torch.cat([counts, torch.tensor([spare])])
            tokens = torch.cat([tokens, torch.zeros(spare, dtype=torch.int64)])
            positions = torch.cat([positions, torch.arange(spare)])
        fill = partial(self.pool.batch, branches, counts, tokens, positions, slots)
        step = self._refilled(self._steps.get(size), fill)
        if step is None:
            batch = fill()
            step = _Step(batch, *self.recorder.capture(lambda: self.decoder.logits(batch, self.pool.kv)))
            self._steps[size] = step
        self.recorder.replay(step.recorded)
        return step.logits[:rows]

    def _size(self, rows: int) -> int:
        page = self.pool.forest.page_size
        return -(-rows // page) * page if rows > page else min(page, 1 << (rows - 1).bit_length())

    @staticmethod
    def _refilled(step: _Step | None, fill: Callable[..., Batch]) -> _Step | None:
        """The step with a new batch in its tensors; None if there is no step, or the plan does not fit."""
        if step is None:
            return None
        try:
            fill(out=step.batch)
        except ValueError:
            return None
        return step


def decode_graphs(decoder: Decoder, pool: KVPool) -> DecodeGraphs | None:
    """Recorded steps for a decoder and its pool, if that is possible and faster: on CUDA GPUs."""
    if not (decoder.records and pool.records) or decoder.device.type != "cuda":
        return None
    return DecodeGraphs(decoder, pool, CudaGraphs(decoder.device))
