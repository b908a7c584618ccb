"""Connections: slow clients have a time limit, both those that send slowly and those that do not read."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["protocol"]

_PROGRESS: Final = 1024  # bytes that a client has to read in the time limit while the server waits for it


def protocol(seconds: float) -> type[H11Protocol]:
    """Connections of uvicorn with a time limit for slow clients.

    uvicorn itself limits only idle connections, and the application sees a request when its headers are complete. Here
    a request has to be complete within `seconds` of its first byte (the first request: of the connection). If the
    server cannot write because the client does not read, the connection is closed after the same time.
    """

    class Connection(H11Protocol):
        _arrival: asyncio.TimerHandle | None = None
        _reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._arrival = self.loop.call_later(seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                _cancel(self._arrival)
                self._arrival = None
            elif self._arrival is None:
                self._arrival = self.loop.call_later(seconds, self.transport.close)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait_for_reader()

        def resume_writing(self) -> None:
            _cancel(self._reading)
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._arrival)
            _cancel(self._reading)
            super().connection_lost(exc)

        def _wait_for_reader(self) -> None:
            unread = self.transport.get_write_buffer_size()
            self._reading = self.loop.call_later(seconds, self._look_at_reader, unread)

        def _look_at_reader(self, before: int) -> None:
            if self.transport.get_write_buffer_size() > before - _PROGRESS:
                self.transport.abort()
            else:
                self._wait_for_reader()

    return Connection


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
