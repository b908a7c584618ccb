"""The process of a server: one event loop, one engine thread; it ends when its last answer has been sent."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType
from typing import Final

import uvicorn

from tts_search.serve.app import create_app
from tts_search.serve.service import Service

__all__ = ["LOOPBACK", "serve"]

LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_MOST_CONNECTIONS: Final = 4096
_KEEP_ALIVE_S: Final = 75  # a client that was busy finds its connection again


def serve(service: Service, *, host: str, port: int, drain_s: int = 600) -> None:
    """Serve until a signal comes.

    SIGTERM and SIGINT have it take no more connections and wait for the answers under way, `drain_s` seconds at most.

    Parameters
    ----------
    service : Service
        What is served.
    host, port : str, int
        Where.
    drain_s : int
        How long to wait.

    Raises
    ------
    SystemExit
        After a signal, with status 0.
    """
    _set_up_logs()
    for number in (signal.SIGTERM, signal.SIGINT):  # what uvicorn raises again when it has ended
        signal.signal(number, _end)
    config = uvicorn.Config(
        create_app(service),
        host=host,
        port=port,
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s,
    )
    uvicorn.Server(config).run()


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _set_up_logs() -> None:
    """Accesses to standard output, one line of JSON each; the rest to standard error."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    access = logging.getLogger("tts_search.serve.access")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.handlers, access.propagate = [handler], False
    access.setLevel(logging.INFO)
