"""Hands news of many handles from the engine's thread to an event loop, without keeping the engine waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any, Final

from tts_search.engine.engine import Handle, News

__all__ = ["Post", "together"]

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


async def together(handles: Sequence[Handle[Any, News]], post: Post) -> AsyncGenerator[list[tuple[int, News]], None]:
    """Yield the events of several handles, each with the index of its handle, until all have ended.

    Events that came since the last request are yielded as one list.
    """
    told = asyncio.Queue[list[tuple[int, list[News] | None]]]()
    fresh = set(range(len(handles)))  # handles without any news so far

    def listener(place: int, news: list[News] | None) -> None:
        post.put(told, (place, news), at_once=news is None or place in fresh)
        fresh.discard(place)

    listeners = [partial(listener, place) for place in range(len(handles))]
    for one, own in zip(handles, listeners, strict=True):
        one.listen(own)
    try:
        left = len(handles)
        while left:
            found = await told.get()
            while not told.empty():
                found += told.get_nowait()
            if news := [(place, event) for place, events in found for event in events or ()]:
                yield news
            left -= sum(events is None for _, events in found)
    finally:
        for one, own in zip(handles, listeners, strict=True):
            one.ignore(own)
