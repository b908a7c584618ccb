"""The verifier over HTTP compared with reading whole texts, and the engine over HTTP compared with the engine itself.

    python benchmarks/bench_serving.py --out serving
    python benchmarks/bench_serving.py --policy path/to/SmolLM2-135M-Instruct --rounds 1 --out serving-smollm2

``pooling``: 16 candidates of 20 steps are scored through `/pooling` step by step, with the whole text of all of them
each time, as by frameworks that call a process reward model over HTTP. Our server reads only the new text. With
``prefix_cache=False`` it reads whole texts, as vLLM does for token-pooling tasks, with the same kernels.

``streams``: 64 texts of 128 tokens at once, streamed to a client process on the loopback interface (one chat with ``n``
of 64, and 64 chats), and by `Engine.generate` in the server's process, in turn. The bound is the engine's own
throughput. An engine with a cost of one microsecond for a token is the hardest case, a real model the usual one.

The models are the demo's smallest. With ``--model``, another checkpoint is used as a verifier, too; ``--policy`` is a
policy that streams in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from tts_search import Engine, HFPolicy, HFVerifier
from tts_search.lab.checkpoints import load_models
from tts_search.search.protocol import Generate, GenerateParams
from tts_search.serve.app import create_app
from tts_search.serve.service import Service
from tts_search.serve.settings import Settings

sys.path.append(str(Path(__file__).parent))
import record

CANDIDATES, STEPS = 16, 20
STREAMS, TOKENS = 64, 128
PROBLEM = "Start with 20, add 5, multiply by 3. What is the result modulo 100?"
"""The beginning of every text."""


@contextmanager
def served(policy: Any, verifier: Any, **options: Any) -> Iterator[tuple[httpx2.Client, Engine]]:
    """A server on a socket of this machine, and a client of it."""
    with Engine(policy, verifier, **options) as engine:
        app = create_app(Service(engine, policy, verifier, Settings(timeout_s=3600)))
        server = uvicorn.Server(uvicorn.Config(app, port=0, access_log=False, log_config=None))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx2.Client(base_url=url, timeout=3600) as client:
            yield client, engine
        server.should_exit = True
        thread.join()


def candidates(rng: random.Random) -> list[list[str]]:
    """Solutions that differ from the first step on."""
    return [
        [f"{number} + {rng.randrange(100)} = {rng.randrange(100)}\n\n" for _ in range(STEPS)]
        for number in range(10, 10 + CANDIDATES)
    ]


def pooling(policy: Any, verifier: Any, prefix_cache: bool) -> tuple[list[Any], dict[str, Any]]:
    """Score the candidates step by step; their scores, and what it cost."""
    solutions = candidates(random.Random(0))
    read = logical = 0
    with served(policy, verifier, prefix_cache=prefix_cache) as (client, _):
        begun = time.perf_counter()
        for count in range(1, STEPS + 1):
            turns = [
                [{"role": "user", "content": PROBLEM}, {"role": "assistant", "content": "".join(steps[:count])}]
                for steps in solutions
            ]
            reply = client.post("/pooling", json={"messages": turns}).json()
            usage = reply["usage"]
            logical += usage["prompt_tokens"]
            read += usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        seconds = time.perf_counter() - begun
    verifier.prefix_cache = False
    return reply["data"], {"tokens read": read, "tokens of the texts": logical, "seconds": round(seconds, 3)}


CLIENT = """
import asyncio, json, sys, time

port, bodies = sys.argv[1], json.load(sys.stdin)

async def one(body):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nContent-Type: application/json\\r\\n"
    writer.write(f"{head}Content-Length: {len(content)}\\r\\nConnection: close\\r\\n\\r\\n".encode() + content)
    end = b""
    while part := await reader.read(1 << 16):
        end = (end + part)[-4096:]
    return json.loads(end.split(b"data: ")[-2].split(b"\\n")[0])["usage"]["completion_tokens"]

async def main():
    begun = time.perf_counter()
    counts = await asyncio.gather(*map(one, bodies))
    print(sum(counts), time.perf_counter() - begun)

asyncio.run(main())
"""
"""Reads streams in a process of its own, as clients are, and hardly looks at them: the server is what is measured."""


def chats(client: httpx2.Client, each: int) -> float:
    """Have `STREAMS` texts streamed by chats of `each` answers; tokens a second."""
    bodies = [
        {
            "messages": [{"role": "user", "content": PROBLEM}], "n": each, "max_tokens": TOKENS, "ignore_eos": True,
            "seed": seed, "stream": True, "stream_options": {"include_usage": True},
        }
        for seed in range(STREAMS // each)
    ]  # fmt: skip
    command = [sys.executable, "-c", CLIENT, str(client.base_url.port)]
    done = subprocess.run(command, input=json.dumps(bodies), capture_output=True, text=True, check=True)
    tokens, seconds = map(float, done.stdout.split())
    return tokens / seconds


def generated(engine: Engine, tokens: list[int], each: int) -> float:
    """The same in process, each token told as it comes."""
    begun = time.perf_counter()
    params = GenerateParams(max_tokens=TOKENS, ignore_eos=True)
    running = [
        engine.generate(Generate(tuple(tokens), params, each, tuple(range(seed, seed + each))))
        for seed in range(STREAMS // each)
    ]
    return sum(len(part.tokens) for one in running for part in one.events()) / (time.perf_counter() - begun)


def streams(policy: Any, rounds: int) -> dict[str, dict[str, Any]]:
    """Throughput over HTTP and in process, in turns."""
    lines = {}
    with served(policy, None) as (client, engine):
        ids = client.post("/tokenize", json={"messages": [{"role": "user", "content": PROBLEM}]}).json()["tokens"]
        for name, each in (("one chat with n = 64", STREAMS), ("64 chats", 1)):
            pairs = []
            for _ in range(rounds + 1):
                pairs.append((generated(engine, ids, each), chats(client, each)))
            alone, over = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
            share = statistics.median(http / engine_speed for engine_speed, http in pairs[1:])
            lines[name] = {
                "streams": name,
                "engine, tokens a second": round(alone),
                "HTTP, tokens a second": round(over),
                "share": round(share, 3),
            }
    return lines


def main() -> None:
    """Measure and print; with ``--out`` write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a causal language model that judges steps by yes or no, in the verifier's place"
    )
    parser.add_argument("--policy", help="a causal language model that streams, in the demo policy's place")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="pooling,streams")
    parser.add_argument("--out", help="name of the record")
    given = parser.parse_args()
    models = load_models()
    policy, demo = models.policies["policy-0.1m"], models.verifiers["prm-weak"]
    tables: dict[str, Any] = {}
    if "pooling" in given.parts:
        verifiers = {"demo": demo}
        if given.model:
            verifiers[Path(given.model).name] = HFVerifier(given.model, format="yes_no", kv_memory="512MiB")
        for name, verifier in verifiers.items():
            scores, ours = pooling(policy, verifier, True)
            others, whole = pooling(policy, verifier, False)
            if scores != others:
                raise SystemExit(f"{name}: scores differ")
            tables[f"pooling {name}"] = {
                "what is new": {"the server reads": "what is new", **ours},
                "whole texts": {"the server reads": "whole texts", **whole},
            }
    if "streams" in given.parts:
        streaming = HFPolicy(given.policy, dtype="bfloat16") if given.policy else policy
        tables["streams"] = streams(streaming, given.rounds)
    print(json.dumps(tables, indent=1))
    if given.out:
        arguments = ("PATH" if each in (given.model, given.policy) else each for each in sys.argv)
        record.write(
            given.out, what=__doc__.partition("\n")[0], command=f"python {' '.join(arguments)}", beside="nothing",
            tables=tables, packages=("torch", "fastapi", "uvicorn"),
        )  # fmt: skip


if __name__ == "__main__":
    main()
