"""Broken files give errors with their name: never a crash, a hang or more memory than the size of the file."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf")

import few_bits_files  # noqa: E402
from gguf_files import wide_model, write  # noqa: E402
from test_few_bits import AWQ, GPTQ, PACKED  # noqa: E402
from tiny import tiny_model  # noqa: E402
from tts_search.models import transformers as adapter  # noqa: E402
from tts_search.models.formats import gguf_header  # noqa: E402
from tts_search.models.formats.gguf import GGUFCheckpoint  # noqa: E402
from tts_search.models.formats.gguf_header import read_header  # noqa: E402
from tts_search.models.formats.opening import open_checkpoint  # noqa: E402
from tts_search.models.loading import load_decoder  # noqa: E402

EXTREMES = (0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
SLOW = int(os.environ.get("TTS_FUZZ", "20000"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A GGUF file of one layer, and where its tensors begin."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write(path, wide_model(hidden_size=32, intermediate_size=32, head_dim=8, num_hidden_layers=1), "Q4_0")
    return path.read_bytes(), min(info.offset for info in read_header(str(path)).tensors.values())


def mutated(data: bytes, end: int, rng: random.Random) -> bytes:
    """A few changes before ``end``: bytes, whole numbers at the edges of their types, cuts, repetitions."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(end, len(changed) - 8))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at : at + 4] = struct.pack("<I", rng.choice(EXTREMES) % 2**32)
        elif kind == 2:
            changed[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
        elif kind == 3:
            del changed[at : at + rng.randint(1, 64)]
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 64)]
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.1 else changed)


@contextlib.contextmanager
def only_errors_that_name(path: Path, found: dict[str, int]) -> Iterator[None]:
    try:
        yield
        found["read"] += 1
    except ValueError as error:
        if str(path) not in str(error):
            raise AssertionError(f"no name of the file in {error!r}") from error
        found["refused"] += 1


def fuzz(count: int, target: Path, data: bytes, end: int, read: Callable[[], Any]) -> dict[str, int]:
    found = {"read": 0, "refused": 0}
    for seed in range(count):
        target.write_bytes(mutated(data, end, random.Random(seed)))
        gguf_header._read_header.cache_clear()  # a file of the same size at the same tick of the clock
        try:
            with only_errors_that_name(target, found):
                read()
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    return found


def open_gguf(path: Path) -> None:
    GGUFCheckpoint(str(path))
    adapter.load_tokenizer(str(path))
    adapter.eos_tokens(str(path), None)


def test_mutated_gguf_headers(small: tuple[bytes, int], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    found = fuzz(1000, path, *small, lambda: open_gguf(path))
    assert min(found.values()) > 20


def test_mutated_gguf_files_load_or_do_not(small: tuple[bytes, int], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    found = fuzz(100, path, *small, lambda: load_decoder(str(path)))
    assert min(found.values()) > 1


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_mutated_gguf_headers(small: tuple[bytes, int], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for count, read in ((SLOW, lambda: read_header(str(path))), (SLOW // 20, lambda: load_decoder(str(path)))):
        assert min(fuzz(count, path, *small, read).values()) > 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gptq")
    model = tiny_model(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    few_bits_files.save(path, model, GPTQ, lambda weight: few_bits_files.gptq(weight, 64, False))
    return path


def test_mutated_safetensors_headers(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]

    def read() -> None:
        checkpoint = open_checkpoint(str(folder))
        for name in checkpoint.names:
            checkpoint.shape(name)
            checkpoint.weight(name)

    found = {"read": 0, "refused": 0}
    try:
        for seed in range(500):
            path.write_bytes(mutated(data, end, random.Random(seed)))
            with only_errors_that_name(folder, found):
                read()
    finally:
        path.write_bytes(data)
    assert min(found.values()) > 2


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


def test_a_file_that_became_shorter(small: tuple[bytes, int], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small[0])
    checkpoint = GGUFCheckpoint(str(path))
    path.write_bytes(small[0][: small[1] + 8])
    with pytest.raises(ValueError, match=r"m\.gguf: tensor 'output_norm\.weight' ends behind the file"):
        checkpoint.weight("model.norm.weight")
