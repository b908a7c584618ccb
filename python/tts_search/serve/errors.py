"""Errors in the form that clients of OpenAI's API expect. They name the mistake, and show nothing of the machine."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tts_search.terminal import sanitize

__all__ = ["ApiError", "add_handlers", "error_body"]

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
_MOST = 500  # the longest message in characters


class ApiError(Exception):
    """An error with an HTTP status, as the answer to a request.

    Parameters
    ----------
    status : int
        The HTTP status of the answer.
    message : str
        What was expected and what was given.
    param : str or None
        The invalid field.
    headers : mapping or None
        HTTP headers of the answer.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = headers


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of the answer for an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": sanitize(message)[:_MOST], "type": kind, "param": param, "code": status}}


def add_handlers(app: FastAPI) -> None:
    """Let an application answer errors in this format."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)


def _answer(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param), status, headers=headers)


async def _api_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _answer(error.status, error.message, error.param, error.headers)


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    """The answer to an invalid body. It names the first invalid field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])[:80] or None
    return _answer(400, f"{place}: {first['msg']}" if place else first["msg"], place)


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _answer(error.status_code, str(error.detail), headers=error.headers)


async def _unexpected(_request: Request, _error: Exception) -> JSONResponse:
    """The answer to an error in the server. Details are only in the log."""
    return _answer(500, HTTPStatus.INTERNAL_SERVER_ERROR.phrase)
