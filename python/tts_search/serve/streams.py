"""Answers that are sent in parts, as server-sent events."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, cast

from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from tts_search.serve.errors import ApiError, error_body

__all__ = ["event", "new_id", "now", "streamed"]


_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def new_id(kind: str) -> str:
    """An id that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"


def now() -> int:
    """The time as in OpenAI's answers."""
    return int(time.time())


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else _encode(data)
    return format_sse_event(data_str=text, event=name)


def streamed(
    events: AsyncGenerator[bytes, None], timeout_s: float, *, error_name: str | None = None
) -> StreamingResponse:
    """An answer of these events. What goes wrong on the way is the last one; a client that goes away closes them."""
    return StreamingResponse(
        _guarded(events, timeout_s, error_name),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _guarded(
    events: AsyncGenerator[bytes, None], timeout_s: float, error_name: str | None
) -> AsyncIterator[bytes]:
    patience = _Patience(timeout_s)
    try:
        while True:
            try:
                part = await patience.wait(events)
            except StopAsyncIteration:
                return
            except ApiError as error:
                yield event(error_body(error.status, error.message, error.param), error_name)
                return
            except TimeoutError:
                yield event(error_body(504, f"not done in {timeout_s:g} s"), error_name)
                return
            yield part
    finally:
        patience.end()
        await events.aclose()


class _Patience:
    """The time that a task has for its waits together; a cancel scope around each costs a fifth of what a part does."""

    def __init__(self, seconds: float) -> None:
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._alarm = asyncio.get_running_loop().call_later(seconds, self._ring)
        self._waits = self._is_over = False

    def _ring(self) -> None:
        self._is_over = True
        if self._waits:
            self._task.cancel()

    async def wait(self, events: AsyncGenerator[bytes, None]) -> bytes:
        """Wait for the next part; `TimeoutError` when the time is over."""
        if self._is_over:
            raise TimeoutError
        self._waits = True
        try:
            return await anext(events)  # in this very task: nobody closes events that run
        except asyncio.CancelledError:
            if not self._is_over:
                raise
            if sys.version_info >= (3, 11):
                self._task.uncancel()
            raise TimeoutError from None
        finally:
            self._waits = False

    def end(self) -> None:
        """Nothing is waited for any more."""
        self._alarm.cancel()
