"""Hands news from the engine's thread to an event loop, without keeping the engine waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, Final

__all__ = ["Post"]

# After a message, the loop is left alone for this many times as long as it was busy, but at most this many seconds.
_REST: Final = 24
_LONGEST_S: Final = 0.2


class Post:
    """Carries news from a thread to an event loop.

    Python runs one thread at a time. While the loop writes to its clients, the engine waits, at each of the dozens of
    kernels that it calls in a step. So one call gives the loop all news, and the next call comes only after a rest.
    With few listeners the rest ends before the next token; with many listeners each gets longer parts. The beginning
    and the end of an answer are reported without delay.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        The loop in which the queues are read.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._items: dict[asyncio.Queue[list[Any]], list[Any]] = {}
        self._is_awake = True  # else it rests
        self._is_on_its_way = False
        self._alarm: asyncio.TimerHandle | None = None  # ends its rest

    def put(self, queue: asyncio.Queue[list[Any]], item: Any, *, at_once: bool = False) -> None:
        """Put an item into a queue, in a list with others that are for it; from any thread.

        Raises
        ------
        RuntimeError
            If the loop is closed.
        """
        if self._loop.is_closed():
            raise RuntimeError("the event loop is closed")
        with self._lock:
            self._items.setdefault(queue, []).append(item)
            if self._is_on_its_way or not (self._is_awake or at_once):
                return
            self._is_on_its_way = True
        self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            items, self._items = self._items, {}
            self._is_on_its_way = self._is_awake = False
        begun = time.thread_time()
        for queue, news in items.items():
            queue.put_nowait(news)
        self._loop.call_soon(self._rest, begun)  # runs after the listeners that were woken

    def _rest(self, begun: float) -> None:
        spent = time.thread_time() - begun
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self._loop.call_later(min(_LONGEST_S, _REST * spent), self._awake)

    def _awake(self) -> None:
        with self._lock:
            self._is_awake = True
            waits = bool(self._items) and not self._is_on_its_way
            self._is_on_its_way |= waits
        if waits:
            self._deliver()
