"""Decode steps that are recorded and run again, with a stand-in for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pretend_gpu import PretendGpu
from test_local_search import PROBLEMS, assert_same
from tiny import save_checkpoint, talkative, tiny_model
from torch import Tensor
from tts_search import HFPolicy, SearchConfig, search
from tts_search.models.decoder import KVPool
from tts_search.models.graphs import MAX_ROWS, DecodeGraphs, decode_graphs

CONFIG = SearchConfig("best_of_n", n=6, max_tokens=30)


class Recording:
    """Does what a graph does: runs the same work on the same tensors, and leaves its result in the same place."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    @torch.inference_mode()
    def capture(self, work: Callable[[], Tensor]) -> tuple[tuple[Callable[[], Tensor], Tensor], Tensor]:
        self.captures += 1
        output = work()
        return (work, output), output.fill_(torch.nan)  # only a replay gives results

    @torch.inference_mode()
    def replay(self, recorded: tuple[Callable[[], Tensor], Tensor]) -> None:
        self.replays += 1
        work, output = recorded
        output.copy_(work())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("graphs"), talkative(tiny_model(max_position_embeddings=2048)))


def recorded(path: str) -> tuple[HFPolicy, DecodeGraphs, Recording]:
    policy = HFPolicy(path, kv_memory="16MiB")
    recording = Recording()
    policy._pool.graphs = graphs = DecodeGraphs(policy.decoder, policy._pool.pool, recording)
    return policy, graphs, recording


def test_tokens_are_the_same_as_without(path: str) -> None:
    policy, graphs, recording = recorded(path)
    wanted = search(PROBLEMS, HFPolicy(path, kv_memory="4MiB"), None, CONFIG, progress=False)
    # The prefix cache would change the second run's forwards.
    assert_same(search(PROBLEMS, policy, None, CONFIG, progress=False, prefix_cache=False), wanted)
    assert recording.replays > 20
    assert recording.captures == len(graphs._steps)
    assert set(graphs._steps) <= {1, 2, 4, 8, 16, 32}
    assert len(graphs._steps) >= 2
    before = {size: [t.data_ptr() for t in buffers(graphs, size)] for size in graphs._steps}
    again = search(PROBLEMS, policy, None, CONFIG, progress=False, prefix_cache=False)
    assert_same(again, wanted)
    assert recording.captures == len(graphs._steps)  # nothing was recorded anew, ...
    assert before == {size: [t.data_ptr() for t in buffers(graphs, size)] for size in graphs._steps}  # ... or moved
    assert policy._pool.pool.forest.stats().branches == 1  # that of the spare rows


def buffers(graphs: DecodeGraphs, size: int) -> list[Tensor]:
    step = graphs._steps[size]
    return [step.batch.tokens, step.batch.positions, step.batch.slots, step.batch.plan.pages, step.logits]


def grown(pool: KVPool, count: int, length: int = 5) -> list[int]:
    """Branches of tokens that no model has read: their KV is 0, not whatever the memory held."""
    for cache in (*pool.kv.k, *pool.kv.v):
        cache.zero_()
    branches = [pool.forest.add_root() for _ in range(count)]
    pool.append(branches, [length] * count)
    return branches


def step(graphs: DecodeGraphs, branches: list[int]) -> Tensor | None:
    """A decode step of these branches."""
    slots = graphs.pool.append(branches, [1] * len(branches))
    positions = [graphs.pool.forest.length(branch) - 1 for branch in branches]
    return graphs.logits(branches, [20 + i for i in range(len(branches))], positions, slots)


def test_each_size_is_recorded_once_and_too_many_rows_are_not(path: str) -> None:
    _, graphs, recording = recorded(path)
    branches = grown(graphs.pool, MAX_ROWS + 1)
    for count, captures in ((3, 1), (4, 1), (5, 2), (17, 3), (32, 3), (2, 4), (1, 5)):
        logits = step(graphs, branches[:count])
        assert logits is not None
        assert len(logits) == count
        assert bool(logits.isfinite().all())
        assert recording.captures == captures, count
    assert step(graphs, branches) is None
    assert recording.replays == 7


def test_a_plan_that_has_outgrown_its_tables_is_recorded_anew(path: str) -> None:
    _, graphs, recording = recorded(path)
    branches = grown(graphs.pool, 4)
    step(graphs, branches)
    for _ in range(3):
        step(graphs, branches)
    assert recording.captures == 1
    graphs.pool.append(branches, [1500] * 4)
    logits = step(graphs, branches)
    assert recording.captures == 2
    assert logits is not None
    assert len(logits) == 4


def test_rows_in_excess_keep_to_a_page_of_their_own(path: str) -> None:
    _, graphs, _ = recorded(path)
    pool = graphs.pool
    branches = grown(pool, 9)
    for tensor in (*pool.kv.k, *pool.kv.v):
        tensor.fill_(7.0)
    free = pool.forest.stats().pages_free
    step(graphs, branches)
    assert pool.forest.stats().pages_free == free
    table, _ = pool.forest.page_table([*branches, graphs._spare])
    touched = {page for tensor in pool.kv.k for page in (tensor != 7.0).flatten(1).any(1).nonzero().flatten().tolist()}
    assert touched == set(table[table >= 0].tolist())


def test_only_decoders_that_read_nothing_are_recorded(path: str, tmp_path: Path) -> None:
    gemma = save_checkpoint(tmp_path, tiny_model("gemma2"))
    assert HFPolicy(path, kv_memory="1MiB")._pool.graphs is None  # on a CPU
    with PretendGpu(watches=False):
        for checkpoint, kind in ((path, DecodeGraphs), (gemma, type(None))):
            policy = HFPolicy(checkpoint, kv_memory="1MiB", device="cuda")
            assert type(decode_graphs(policy.decoder, policy._pool.pool)) is kind


def test_a_recorded_step_on_a_gpu_waits_for_nothing_but_its_tokens(path: str) -> None:
    wanted = search(PROBLEMS, HFPolicy(path, kv_memory="4MiB"), None, CONFIG, progress=False)
    with PretendGpu(watches=False) as gpu:
        policy = HFPolicy(path, kv_memory="4MiB", device="cuda")
        policy._pool.graphs.recorder = recording = Recording()
        gpu.watches = True
        assert_same(search(PROBLEMS, policy, None, CONFIG, progress=False), wanted)
    assert recording.replays > 0
    assert set(gpu.waits) == {"read_tokens"}
    assert gpu.waits["read_tokens"] >= recording.replays
