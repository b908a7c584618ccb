"""Answers that are sent in parts, as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import anyio
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from tts_search.serve.errors import ApiError, error_body

__all__ = ["event", "new_id", "now", "streamed"]


_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def new_id(kind: str) -> str:
    """A name that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"


def now() -> int:
    """The time, as OpenAI's clients read it."""
    return int(time.time())


def event(data: Any, name: str | None = None) -> bytes:
    """One event."""
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
    end = time.monotonic() + timeout_s
    try:
        while True:
            try:
                with anyio.fail_after(end - time.monotonic()):  # in this very task: nobody closes events that run
                    part = await anext(events)
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
        await events.aclose()
