"""The bits of a row of attention do not depend on the other rows. Run by test_operators.py in the emulator."""

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


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


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
        (64, torch.bfloat16, "fp8"),
        (128, torch.float16, "fp8"),
        (20, torch.float32, "fp8"),
    ],
)
def test_a_row_in_any_company(dim: int, dtype: torch.dtype, stored: str | None, window: int | None) -> None:
    world = World(dim, dtype, stored)
    alone = world.attend([world.root(LONG)], [1], window)[0][-1]
    for shared, branches in [(256, 3), (130, 40), (200, 9)]:
        assert same_bits(company(world, shared, branches, window), alone)
    whole = world.attend([world.root(LONG)], [LONG], window)[0]
    assert same_bits(whole[-1], alone)
    for rows in (7, 64):  # as it grows
        branch = world.root(LONG - 100)
        for end in range(LONG - 100 + rows, LONG + 1, rows):
            world.append(branch, rows)
            assert same_bits(world.attend([branch], [rows], window)[0], whole[end - rows : end])


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(64, torch.bfloat16), (64, torch.float16), (128, torch.bfloat16), (20, torch.float32), (20, torch.bfloat16)],
)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_zeros_have_one_sign_in_any_company(dim: int, dtype: torch.dtype, sign: float) -> None:
    """Where weight * value underflows below 0, a row is -0.0; keys that others see must not make it 0.0, nor back.

    Token 0 has all the weight, and zeros as values. Every row sees values that are -0.0 or nearly; the text of its
    company goes on with values of either sign, or with tokens that only later rows of the same forward see.
    """
    world = World(dim, dtype, None)
    tiny = 2.0**-24 if dtype == torch.float16 else 2.0**-100
    world.queries.fill_(1.0)
    world.keys.zero_()[:, 0] = 10.0
    world.values.fill_(-tiny)[:, 0] = 0.0
    world.values[1, 1:] = sign
    world.values[0, 100:] = sign * tiny
    world.values[0, 200:] = -0.0
    whole = world.attend([world.root(LONG)], [LONG], None)[0]
    for count in (2, 17, 60, 64, 65, 90, 100):
        alone = world.attend([world.root(count)], [1], None)[0]
        assert same_bits(whole[count - 1 : count], alone), count
        leaves = world.forest.fork([world.root(count - 1)] * 3)
        world.append(leaves[1], 1)
        for leaf in leaves[::2]:
            world.append(leaf, 40, text=1)
        assert same_bits(world.attend(leaves, [1] * 3, None)[1], alone), count
