"""One line of JSON for each request, with the id by which it can be found."""

from __future__ import annotations

import json
import logging
import time
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["AccessLog"]

_LOG = logging.getLogger("tts_search.serve.access")


class AccessLog:
    """Logs for each request its client, path, status and duration, and never any text of a client or a model."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request and write its line."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        facts: dict[str, Any] = {"id": uuid.uuid4().hex, "status": None, "bytes": 0}
        begun = time.perf_counter()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = facts["id"]
                headers["x-content-type-options"] = "nosniff"
            elif message["type"] == "http.response.body":
                facts["bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            client = scope.get("client") or ("", 0)
            where = {"client": client[0], "method": scope["method"], "path": scope["path"]}
            seconds = round(time.perf_counter() - begun, 6)
            _LOG.info(json.dumps({"time": round(time.time(), 3), **where, **facts, "seconds": seconds}))
