"""Servers for tests: one over functions of text, one over the smallest demo models."""

# What needs the extra is imported when it is known to be there.
# ruff: noqa: E402

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
for folder in ("tests/models", "tests/search"):
    if str(ROOT / folder) not in sys.path:
        sys.path.append(str(ROOT / folder))

pytest.importorskip("fastapi", reason="the server needs the extra serve")

import arithmetic_models
import uvicorn
from fastapi.testclient import TestClient
from tts_search import Engine
from tts_search.lab.checkpoints import load_models
from tts_search.serve.app import create_app
from tts_search.serve.server import server_config
from tts_search.serve.service import Service
from tts_search.serve.settings import Settings

SETTINGS = Settings(names=("policy", "alias"), verifier_names=("verifier",))
Serve = Callable[..., TestClient]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers over any models, in this process, without a socket."""
    with ExitStack() as stack:

        def start(policy: Any, verifier: Any = None, **changes: Any) -> TestClient:
            engine = stack.enter_context(Engine(policy, verifier))
            app = create_app(Service(engine, policy, verifier, replace(SETTINGS, **changes)))
            return stack.enter_context(TestClient(app, base_url="http://127.0.0.1"))

        yield start


@pytest.fixture
def texts(serve: Serve) -> TestClient:
    """A server over functions of text that solve arithmetic."""
    return serve(arithmetic_models.policy(0.3), arithmetic_models.verifier(0.1))


@pytest.fixture(scope="session")
def models() -> tuple[Any, Any]:
    """The smallest demo models."""
    loaded = load_models()
    return loaded.policies["policy-0.1m"], loaded.verifiers["prm-weak"]


@pytest.fixture(scope="session")
def service(models: tuple[Any, Any]) -> Iterator[Service]:
    """An engine over them."""
    with Engine(*models) as engine:
        yield Service(engine, *models, SETTINGS)


@pytest.fixture(scope="session")
def local(service: Service) -> Iterator[TestClient]:
    """A server over them."""
    with TestClient(create_app(service), base_url="http://127.0.0.1") as client:
        yield client


class Live:
    """A server on a socket of this machine, in a thread.

    Attributes
    ----------
    url : str
        Where it is.
    """

    def __init__(self, service: Service) -> None:
        self.server = uvicorn.Server(server_config(service))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Live:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="session")
def live(service: Service) -> Iterator[str]:
    """The address of a server over the smallest demo models."""
    with Live(service) as server:
        yield server.url


@pytest.fixture
def live_over() -> Iterator[Callable[..., Any]]:
    """Starts servers on sockets, over any models; yields (address, engine)."""
    with ExitStack() as stack:

        def start(policy: Any, verifier: Any = None, **changes: Any) -> tuple[str, Engine]:
            engine = stack.enter_context(Engine(policy, verifier))
            server = stack.enter_context(Live(Service(engine, policy, verifier, replace(SETTINGS, **changes))))
            return server.url, engine

        yield start
