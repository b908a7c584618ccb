"""HTTP requests that another thread can break off."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection
from typing import Any
from weakref import WeakSet

__all__ = ["Line"]


class Line:
    """Sends JSON, from any number of threads, until it is cut."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: WeakSet[HTTPConnection] = WeakSet()
        self._opener = urllib.request.build_opener(_Http(self), _Https(self))
        self.is_cut = False

    def send(self, url: str, body: Any, headers: Mapping[str, str], timeout: float) -> Any:
        """Return what a server answers to a body; None: GET.

        Raises
        ------
        OSError
            If there is no answer, or no good one, or it is cut meanwhile.
        ValueError
            If it is no JSON.
        """
        data = None if body is None else json.dumps(body).encode()
        with self._opener.open(urllib.request.Request(url, data, dict(headers)), timeout=timeout) as reply:
            return json.loads(reply.read())

    def cut(self) -> None:
        """Break off all requests that are under way, and refuse others."""
        with self._lock:
            self.is_cut = True
            for connection in self._connections:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def opened(self, kind: Callable[..., HTTPConnection], host: str, **options: Any) -> HTTPConnection:
        """Return a connection that `cut` closes."""
        connection = kind(host, **options)
        connection.connect = partial(self._connect, connection, connection.connect)  # type: ignore[method-assign]
        return connection

    def _connect(self, connection: HTTPConnection, connect: Callable[[], None]) -> None:
        connect()
        with self._lock:
            self._connections.add(connection)
            if self.is_cut:
                raise ConnectionAbortedError("the request was cancelled")


class _Tracked(urllib.request.AbstractHTTPHandler):
    """Opens connections on a line."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def do_open(self, http_class: Any, req: urllib.request.Request, **http_conn_args: Any) -> Any:
        return super().do_open(partial(self._line.opened, http_class), req, **http_conn_args)


class _Http(_Tracked, urllib.request.HTTPHandler):
    pass


class _Https(_Tracked, urllib.request.HTTPSHandler):
    pass
