"""The block cache with its memory on a simulated GPU, where Triton's kernels run.

They run in Triton's interpreter (tests/test_triton.py), or as PTX in the emulator (tests/gpu_emulator/test_triton.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tts_kernels import triton as backend

if "cpu" not in backend.DEVICES:
    pytest.skip("Triton's kernels do not run here: tests/test_triton.py runs these", allow_module_level=True)

from pretend_gpu import CUDA, PretendGpu
from test_block_cache import Identity, read, text
from test_llama_decoder import model_of
from tiny import save_checkpoint
from torch import Tensor
from tts_search.models.block_cache import BlockPool
from tts_search.models.block_layers import BLOCK, KINDS, Quantiser, kept_layers
from tts_search.models.decoder import KVPool
from tts_search.models.llama import LlamaDecoder
from tts_search.models.loading import load_decoder

import tts_kernels as tk

NAMES = {
    "all heads": {},
    "llama": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 32},
}
LAYERS = 4  # of "xquant-cl" the last one keeps changes
MORE = 4  # tokens behind a block


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    return {
        name: save_checkpoint(folder / name, model_of(name, **options, num_hidden_layers=LAYERS))
        for name, options in NAMES.items()
    }


@pytest.fixture(autouse=True)
def _cpu_kernels_on_a_cpu() -> None:
    tk.use_backend("auto")


def loaded(path: str, device: str) -> LlamaDecoder:
    decoder = load_decoder(path, device=device, dtype="float32", decoder="lean", self_test=False)
    assert isinstance(decoder, LlamaDecoder)
    return decoder


def pool_of(decoder: LlamaDecoder, kind: str | None, quantiser: type[Quantiser] = Quantiser) -> KVPool:
    """Of a kind, or a plain one."""
    shape, dtype = decoder.shape, decoder.dtype
    if kind is None:
        return KVPool(shape, 32, 16, dtype, decoder.device)
    layers = kept_layers(kind, decoder.layers, shape.num_kv_heads, shape.head_dim, quantiser)
    return BlockPool(layers, shape, 4, 32, dtype, kind, decoder.device)


def logits(decoder: LlamaDecoder, pool: KVPool) -> Tensor:
    """Of a text beyond a block, which two children share and go on with apart."""
    root = pool.forest.add_root()
    whole = read(decoder, pool, root, text(BLOCK + MORE))
    children = pool.forest.fork([root, root])
    ends = decoder.logits(pool.pack(children, [text(2, 1), text(3, 2)]), pool.kv)
    return torch.cat([whole, ends])


def on_device(path: str, kind: str | None, quantiser: type[Quantiser] = Quantiser) -> Tensor:
    """The same on the pretended GPU."""
    with PretendGpu(watches=False, triton=True):
        decoder = loaded(path, "cuda")
        pool = pool_of(decoder, kind, quantiser)
        assert {tensor.device for tensor in pool.kv.tensors()} == {CUDA}
        found: Tensor = logits(decoder, pool).values_  # type: ignore[attr-defined]
    return found


def restored(decoder: LlamaDecoder, pool: KVPool, blocks: list[list[Tensor]]) -> list[Tensor]:
    """Keys and values of a block in each layer, made of these bytes [rows of each layer, keys of each layer]."""
    assert isinstance(pool, BlockPool)
    kv, root = pool.kv, pool.forest.add_root()
    pool.pack([root], [text(BLOCK)])
    kept = pool.pack([root], [[5]]).kept
    for target, stored in zip((kv.block_rows, kv.block_keys), blocks, strict=True):
        for tensor, source in zip(target, stored, strict=True):
            tensor.copy_(source)
    made, before = [], None
    for number, layer in enumerate(kv.layers):
        before = kv.restore(number, layer, kept, decoder.config.cos_sin, decoder.config.eps, before)
        made += [pages[kv.first : kv.first + BLOCK // 16].clone() for pages in kv.pages]
    return made


@pytest.mark.parametrize(
    ("kind", "name"),
    [("int4-channel", "qwen3"), ("xquant-3", "all heads"), ("xquant-4", "qwen3"), ("xquant-cl-2", "llama")],
)
def test_a_block_is_restored_as_by_the_definition(paths: dict[str, str], name: str, kind: str) -> None:
    decoder = loaded(paths[name], "cpu")
    pool = pool_of(decoder, kind)
    assert isinstance(pool, BlockPool)
    read(decoder, pool, pool.forest.add_root(), text(BLOCK))
    blocks = [pool.kv.block_rows, pool.kv.block_keys]
    with tk.use_backend("reference"), torch.inference_mode():
        want = restored(decoder, pool_of(decoder, kind), blocks)
    with PretendGpu(watches=False, triton=True):
        decoder = loaded(paths[name], "cuda")
        got = [each.values_ for each in restored(decoder, pool_of(decoder, kind), blocks)]  # type: ignore[attr-defined]
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize(("name", "kind"), [("all heads", "xquant-4"), ("llama", "xquant-cl-4"), ("qwen3", "xquant-4")])
def test_without_loss_the_logits_are_those_of_a_plain_cache(paths: dict[str, str], name: str, kind: str) -> None:
    want, got = on_device(paths[name], None), on_device(paths[name], kind, Identity)
    assert torch.equal(got[:BLOCK], want[:BLOCK])  # keys and values of a block that grows are what they are
    assert (got - want).norm() < 2e-4 * want.norm()


@pytest.mark.parametrize(("kind", "name"), zip(KINDS, ["all heads", "llama"] * 5, strict=True))
def test_the_logits_are_near_those_of_a_cpu(paths: dict[str, str], name: str, kind: str) -> None:
    """Sums in another order turn the rounding of a few codes: far less than what the codes lose."""
    decoder = loaded(paths[name], "cpu")
    exact, want = (logits(decoder, pool_of(decoder, each)) for each in (None, kind))
    got = on_device(paths[name], kind)
    assert (got - want)[:BLOCK].norm() < 1e-4 * want[:BLOCK].norm()
    assert (got - want)[BLOCK:].norm() < 0.1 * (want - exact)[BLOCK:].norm()
