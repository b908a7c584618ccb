"""Mutated files, each read or refused: in this process, or in a process of its own whose crash names the mutation.

The second runs this file: ``python untrusted_files.py READER FILE FIRST COUNT`` reads COUNT mutations of FILE, from the
seed FIRST on. FILE.seed holds the seed in work, and FILE its mutation; when all are done, FILE is as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tts_search.models import transformers as adapter
from tts_search.models.formats import gguf_header
from tts_search.models.formats.gguf import GGUFCheckpoint
from tts_search.models.formats.opening import open_checkpoint
from tts_search.models.loading import load_decoder

EXTREMES = (0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
# What stands in the place of a part of a header in JSON: types, numbers, other kinds of values.
PARTS = (*EXTREMES, 2**70, -1, 0.5, None, True, "F32", "F64", "I8", "U8", "I32", "BOOL", "F4", "F8_E8M0", "X", [], {})
LARGEST_ALLOCATION_MB = 256  # the runtime of ASan ends a process that asks for more at once


class Reader(NamedTuple):
    """Reads a whole file of a format; ``end`` says where its header ends."""

    read: Callable[[Path], Any]
    end: Callable[[Path], int]
    mutate: Callable[[bytes, int, random.Random], bytes]
    named: Callable[[Path], Path]  # the path that an error names


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


def mutated_safetensors(data: bytes, end: int, rng: random.Random) -> bytes:
    """Bytes of the header as above, or parts of it by their meaning: most changed bytes are no JSON any more."""
    if rng.random() < 0.5:
        return mutated(data, end, rng)
    header = json.loads(data[8:end])
    for _ in range(rng.randint(1, 2)):
        change_part(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[end:]


def change_part(header: dict[str, Any], rng: random.Random) -> None:
    """Give a part of a tensor's entry another value or that of another tensor, or the tensor another name."""
    name = rng.choice(list(header))
    entry = header[name]
    kind = rng.randrange(5)
    if kind == 0 or not isinstance(entry, dict) or not entry:
        header[rng.choice(["", "x", "a.qweight", "__metadata__", "\x00", name * 50])] = header.pop(name)
        return
    part = rng.choice(list(entry))
    if kind == 1:
        other = header[rng.choice(list(header))]
        entry[part] = other.get(part, entry[part]) if isinstance(other, dict) else entry[part]
    elif kind == 2 and isinstance(entry[part], list) and entry[part]:
        at = rng.randrange(len(entry[part]))
        old = entry[part][at]
        near = [old + rng.choice([-1, 1, 4])] if isinstance(old, int) else []
        entry[part][at] = rng.choice([*PARTS, *near])
    elif kind == 3 and isinstance(entry[part], list):
        entry[part] = rng.choice([entry[part][::-1], entry[part] + [1], entry[part][1:], [0, *entry[part]]])
    else:
        entry[part] = rng.choice(PARTS)


@contextlib.contextmanager
def only_errors_that_name(path: Path, found: dict[str, int]) -> Iterator[None]:
    """Count what is read and what is refused by an error that names the path."""
    try:
        yield
        found["read"] += 1
    except ValueError as error:
        if str(path) not in str(error):
            raise AssertionError(f"no name of the file in {error!r}") from error
        found["refused"] += 1


def fuzz(reader: str, path: Path, seeds: Iterable[int]) -> dict[str, int]:
    """Read a mutation of the file for each seed."""
    read, end, mutate, named = READERS[reader]
    data, header, name = path.read_bytes(), end(path), named(path)
    found = {"read": 0, "refused": 0}
    with Path(f"{path}.seed").open("wb", buffering=0) as at_work:
        for seed in seeds:
            os.pwrite(at_work.fileno(), b"%-20d" % seed, 0)
            path.write_bytes(mutate(data, header, random.Random(seed)))
            try:
                with only_errors_that_name(name, found):
                    read(path)
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {error!r}") from error
    path.write_bytes(data)
    return found


def fuzz_apart(reader: str, path: Path, seeds: range) -> dict[str, int]:
    """The same in a process of its own, with the runtime of ASan where g++ has it.

    Raises
    ------
    AssertionError
        With the seed, if a mutation is neither read nor refused, or ends the process.
    """
    command = [sys.executable, __file__, reader, str(path), str(seeds.start), str(len(seeds))]
    done = subprocess.run(command, env={**os.environ, **asan()}, capture_output=True, text=True, check=False)
    if done.returncode:
        seed = Path(f"{path}.seed").read_text(encoding="ascii").strip()
        raise AssertionError(f"{reader}, seed {seed}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def asan() -> dict[str, str]:
    """The environment of a process that starts with ASan's runtime; empty if there is none.

    libstdc++ beside it, as in tests/sanitize.sh.
    """
    libraries = [library_of_gcc("libasan.so"), library_of_gcc("libstdc++.so")]
    if not all(libraries):
        return {}
    options = f"detect_leaks=0:max_allocation_size_mb={LARGEST_ALLOCATION_MB}"
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options}


def library_of_gcc(name: str) -> str:
    """The path of a library; empty if g++ or the library is missing."""
    try:
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    path = found.stdout.strip()
    return path if Path(path).is_absolute() else ""


def open_gguf(path: Path) -> None:
    gguf_header._read_header.cache_clear()  # a file of the same size at the same tick of the clock
    GGUFCheckpoint(str(path))
    adapter.load_tokenizer(str(path))
    adapter.eos_tokens(str(path), None)


def load_gguf(path: Path) -> None:
    gguf_header._read_header.cache_clear()
    load_decoder(str(path))


def end_of_gguf(path: Path) -> int:
    gguf_header._read_header.cache_clear()
    return min(info.offset for info in gguf_header.read_header(str(path)).tensors.values())


def read_safetensors(path: Path) -> None:
    checkpoint = open_checkpoint(str(path.parent))
    for name in checkpoint.names:
        checkpoint.shape(name)
        checkpoint.weight(name)


def end_of_safetensors(path: Path) -> int:
    size: int = struct.unpack("<Q", path.read_bytes()[:8])[0]
    return 8 + size


READERS = {
    "opened gguf": Reader(open_gguf, end_of_gguf, mutated, lambda path: path),
    "loaded gguf": Reader(load_gguf, end_of_gguf, mutated, lambda path: path),
    "safetensors": Reader(read_safetensors, end_of_safetensors, mutated_safetensors, lambda path: path.parent),
}

if __name__ == "__main__":
    _, chosen, file, start, number = sys.argv
    print(json.dumps(fuzz(chosen, Path(file), range(int(start), int(start) + int(number)))))
