"""Broken files give errors with their name: never a crash, a hang or more memory than the size of the file."""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf")

import few_bits_files  # noqa: E402
import untrusted_files  # noqa: E402
from gguf_files import wide_model, write  # noqa: E402
from test_few_bits import AWQ, GPTQ, PACKED  # noqa: E402
from tiny import tiny_model  # noqa: E402
from tts_search.models.formats.gguf import GGUFCheckpoint  # noqa: E402
from tts_search.models.formats.gguf_header import read_header  # noqa: E402
from tts_search.models.formats.opening import open_checkpoint  # noqa: E402
from untrusted_files import end_of_gguf, fuzz, fuzz_apart, only_errors_that_name  # noqa: E402

# In the slow tests: mutations of each kind of file, and the seed of the first, so that processes can share them.
SLOW, FIRST = int(os.environ.get("TTS_FUZZ", "20000")), int(os.environ.get("TTS_FUZZ_FIRST", "0"))


def small_gguf(folder: Path) -> Path:
    """A GGUF file of one layer."""
    path = folder / "m.gguf"
    write(path, wide_model(hidden_size=32, intermediate_size=32, head_dim=8, num_hidden_layers=1), "Q4_0")
    return path


def small_gptq(folder: Path) -> Path:
    """The safetensors file of a folder of one layer in few bits."""
    model = tiny_model(hidden_size=64, intermediate_size=64, num_hidden_layers=1, tie_word_embeddings=True)
    few_bits_files.save(folder, model, GPTQ, lambda weight: few_bits_files.gptq(weight, 64, False))
    return folder / "model.safetensors"


# The reader of each kind of file, how many mutations are read for one of TTS_FUZZ, and who writes the file.
KINDS = {"opened gguf": (1, small_gguf), "loaded gguf": (20, small_gguf), "safetensors": (1, small_gptq)}


# Seeds, and those beyond them that were found to fail once.
FEW = {"opened gguf": [*range(1000), 9829], "loaded gguf": [*range(100), 410], "safetensors": [*range(500)]}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind: str, tmp_path: Path) -> None:
    found = fuzz(kind, KINDS[kind][1](tmp_path), FEW[kind])
    assert min(found.values()) > len(FEW[kind]) // 100


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files(kind: str) -> None:
    """`TTS_FUZZ` mutations from the seed `TTS_FUZZ_FIRST` on, in a process that ASan's runtime was loaded into.

    GGUF headers are read by our Python, safetensors headers by the Rust of their package, and the weights of both by
    torch and our kernels. None of them is compiled for ASan here. What its runtime sees of such code are its calls of
    the C library: a memcpy, memmove or strlen beyond a block of the heap or into a freed one, a block freed twice, and
    an allocation of more than the limit. It does not see a single load or store out of bounds, unless that faults;
    the end of the process then gives the seed. Our kernels compiled for ASan have their tests in `make sanitize`.
    """
    less, written = KINDS[kind]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        found = fuzz_apart(kind, written(Path(folder)), range(FIRST, FIRST + SLOW // less))
    print(f"{kind}: {found}")
    assert min(found.values()) > 1


def test_a_crash_gives_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of another process is replaced by one that ends it at a seed."""
    path = small_gptq(tmp_path)
    script = tmp_path / "crash.py"
    script.write_text(CRASH.format(folder=str(Path(__file__).parent)), encoding="utf-8")
    monkeypatch.setattr(untrusted_files, "__file__", str(script))
    monkeypatch.setattr(untrusted_files, "asan", dict)
    with pytest.raises(AssertionError, match=r"safetensors, seed 7: exit status -\d+"):
        fuzz_apart("safetensors", path, range(3, 20))


CRASH = """
import os, sys
sys.path.insert(0, {folder!r})
from untrusted_files import READERS, Path, fuzz
seeds = iter(range(3, 20))
READERS["safetensors"] = READERS["safetensors"]._replace(read=lambda path: next(seeds) == 7 and os.abort())
fuzz("safetensors", Path(sys.argv[2]), range(int(sys.argv[3]), int(sys.argv[3]) + int(sys.argv[4])))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_gptq(tmp_path_factory.mktemp("gptq")).parent


VALUES = (None, True, -1, 0, 3, 4, 32, 2**70, 0.5, "gptq", "4", [], [4], {}, {"weights": 4}, {"a": {"weights": {}}})


@pytest.mark.parametrize("config", [GPTQ, AWQ, PACKED], ids=["gptq", "awq", "compressed-tensors"])
def test_mutated_configurations(config: dict[str, Any], folder: Path) -> None:
    found = {"read": 0, "refused": 0}
    for seed in range(100):
        rng = random.Random(seed)
        changed = json.loads(json.dumps(config))
        place = changed
        while isinstance(place, dict) and place and rng.random() < 0.7:
            key = rng.choice(sorted(place))
            if not isinstance(place[key], dict) or rng.random() < 0.3:
                place[key] = rng.choice(VALUES)
                break
            place = place[key]
        few_bits_files.change_config(folder, changed)
        with only_errors_that_name(folder, found):
            checkpoint = open_checkpoint(str(folder))
            for name in sorted(checkpoint.names):
                checkpoint.weight(name)
    assert found["refused"] > 10


HUGE = 2**60


def header(counts: tuple[int, int], *rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(rest)


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    places = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return struct.pack("<Q", len(name)) + name.encode() + places


PLANTED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "magic": (b"GGML" + bytes(64), "does not begin with 'GGUF'"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "expected version 2 or 3, got 1"),
    "keys": (header((0, HUGE), bytes(64)), "items do not fit"),
    "tensors": (header((HUGE, 0), bytes(64)), "items do not fit"),
    "text": (header((0, 1), struct.pack("<Q", HUGE), bytes(64)), "it ends within"),
    "list": (header((0, 1), key("a", 9, struct.pack("<IQ", 4, HUGE)), bytes(64)), "items do not fit"),
    "texts": (header((0, 1), key("a", 9, struct.pack("<IQ", 8, HUGE)), bytes(64)), "items do not fit"),
    "lists of lists": (header((0, 1), key("a", 9, struct.pack("<IQ", 9, 1)), bytes(64)), "unknown type 9"),
    "value": (header((0, 1), key("a", 77, b""), bytes(64)), "unknown type 77"),
    "twice": (header((0, 2), *[key("a", 0, b"1")] * 2, bytes(64)), "'a' is there twice"),
    "not text": (header((0, 1), key("a", 8, struct.pack("<Q", 2) + b"\xff\xfe"), bytes(64)), "utf-8"),
    "dimensions": (header((1, 0), tensor("t", (2,) * 5), bytes(64)), "expected 1 to 4 dimensions, got 5"),
    "shape": (header((1, 0), tensor("t", (33,), 2), bytes(64)), r"\[33\] is no shape of Q4_0"),
    "nothing": (header((1, 0), tensor("t", (0,)), bytes(64)), r"\[0\] is no shape"),
    "large": (header((1, 0), tensor("t", (2**31 - 1,) * 4), bytes(64)), "ends behind the file"),
    "offset": (header((1, 0), tensor("t", (4,), 0, 2**63), bytes(64)), "ends behind the file"),
    "alignment": (header((1, 0), tensor("t", (4,), 0, 8), bytes(64)), "no multiple of 32"),
    "alignment of 0": (
        header((0, 1), key("general.alignment", 4, struct.pack("<I", 0)), bytes(64)), "general.alignment: expected"
    ),
    "tensor twice": (header((2, 0), *[tensor("t", (4,))] * 2, bytes(64)), "'t' is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults(name: str, tmp_path: Path) -> None:
    data, reason = PLANTED[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"^{path}: not a GGUF file that can be read: .*{reason}"):
            read_header(str(path))
        assert tracemalloc.get_traced_memory()[1] < 2**24  # what they ask for is beyond 2**30 each
    finally:
        tracemalloc.stop()


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = small_gguf(tmp_path)
    checkpoint = GGUFCheckpoint(str(path))
    path.write_bytes(path.read_bytes()[: end_of_gguf(path) + 8])
    with pytest.raises(ValueError, match=r"m\.gguf: tensor 'output_norm\.weight' ends behind the file"):
        checkpoint.weight("model.norm.weight")
