"""An event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

__all__ = ["LoopThread", "wait_for"]

T = TypeVar("T")
_CALLS: Final = 64  # blocking calls at once, each in a thread; asyncio's own number is small on small machines


class LoopThread:
    """An event loop whose thread starts with the first call of `get` and ends with `close`. It may start again.

    It works inside a running loop (a notebook, a server), and a client that is bound to its loop works in every round.

    Parameters
    ----------
    last : coroutine function or None
        Called on the loop at its end, when all tasks have been cancelled.
    """

    def __init__(self, last: Callable[[], Awaitable[None]] | None = None) -> None:
        self._last = last
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the running loop."""
        with self._lock:
            if self._loop is None or self._thread is None or not self._thread.is_alive():  # not alive: after a fork
                self._loop = asyncio.new_event_loop()
                self._loop.set_default_executor(ThreadPoolExecutor(_CALLS, "tts_search"))
                self._thread = threading.Thread(target=self._work, args=(self._loop,), name="tts_search", daemon=True)
                self._thread.start()
            return self._loop

    def close(self) -> None:
        """Cancel all tasks, and return when their threads and the loop's have ended."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None and thread.is_alive():
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.run_forever()
        loop.run_until_complete(self._end())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._last is not None:
            await self._last()


_SHARED: Final = LoopThread()  # of the process


def wait_for(awaitable: Awaitable[T]) -> T:
    """Wait for something that runs on an event loop, the same for all callers."""

    async def run() -> T:
        return await awaitable

    future = asyncio.run_coroutine_threadsafe(run(), _SHARED.get())
    try:
        return future.result()
    except BaseException:  # Ctrl-C
        future.cancel()
        raise
