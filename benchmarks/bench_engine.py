"""The engine's cost on the host, and the time saved because no problem waits for another.

    python benchmarks/bench_engine.py host          # Python of a decode step: what is left of it without the kernels
    python benchmarks/bench_engine.py simulated     # problems on a device whose step costs the same for up to 256 rows
    python benchmarks/bench_engine.py served        # problems on a server that answers after random times
    python benchmarks/bench_engine.py rows          # a decode step of 1 to 64 rows: where speculation is cheap
    python benchmarks/bench_engine.py speculation   # one problem, with speculation and without

``host``: N streams of the smallest demo policy decode on one thread. The time of the kernels (forward, planning,
appending to the forest, sampling) is subtracted from each step; the rest is the host's time. Steps in which no stream
ends give the cost for a stream and token. Steps of streams with random lengths, of which a few end at a time, give the
cost of an end.

``simulated``: beam search of n = 16 with a policy that samples nothing. The length of a step in tokens is drawn from a
lognormal distribution with the median, mean and 99th percentile of Qwen2.5-1.5B-Instruct on MATH-500 (35, 45 and 179
tokens, at most 800; 11 steps for a solution). Time is counted in device steps of at most 256 rows. The baseline is the
same search in lock-step: a round lasts as long as its longest step, and 16 problems run at a time.

``served``: 16 problems of the same search with a policy that only waits. A request (a branch with all of its children)
is answered after a time from a lognormal distribution with a median of 50 ms and sigma 0.8, however many are open. The
baseline is the same driver as a batch driver: all problems wait for the slowest request. The trees are the same.

``rows`` and ``speculation`` use the policy and verifier in ``--policy`` and ``--verifier``; by default the demo's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import operator
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import record
import torch
from tts_search import HFPolicy, HFVerifier, SearchConfig, Step, StepParams, Usage, search
from tts_search.api import search_with
from tts_search.engine.drivers import Lifted
from tts_search.engine.scheduler import Scheduler
from tts_search.search.protocol import Expand, Score

import tts_kernels as tk

ROWS = 256
MODELS = files("tts_search.lab") / "models"


class Clock:
    """Adds up the time of some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The function, on the clock."""

        def run(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            self.calls += 1
            try:
                return call(*args, **options)
            finally:
                self.seconds += time.perf_counter() - begin

        return run


def host_cost(streams: int, tokens: int) -> dict[str, float]:
    """Microseconds of the host for N streams that sample so many tokens each."""
    policy = HFPolicy(str(MODELS / "policy-0.1m"), kv_memory="2GiB")
    policy._eos = frozenset()  # a stream ends at its limit alone
    quiet = [1e6 * host / running for host, running, ended in steps_of(policy, [tokens] * streams) if not ended]
    plain = statistics.median(quiet)
    rng = random.Random(0)
    steps = steps_of(policy, [rng.randint(tokens // 4, 2 * tokens) for _ in range(streams)])
    busy = [step for step in steps if step[2] and step[1] > streams // 4]
    ends = [(1e6 * host - plain * running) / ended for host, running, ended in busy]
    return {
        "streams": streams,
        "us per stream and token": round(plain, 3),
        "us per end": round(statistics.median(ends), 1),
        "steps": len(quiet),
        "steps with ends": len(ends),
        "ends per step": round(statistics.mean(step[2] for step in busy), 1),
    }


def steps_of(policy: HFPolicy, limits: Sequence[int]) -> list[tuple[float, int, int]]:
    """Of each step but the first two: seconds of the host, streams that ran, streams that ended."""
    clock, forest = Clock(), policy._lane.pool.pool.forest
    logits, plan, append, sample = policy.decoder.logits, forest.plan, forest.append, tk.sample
    policy.decoder.logits = clock.timed(logits)  # type: ignore[method-assign]
    forest.plan, forest.append = clock.timed(plan), clock.timed(append)  # type: ignore[method-assign]
    tk.sample = clock.timed(sample)
    policy.begin(0, "12+34=")
    params = [StepParams(temperature=1.0, max_tokens=limit, delimiter=None) for limit in limits]
    policy.submit([Expand(0, 0, (i,), (), (i,), own) for i, own in enumerate(params, start=1)])
    steps, left = [], len(limits)
    while left:
        clock.seconds = 0.0
        begin, running = time.perf_counter(), left
        left -= len(policy.step())
        steps.append((time.perf_counter() - begin - clock.seconds, running, running - left))
    policy.decoder.logits = logits  # type: ignore[method-assign]
    forest.plan, forest.append, tk.sample = plan, append, sample  # type: ignore[method-assign]
    policy.end(0)
    return steps[2:]


def step_cost(policy: HFPolicy, rows: int, steps: int) -> dict[str, float]:
    """Milliseconds of a decode step of so many rows."""
    policy.begin(0, "12+34=")
    seeds = tuple(range(rows))
    params = StepParams(temperature=1.0, max_tokens=2 * steps, delimiter=None)
    policy.submit([Expand(0, 0, tuple(range(1, rows + 1)), (), seeds, params)])
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        policy.step()
        seconds.append(time.perf_counter() - begin)
    policy.end(0)
    return {"rows": rows, "ms_per_step": round(1e3 * statistics.median(seconds[2:]), 2)}


def one_problem(policy: HFPolicy, verifier: HFVerifier, problem: str, config: SearchConfig) -> Iterator[dict[str, Any]]:
    """One search without speculation and with it: seconds, forwards of both models, tokens sampled in vain."""
    trees = set()
    for speculate in (False, True):
        clocks = Clock(), Clock()
        logits, hidden = policy.decoder.logits, verifier.decoder.hidden
        policy.decoder.logits = clocks[0].timed(logits)  # type: ignore[method-assign]
        verifier.decoder.hidden = clocks[1].timed(hidden)  # type: ignore[method-assign]
        begin = time.perf_counter()
        options: dict[str, Any] = {"speculate": speculate, "prefix_cache": False, "progress": False}
        (result,) = search([problem], policy, verifier, config, **options)
        seconds = time.perf_counter() - begin
        policy.decoder.logits, verifier.decoder.hidden = logits, hidden  # type: ignore[method-assign]
        trees.add(result.tree.to_json())
        yield {
            "speculate": speculate,
            "seconds": round(seconds, 2),
            "policy_forwards": clocks[0].calls,
            "verifier_forwards": clocks[1].calls,
            "policy_tokens": result.stats.policy_tokens,
            "speculated_tokens": result.stats.speculated_tokens,
        }
    assert len(trees) == 1, "speculation has changed a result"


class Device:
    """A policy whose step samples a token of at most ``ROWS`` streams and costs the same for any number of them."""

    def __init__(self) -> None:
        self.steps = self.rows = 0
        self._running: list[list[Any]] = []  # tokens left, job, child
        self._waiting: deque[list[Any]] = deque()

    def begin(self, problem: int, text: str) -> None:
        """Nothing is read."""

    def submit(self, requests: Sequence[Expand]) -> None:
        """Take requests in."""
        for request in requests:
            job: list[Any] = [request, [step_of(request, seed) for seed in request.seeds], len(request.seeds)]
            self._waiting.extend([step.num_tokens, job] for step in job[1])

    def step(self) -> list[tuple[Expand, list[Step]]]:
        """Sample a token in each stream that has a row."""
        while self._waiting and len(self._running) < ROWS:
            self._running.append(self._waiting.popleft())
        if not self._running:
            return []
        self.steps += 1
        self.rows += len(self._running)
        answered = []
        for stream in self._running:
            stream[0] -= 1
            if not stream[0]:
                stream[1][2] -= 1
                if not stream[1][2]:
                    answered.append((stream[1][0], stream[1][1]))
        self._running = [stream for stream in self._running if stream[0]]
        return answered

    def cancel(self, problem: int) -> None:
        """Nothing is cancelled here."""

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Nothing is kept."""

    def end(self, _problem: int) -> Usage:
        """Nothing is counted."""
        return Usage()


class LockStep(Device):
    """The same, but what is submitted waits until all that runs has ended."""

    def expand(self, requests: Sequence[Expand]) -> list[list[Step]]:
        """Run all requests to their ends."""
        super().submit(requests)
        answers: dict[int, list[Step]] = {}
        while len(answers) < len(requests):
            answers |= {id(request): steps for request, steps in super().step()}
        return [answers[id(request)] for request in requests]


@dataclass
class Batches:
    """The lock-step device as a driver of batches alone."""

    device: LockStep

    def __post_init__(self) -> None:
        self.begin, self.expand = self.device.begin, self.device.expand
        self.release, self.end = self.device.release, self.device.end


class Served:
    """A policy on a server that answers each request after a random time, however many are open."""

    is_concurrent = True
    begin = Device.begin
    release = Device.release
    end = Device.end

    async def answer(self, requests: Sequence[Expand]) -> list[list[Step]]:
        """Wait for the slowest of the requests."""
        await asyncio.sleep(max(latency(request) for request in requests))
        return [[step_of(request, seed) for seed in request.seeds] for request in requests]

    async def hang_up(self) -> None:
        """Nothing is open."""

    def expand(self, requests: Sequence[Expand]) -> list[list[Step]]:
        """The same as a batch."""
        return asyncio.run(self.answer(requests))


class Scorer:
    """Random scores; a verifier that costs nothing."""

    begin = Device.begin
    release = Device.release
    end = Device.end

    def score(self, requests: Sequence[Score]) -> list[list[float]]:
        """A score for each step, by its text."""
        return [[random.Random(step).random() for step in request.steps] for request in requests]


def latency(request: Expand) -> float:
    """The seconds after which a server answers."""
    return random.Random(f"latency {request.seeds[0]}").lognormvariate(math.log(0.05), 0.8)


def step_of(request: Expand, seed: int) -> Step:
    """A step of random length; the answer ends after 11 of them on average."""
    rng = random.Random(seed)
    mu, sigma = math.log(35), 0.7  # mean 45, 99th percentile 178
    length = max(1, min(800, round(rng.lognormvariate(mu, sigma))))
    finished = rng.random() < 1 / 11 or request.params.delimiter is None
    return Step(f"{seed}\n\n", finished, length)


def simulate(policy: Any, problems: int, in_flight: int) -> None:
    """Search so many problems, so many of them at a time."""
    config = SearchConfig(n=16, max_steps=40)
    scheduler = Scheduler(policy, Scorer(), lambda _: None, operator.eq)
    texts: Iterator[tuple[int, str]] = iter([(number, f"problem {number}") for number in range(problems)])
    while True:
        while scheduler.num_problems < in_flight and (entry := next(texts, None)) is not None:
            list(scheduler.start(*entry, config))
        if not scheduler.num_problems:
            return
        list(scheduler.step())


def serve(policy: Any, problems: int) -> tuple[dict[str, float], list[str]]:
    """The seconds that a search of so many problems takes, and their trees."""
    scheduler = Scheduler(policy, Scorer(), lambda _: None, operator.eq)
    begin = time.perf_counter()
    texts = [f"problem {number}" for number in range(problems)]
    outcomes: dict[int, Any] = dict(search_with(scheduler, texts, SearchConfig(n=16, max_steps=40), lambda: False))
    seconds = {
        "seconds": time.perf_counter() - begin,
        "median of a problem": statistics.median(result.stats.wall_s for result in outcomes.values()),
    }
    return seconds, [json.dumps(outcomes[number].tree.to_json()) for number in range(problems)]


def served(problems: int) -> Iterator[dict[str, Any]]:
    """Each at its own pace, and by batches."""
    ours, trees = serve(Served(), problems)
    theirs, same = serve(Lifted(Served()), problems)
    assert trees == same, "the order of answers has changed a result"
    for name, seconds in (("one by one", ours), ("by batches", theirs)):
        times = round(seconds["seconds"] / ours["seconds"], 2)
        yield {"answers": name, **{key: round(value, 2) for key, value in seconds.items()}, "times the seconds": times}


def lines_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The measurements that were asked for, one by one."""
    if options.what == "rows":
        policy = HFPolicy(options.policy, kv_memory="512MiB")
        policy._eos = frozenset()
        yield from (step_cost(policy, rows, options.tokens) for rows in (1, 2, 4, 8, 16, 32, 64))
    elif options.what == "speculation":
        models = HFPolicy(options.policy), HFVerifier(options.verifier, format=options.format)
        yield from one_problem(*models, options.problem, SearchConfig(n=16, max_steps=8, max_step_tokens=256))
    elif options.what == "served":
        yield from served(options.problems or 16)
    elif options.what == "host":
        torch.set_num_threads(1)
        yield from (host_cost(streams, options.tokens) for streams in options.streams)
    else:
        ours, theirs = Device(), LockStep()
        problems = options.problems or 40
        simulate(ours, problems, problems)
        simulate(Batches(theirs), problems, 16)
        for name, device in (("continuous", ours), ("lock-step, 16 problems", theirs)):
            use = round(device.rows / device.steps / ROWS, 3)
            times = round(device.steps / ours.steps, 2)
            yield {"engine": name, "steps": device.steps, "slot use": use, "times the steps": times}


def main() -> None:
    """Run one of them and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["host", "simulated", "served", "rows", "speculation"])
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--problems", type=int, help="40 on the simulated device, 16 on the server")
    parser.add_argument("--policy", default=str(MODELS / "policy-0.1m"))
    parser.add_argument("--verifier", default=str(MODELS / "prm-weak"))
    parser.add_argument("--format", default="auto")
    parser.add_argument("--problem", default="90-17+4*3*(2+5)=")
    parser.add_argument("--record", help="write benchmarks/results/NAME.json")
    parser.add_argument("--beside", default="other work", help="what else ran, for --record")
    options = parser.parse_args()
    lines = []
    for line in lines_of(options):
        print(json.dumps(line), flush=True)
        lines.append(line)
    if options.record:
        title = (__doc__ or "").split(f"``{options.what}``: ")[-1].split("\n\n")[0]
        record.write(
            options.record,
            what=" ".join(title.split()),
            command=f"python benchmarks/bench_engine.py {options.what}",
            beside=options.beside,
            tables={options.what: {str(next(iter(line.values()))): line for line in lines}},
        )


if __name__ == "__main__":
    main()
