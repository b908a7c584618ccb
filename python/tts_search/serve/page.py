"""The page: a few files of the server's own, under a content security policy that allows nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter
from fastapi.responses import FileResponse

from tts_search.evaluation.page import VIEW
from tts_search.search.config import METHODS, SearchConfig
from tts_search.serve.errors import ApiError
from tts_search.serve.service import Served

__all__ = ["routes"]

routes = APIRouter()
_HERE: Final = Path(__file__).parent / "page"
_FILES: Final = {
    "page.js": _HERE / "page.js",
    "style.css": _HERE / "style.css",
    "tree.css": VIEW / "tree.css",
    "tree.js": VIEW / "tree.js",
}
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@routes.get("/")
async def index() -> FileResponse:
    """The page itself."""
    return FileResponse(_HERE / "index.html", headers=_HEADERS)


@routes.get("/page/about.json")
async def about(service: Served) -> dict[str, Any]:
    """Data about the server for the page."""
    scored = service.verifier is not None
    return {
        "policy": service.name,
        "verifier": service.settings.verifier_names[0] if scored else None,
        "needs_key": bool(service.settings.keys),
        "methods": [name for name in _PREFERRED if scored or not SearchConfig(name).needs_verifier],
    }


_PREFERRED: Final = ("beam_search", *(name for name in METHODS if name != "beam_search"))


@routes.get("/page/{name}")
async def file(name: str) -> FileResponse:
    """A file of the page."""
    if name not in _FILES:
        raise ApiError(404, "there is no such file")
    return FileResponse(_FILES[name], headers=_HEADERS)
