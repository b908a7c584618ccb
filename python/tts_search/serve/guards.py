"""Guards: who may send requests, how many at a time, and how long they may take."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tts_search.errors import ConfigError, SearchError
from tts_search.serve.errors import ApiError, error_body
from tts_search.serve.service import Served

__all__ = ["GONE", "Deadline", "HeaderLimit", "admitted", "authorised", "refusal", "while_wanted"]

T = TypeVar("T")

GONE = 499  # status in the log if the client closed the connection
_GRACE_S = 5.0
_bearer = HTTPBearer(auto_error=False)


class HeaderLimit:
    """Refuses requests with too many headers, before anything reads them."""

    def __init__(self, app: ASGIApp, count: int, size: int) -> None:
        self.app = app
        self.count, self.size = count, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        headers = scope.get("headers", ())
        if len(headers) > self.count or sum(len(name) + len(value) for name, value in headers) > self.size:
            message = f"expected at most {self.count} headers, and {self.size} bytes of them"
            answer = JSONResponse(error_body(431, message), 431, {"Connection": "close"})
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send)


class Deadline:
    """Ends requests that take too long for any reason: for example, a client may send no body, or read nothing.

    The work for a request has its own limit, slightly earlier, so that the answer can report it.
    """

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self.app = app
        self.timeout_s = timeout_s + _GRACE_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or end it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await asyncio.wait_for(self.app(scope, receive, noted), self.timeout_s)
        except asyncio.TimeoutError:
            if not has_begun:
                answer = JSONResponse(error_body(408, "the request did not come to its end in time"), 408)
                await answer(scope, receive, send)


async def authorised(
    service: Served, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
) -> None:
    """Let clients with a valid key pass. Keys are compared in constant time."""
    keys = service.settings.keys
    shown = given.credentials.encode() if given else b""
    matches = sum(secrets.compare_digest(shown, key.encode()) for key in keys)
    if keys and not matches:
        raise ApiError(401, "expected a valid key in Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})


async def admitted(service: Served) -> AsyncIterator[None]:
    """Admit a request until its answer has been sent, unless there are too many."""
    if service.num_requests >= service.settings.max_queue:
        raise ApiError(
            429, f"{service.num_requests} requests run or wait; try again later", headers={"Retry-After": "1"}
        )
    service.num_requests += 1
    try:
        yield
    finally:
        service.num_requests -= 1


async def while_wanted(request: Request, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """Run some work while the client is connected and there is time. Otherwise, the work is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(GONE, "the client went away") if gone.done() else ApiError(504, f"not done in {timeout_s:g} s")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Wait until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refusal(error: SearchError) -> ApiError:
    """An error of the engine as one of the API. Errors that the client can correct are reported to it."""
    if error.problem is None and not isinstance(error, ConfigError) and error.message.startswith("engine:"):
        return ApiError(503, "the engine does not run")
    if error.__cause__ is not None and not isinstance(error.__cause__, (ValueError, TypeError)):
        return ApiError(500, "the search failed")
    return ApiError(400, error.message)
