"""A row of attention has the same bits in any company; run by test_operators.py, emulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tts_kernels as tk

HEADS, KV_HEADS, PAGE = 4, 2, 16
LONG = 330  # tokens of the branch that is looked at: a chunk of 256 and more


class World:
    """Branches with a text each; a token's key and value are the same wherever it stands at the same position."""

    def __init__(self, dim: int, dtype: torch.dtype, stored: str | None) -> None:
        torch.manual_seed(0)
        self.dim, self.forest = dim, tk.KVForest(400, PAGE)
        self.keys, self.values = torch.randn(2, 2, 700, KV_HEADS, dim).to(dtype)  # two texts
        self.queries = torch.randn(700, HEADS, dim).to(dtype)
        self.cache = tk.KVCache(1, 400, KV_HEADS, dim, PAGE, stored or dtype)
        for memory in self.cache.tensors():
            memory.view(torch.uint8).fill_(255)  # NaN: of floats, and of scales

    def append(self, branch: int, count: int, text: int = 0) -> None:
        begin = self.forest.length(branch)
        added = self.forest.append([branch], [count])
        if len(added.copy_src):
            self.cache.copy_pages(added.copy_src, added.copy_dst)
        tokens = slice(begin, begin + count)
        self.cache.append(0, self.keys[text, tokens], self.values[text, tokens], added.slots)

    def root(self, count: int) -> int:
        branch = self.forest.add_root()
        self.append(branch, count)
        return branch

    def attend(self, branches: list[int], q_lens: list[int], window: int | None) -> list[Tensor]:
        """out and lse of each branch's rows, as one tensor."""
        plan = self.forest.plan(
            branches, q_lens, num_q_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=self.dim, window=window
        )
        lengths = [self.forest.length(b) for b in branches]
        q = torch.cat([self.queries[n - rows : n] for n, rows in zip(lengths, q_lens, strict=True)])
        sinks = torch.linspace(-1, 1, HEADS)
        options = {"window": window, "sinks": sinks, **self.cache.beside(0)}
        out, lse = tk.tree_attention(q, self.cache.k[0], self.cache.v[0], plan, return_lse=True, **options)
        return list(torch.cat([out.float(), lse[..., None]], -1).split(q_lens))


def company(world: World, shared: int, branches: int, window: int | None) -> Tensor:
    """The last row of a branch of which others share the first tokens."""
    root = world.root(shared)
    leaves = world.forest.fork([root] * branches)
    for i, leaf in enumerate(leaves):
        world.append(leaf, LONG - shared if i == 1 else 3 + 29 * i % 90, text=int(i != 1))
    return world.attend(leaves, [1] * branches, window)[1][-1]


@pytest.fixture(params=["cpu", "gpu"])
def _cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans cut for a CPU's kernels or for a GPU's: each has chunks of its own."""
    monkeypatch.setattr("tts_kernels.plan._is_gpu", lambda _: request.param == "gpu")
    monkeypatch.setattr("tts_kernels.plan._staged", lambda host, _: host)


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("dim", "dtype", "stored"),
    [
        (64, torch.bfloat16, None),
        (128, torch.bfloat16, None),
        (20, torch.float32, None),
        (64, torch.bfloat16, "int4"),
        (128, torch.bfloat16, "int8"),
        (20, torch.float32, "int4"),
    ],
)
def test_a_row_in_any_company(dim: int, dtype: torch.dtype, stored: str | None, window: int | None) -> None:
    world = World(dim, dtype, stored)
    alone = world.attend([world.root(LONG)], [1], window)[0][-1]
    for shared, branches in [(256, 3), (130, 40), (200, 9)]:
        assert torch.equal(company(world, shared, branches, window), alone)
    whole = world.attend([world.root(LONG)], [LONG], window)[0]
    assert torch.equal(whole[-1], alone)
    for rows in (7, 64):  # as it grows
        branch = world.root(LONG - 100)
        for end in range(LONG - 100 + rows, LONG + 1, rows):
            world.append(branch, rows)
            assert torch.equal(world.attend([branch], [rows], window)[0], whole[end - rows : end])
