"""The process of a server: one event loop, one engine thread; it ends when its last answer has been sent."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType
from typing import Final

import uvicorn

from tts_search.serve.app import create_app
from tts_search.serve.connection import protocol
from tts_search.serve.service import Service

__all__ = ["LOOPBACK", "serve", "server_config"]

LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_MOST_CONNECTIONS: Final = 4096
_KEEP_ALIVE_S: Final = 75  # a busy client can use its connection again


def serve(service: Service, *, host: str, port: int, drain_s: int = 600) -> None:
    """Serve until a signal is received.

    After SIGTERM or SIGINT it accepts no more connections, and waits at most `drain_s` seconds for unfinished answers.

    Parameters
    ----------
    service : Service
        The service.
    host, port : str, int
        The address.
    drain_s : int
        How long to wait.

    Raises
    ------
    SystemExit
        After a signal, with status 0.
    """
    _set_up_logs()
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises these again when it has ended
        signal.signal(number, _end)
    uvicorn.Server(server_config(service, host=host, port=port, drain_s=drain_s)).run()


def server_config(service: Service, *, host: str = "127.0.0.1", port: int = 0, drain_s: int = 600) -> uvicorn.Config:
    """How uvicorn serves a service; the parameters are those of `serve`, and port 0 is any free one."""
    return uvicorn.Config(
        create_app(service),
        host=host,
        port=port,
        ws="none",
        http=protocol(service.settings.client_timeout_s),
        h11_max_incomplete_event_size=service.settings.max_header_bytes,
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s,
    )


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _set_up_logs() -> None:
    """Log requests to standard output, one line of JSON each, and everything else to standard error."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    access = logging.getLogger("tts_search.serve.access")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.handlers, access.propagate = [handler], False
    access.setLevel(logging.INFO)
