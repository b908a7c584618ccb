"""Streams of events end with the error, if there is one, and the work that they wait for ends with them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

import anyio
from tts_search.search.protocol import Generated
from tts_search.serve.errors import ApiError
from tts_search.serve.generation import _by_sample
from tts_search.serve.streams import event, streamed


async def endless(closed: list[str]) -> AsyncGenerator[bytes, None]:
    try:
        yield event("first")
        await anyio.sleep(60)
    finally:
        try:
            await anyio.sleep(0.01)  # freeing takes its time
        finally:
            closed.append("closed")


def test_a_client_that_goes_away_closes_them_while_they_wait():
    closed: list[str] = []

    async def main() -> None:
        async def read() -> None:
            async for _ in streamed(endless(closed), 60).body_iterator:
                began.set()

        began = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await began.wait()
            await anyio.sleep(0.02)
            group.cancel_scope.cancel()

    anyio.run(main)
    assert closed == ["closed"]


def test_time_and_errors_are_the_last_event():
    async def failing() -> AsyncGenerator[bytes, None]:
        yield event("first")
        raise ApiError(400, "no such thing")

    async def read(events: AsyncGenerator[bytes, None]) -> list[bytes]:
        return [bytes(part) async for part in streamed(events, 0.05, error_name="error").body_iterator]

    closed: list[str] = []
    for events, code in ((endless(closed), 504), (failing(), 400)):
        first, last = anyio.run(read, events)
        assert first == b"data: first\n\n"
        name, data = last.decode().strip().split("\n")
        assert name == "event: error"
        assert json.loads(data.removeprefix("data: "))["error"]["code"] == code
    assert closed == ["closed"]


def test_parts_that_a_slow_reader_finds_waiting_are_one_for_each_sample():
    """Nothing is lost or reordered; parts of other samples and prompts stay apart."""
    parts = [Generated(0, "a", (1,)), Generated(1, "x", (7,)), Generated(0, "b", (2, 3), reason="eos")]
    found = _by_sample([*((0, part) for part in parts), (1, parts[0])])
    assert {where: Generated.joined(own) for where, own in found.items()} == {
        (0, 0): Generated(0, "ab", (1, 2, 3), reason="eos"), (0, 1): parts[1], (1, 0): parts[0]
    }  # fmt: skip
