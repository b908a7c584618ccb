"""Streams: steps on their way through a model, token by token.

They share a decoder and its pool, join and leave between any two forwards, and are served in the order of their age.
When the pool is full, the youngest stream gives up its pages and waits. The oldest always continues, so no stream waits
for ever.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor

import tts_kernels as tk
from tts_search.models.branches import NO_ROWS, Forwarded, Rows, TokenBranch
from tts_search.models.decoder import Batch
from tts_search.models.pool import BranchPool

if TYPE_CHECKING:
    from tts_search.models.decoder import Decoder

__all__ = ["Lane", "Stream", "Streams"]

_MANY = 1 << 30


@dataclass(slots=True)
class Lane:
    """A model: its decoder, the pool of its KV, and a counter for the ages of its streams.

    ``waves`` counts how many times a stream gave up its pages.
    """

    decoder: Decoder
    pool: BranchPool
    ages: Iterator[int] = field(default_factory=itertools.count)
    waves: int = 0


@dataclass(slots=True, eq=False)
class Stream:
    """Work on a branch.

    Attributes
    ----------
    branch : TokenBranch
        The branch that is read or grown.
    streams : Streams
        The group that it runs in.
    age : int
        Its place in the order of streams, oldest first.
    error : Exception or None
        The reason why it ended before it was done.
    """

    branch: TokenBranch
    streams: Streams[Stream] = field(init=False, repr=False)
    age: int = field(init=False, default=-1)
    error: Exception | None = field(init=False, default=None)

    @property
    def num_rows(self) -> int:
        """How many rows it has, or will have."""
        return 1

    def give_up(self) -> None:
        """Free the branch's KV and wait until there is room again."""
        self.streams.give_up(self)

    def fail(self, error: Exception) -> None:
        """End with this error."""
        self.error = error
        self.streams.fail(self)

    def without(self, gone: Collection[Stream]) -> bool:
        """Whether anything is left of it without the streams in ``gone``."""
        return self not in gone


S = TypeVar("S", bound=Stream)


class Streams(Generic[S]):
    """Streams of one kind on a lane.

    Parameters
    ----------
    lane : Lane
        The model.
    most : int or None
        The largest number of streams that run at a time.
    """

    def __init__(self, lane: Lane, most: int | None = None) -> None:
        self.lane = lane
        self.most = most or _MANY
        self._waiting: list[tuple[int, S]] = []
        self._reading: dict[S, None] = {}  # streams with unread tokens
        self._ended: list[S] = []
        self._quota = _MANY  # how many may start now: after a shortage 1, then 2, 4, ...

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._ended or self.num_running)

    @property
    def num_running(self) -> int:
        """Streams that run."""
        return len(self._reading)

    @property
    def num_waiting(self) -> int:
        """Streams that wait for room."""
        return len(self._waiting)

    def _join(self, stream: S, age: int | None = None) -> None:
        stream.streams = self  # type: ignore[assignment]  # a stream knows no more of it than `Streams` has
        stream.age = next(self.lane.ages) if age is None else age
        self._wait(stream)

    def _wait(self, stream: S) -> None:
        heapq.heappush(self._waiting, (stream.age, stream))

    def give_up(self, stream: S) -> None:
        """Free a stream's KV, and let the stream wait."""
        del self._reading[stream]
        self._put_off(stream)

    def _put_off(self, stream: S) -> None:
        stream.branch.meter.waves += 1
        self.lane.waves += 1
        self.lane.pool.leave(stream, keep=False)
        self._wait(stream)
        self._quota = 1

    def fail(self, stream: S) -> None:
        """End a stream that has an error."""
        del self._reading[stream]
        self.lane.pool.leave(stream)
        self._ended.append(stream)

    def cancel(self, gone: Collection[S]) -> None:
        """Drop streams, whether they wait or run. The caller frees the KV of their branches."""
        self._waiting = [entry for entry in self._waiting if entry[1].without(gone)]
        heapq.heapify(self._waiting)
        self._ended = [stream for stream in self._ended if stream not in gone]
        for stream in [stream for stream in self._reading if not stream.without(gone)]:
            del self._reading[stream]
            self.lane.pool.leave(stream)

    def _admit(self) -> None:
        """Start streams, the oldest first, unless the pool is full."""
        pool = self.lane.pool
        self._quota = min(2 * self._quota, _MANY)
        room = self.most - self.num_running
        for _ in range(self._quota):
            if not self._waiting or room <= 0 or (pool.full and pool.workers):
                return
            _, stream = heapq.heappop(self._waiting)
            room -= stream.num_rows
            pool.workers[stream] = None
            self._begin(stream)

    def _begin(self, stream: S) -> None:
        self._reading[stream] = None

    def _rows(self) -> Rows:
        """The branches that grow by one token in each forward."""
        return NO_ROWS

    def _forward(
        self, model: Callable[[Batch, tk.KVCache, Tensor | None], Tensor], head: bool, most: int | None = None
    ) -> Forwarded | None:
        """One forward of all running streams, as far as there is room; None if no stream runs."""
        self._admit()
        while self.num_running:
            branches = [stream.branch for stream in sorted(self._reading, key=lambda stream: stream.age)]
            try:
                return self.lane.pool.forward(branches, model, head, self._rows(), most)
            except tk.OutOfPages:
                self.lane.pool.make_room()
        return None
