"""Many clients at once, some of which disconnect or send nonsense: all answers are right, and nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx2
import pytest

CLIENTS = int(os.environ.get("TTS_LOAD_CLIENTS", "24"))
REQUESTS = int(os.environ.get("TTS_LOAD_REQUESTS", "10"))
PROBLEMS = [f"Start with {k}, add 5, multiply by 3. What is the result modulo 100?" for k in range(11, 19)]


def kinds(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    """A kind of request, its route and body; few different ones, so that each has its known answer."""
    problem, seed = rng.choice(PROBLEMS), rng.randrange(2)
    turns = [{"role": "user", "content": problem}]
    solution = [*turns, {"role": "assistant", "content": "11 + 5 = 16\n\n16 * 3 = 48"}]
    kind = rng.choice(["chat", "stream", "continued", "scored", "searched"])
    if kind == "scored":
        return kind, "/pooling", {"messages": solution}
    if kind == "continued":
        body = {"messages": solution, "continue_final_message": True, "add_generation_prompt": False}
        return kind, "/v1/chat/completions", {**body, "n": rng.choice([1, 4]), "max_tokens": 32, "seed": seed}
    if kind == "searched":
        fields = {"problem": problem, "method": rng.choice(["beam_search", "best_of_n"]), "n": 8}
        return kind, "/v1/search", {**fields, "max_step_tokens": 48, "seed": seed}
    body = {"messages": turns, "n": rng.choice([1, 4, 16]), "max_tokens": 48, "seed": seed}
    return kind, "/v1/chat/completions", body if kind == "chat" else {**body, "stream": True}


def told(kind: str, text: str) -> Any:
    """What an answer says, without what differs each time."""
    if kind == "stream":
        parts: dict[int, str] = defaultdict(str)
        for block in text.split("\n\n")[:-2]:
            for choice in json.loads(block.removeprefix("data: "))["choices"]:
                parts[choice["index"]] += choice["delta"].get("content", "")
        return dict(parts)
    data = json.loads(text)
    if kind == "searched":
        return data["completions"], data["answer"]
    return data["data"] if kind == "scored" else [choice["message"]["content"] for choice in data["choices"]]


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Memory:
    """Resident memory after each quarter of all requests."""

    def __init__(self) -> None:
        self.count = 0
        self.quarters: list[int] = []

    def note(self) -> None:
        self.count += 1
        if self.count % max(1, CLIENTS * REQUESTS // 4) == 0:
            self.quarters.append(resident())


async def one_client(
    url: str, number: int, expected: dict[str, Any], times: dict[str, list[float]], memory: Memory
) -> None:
    rng = random.Random(number)
    async with httpx2.AsyncClient(base_url=url, timeout=300) as client:
        for _ in range(REQUESTS):
            memory.note()
            kind, route, body = kinds(rng)
            fate = rng.random()
            if fate < 0.1:  # goes away in the middle
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(client.post(route, json=body), 0.05)
            elif fate < 0.2:
                reply = await client.post(route, content=b'{"messages": [' * rng.randrange(1, 9))
                assert reply.status_code == 400
            else:
                begun = time.monotonic()
                reply = await client.post(route, json=body)
                times[kind].append(time.monotonic() - begun)
                assert reply.status_code == 200, reply.text
                assert told(kind, reply.text) == expected[json.dumps([route, body])]


@pytest.mark.slow
def test_many_clients(live, local, service, capsys):
    expected: dict[str, Any] = {}
    for number in range(CLIENTS):  # one after the other, in process
        rng = random.Random(number)
        for _ in range(REQUESTS):
            kind, route, body = kinds(rng)
            if 0.1 <= rng.random() < 0.2:
                rng.randrange(1, 9)
            key = json.dumps([route, body])
            if key not in expected:
                expected[key] = told(kind, local.post(route, json=body).text)
    memory = Memory()
    times: dict[str, list[float]] = defaultdict(list)

    async def run() -> None:
        await asyncio.gather(*(one_client(live, number, expected, times, memory) for number in range(CLIENTS)))

    begun = time.monotonic()
    asyncio.run(run())
    wall = time.monotonic() - begun
    deadline = time.monotonic() + 60
    while service.engine.num_in_flight or service.engine.num_streams:
        assert time.monotonic() < deadline, "what clients left behind is freed"
        time.sleep(0.05)
    tables = {
        "kinds": {kind: {"request": kind, **in_numbers(values)} for kind, values in sorted(times.items())},
        "memory": {
            f"quarter {number}": {"quarter": number, "resident, MiB": round(quarter / 2**20, 1)}
            for number, quarter in enumerate(memory.quarters, 1)
        },
        "all": {"all": {"clients": CLIENTS, "requests": CLIENTS * REQUESTS, "seconds": round(wall, 1)}},
    }
    with capsys.disabled():
        print(f"\n{json.dumps(tables, indent=1)}")
    if name := os.environ.get("TTS_LOAD_OUT"):
        write_down(name, tables)
    assert max(memory.quarters) < 1.05 * memory.quarters[0]


def in_numbers(seconds: list[float]) -> dict[str, float]:
    """Times of requests of a kind."""
    last = sorted(seconds)[int(0.99 * (len(seconds) - 1))]
    return {
        "answered": len(seconds), "p50, s": round(statistics.median(seconds), 3), "p99, s": round(last, 3)
    }  # fmt: skip


def write_down(name: str, tables: dict[str, Any]) -> None:
    """Keep the numbers as a measurement."""
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    import record

    record.write(
        name,
        what="Clients at once, a tenth of whose requests are cut off and a tenth nonsense: seconds to an answer",
        command=f"TTS_LOAD_CLIENTS={CLIENTS} TTS_LOAD_REQUESTS={REQUESTS} TTS_LOAD_OUT={name} "
        "python -m pytest tests/serve/test_load.py -m slow",
        beside=os.environ.get("TTS_LOAD_BESIDE", "nothing"),
        tables=tables,
        packages=("torch", "fastapi", "uvicorn"),
    )
