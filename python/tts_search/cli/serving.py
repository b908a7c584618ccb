"""The command ``tts-search serve``."""

# Options that may be given several times have lists as defaults.
# ruff: noqa: B006

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from tts_search.cli.commands import app
from tts_search.cli.loading import JUDGE, load_checkpoints
from tts_search.cli.options import (
    SPECULATE,
    Device,
    Dtype,
    FormatName,
    KvType,
    Memory,
    PolicyPath,
    QuantizeOption,
    SelfTest,
    Speculating,
    SystemPrompt,
    VerifierPath,
    naming,
)
from tts_search.errors import SearchError, require

__all__ = ["app", "serve"]


@app.command(epilog="Example: tts-search serve --policy policy-0.1m --verifier prm-strong, then open the address")
def serve(
    policy: PolicyPath,
    verifier: VerifierPath = None,
    host: Annotated[str, Option(help="Address to listen at; by default only this machine can reach it.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, Option(help="File with the keys of those who may use the models, one per line.", dir_okay=False)
    ] = None,
    served_model_name: Annotated[
        list[str], Option(help="What requests call the policy; may be given several times.")
    ] = [],
    served_verifier_name: Annotated[list[str], Option(help="What requests call the verifier, likewise.")] = [],
    max_queue: Annotated[int, Option(min=1, help="Requests at a time; more are sent away.")] = 256,
    max_n: Annotated[int, Option(min=1, help="Answers of one request, or candidates of a search.")] = 256,
    max_rows: Annotated[int | None, Option(min=1, help="Steps that are sampled at a time.")] = None,
    speculate: Speculating = "auto",
    pooling: Annotated[
        Literal["steps", "tokens"],
        Option(
            help="What /pooling scores: the steps that the verifier's format says, or, without a format of steps, all "
            "tokens. (With tokens the verifier serves no search.)"
        ),
    ] = "steps",
    timeout: Annotated[float, Option(min=0.1, help="Seconds that a request may take.")] = 600.0,
    client_timeout: Annotated[float, Option(min=0.1, help="Seconds that a client may take to send a request.")] = 60.0,
    drain: Annotated[int, Option(min=0, help="Seconds to wait for answers under way when it is to end.")] = 600,
    allow_chat_template: Annotated[
        bool, Option("--allow-chat-template", help="Let requests bring a chat template, which is a program.")
    ] = False,
    system_prompt: SystemPrompt = None,
    format: FormatName = "auto",  # noqa: A002
    dtype: Dtype = None,
    device: Device = None,
    kv_memory: Memory = None,
    kv_dtype: KvType = None,
    quantize: QuantizeOption = None,
    self_test: SelfTest = True,
) -> None:
    """Serve the models over HTTP, as OpenAI's API, as a process reward model and as a search, with a page to watch."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    from tts_search.engine.engine import Engine
    from tts_search.serve.server import LOOPBACK
    from tts_search.serve.server import serve as serve_
    from tts_search.serve.service import Service
    from tts_search.serve.settings import Settings, default_name, read_keys

    if pooling == "tokens" and (verifier is None or verifier.startswith(JUDGE)):
        raise SearchError(f"--pooling: expected steps without a --verifier that classifies tokens, got {pooling}")
    keys: tuple[str, ...] = ()
    if api_key_file is not None:
        with naming("--api-key-file"):
            keys = read_keys(api_key_file)
    settings = Settings(
        names=tuple(served_model_name) or (default_name(policy),),
        verifier_names=tuple(served_verifier_name) or ((default_name(verifier),) if verifier else ()),
        keys=keys,
        hosts=Settings.hosts if host in LOOPBACK else ("*",),
        max_queue=max_queue,
        max_n=max_n,
        timeout_s=timeout,
        client_timeout_s=client_timeout,
        allow_chat_template=allow_chat_template,
    )
    options = (system_prompt, format, dtype, device, kv_memory, kv_dtype, quantize, self_test)
    models = load_checkpoints(policy, verifier, *options, every_token=pooling == "tokens")
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{settings.names[0]} at {where}: OpenAI's API under /v1, a page at /", file=sys.stderr)
    if not keys:
        print("warning: no --api-key-file: whoever reaches this address may use the models", file=sys.stderr)
    with Engine(*models, max_rows=max_rows, speculate=SPECULATE[speculate]) as engine:
        serve_(Service(engine, *models, settings), host=host, port=port, drain_s=drain)
