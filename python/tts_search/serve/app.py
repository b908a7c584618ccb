"""The application: the routes, and the checks in front of all of them."""

from __future__ import annotations

from fastapi import Depends, FastAPI
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tts_search.serve import chat, compat, completions, info, page, pooling, searching
from tts_search.serve.access import AccessLog
from tts_search.serve.errors import add_handlers
from tts_search.serve.guards import Deadline, HeaderLimit, admitted, authorised
from tts_search.serve.service import Service

__all__ = ["create_app"]


def create_app(service: Service) -> FastAPI:
    """Return the application of a service.

    It has no documentation pages, because these would load scripts from elsewhere. It has no CORS, so browsers let only
    its own page talk to it. If it is bound to this machine, requests under other host names are refused. So a page of a
    foreign name that points to this machine cannot use it either.
    """
    app = FastAPI(title="tts-search", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    add_handlers(app)
    app.include_router(info.open_routes)
    app.include_router(page.routes)
    app.include_router(info.routes, dependencies=[Depends(authorised)])
    for family in (completions, chat, pooling, searching, compat):
        app.include_router(family.routes, dependencies=[Depends(authorised), Depends(admitted)])
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=service.settings.max_body)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(service.settings.hosts), www_redirect=False)
    app.add_middleware(Deadline, timeout_s=service.settings.timeout_s)
    app.add_middleware(HeaderLimit, count=service.settings.max_headers, size=service.settings.max_header_bytes)
    app.add_middleware(AccessLog)
    return app
