"""The part of a GGUF file before its tensors: metadata by key, and the name, type, shape and place of each tensor.

The file is not trusted. Each length is compared with the bytes that are left before anything is read or reserved. So a
broken file gives an error that names it, and costs no more time or memory than its own size. The layout is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["BLOCKS", "GGUFHeader", "TensorInfo", "read_header"]

# The supported types: name, number of weights in a block, number of bytes of a block.
BLOCKS: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
# Names of unsupported types.
_OTHERS: Final = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZE: Final = struct.Struct("<Q")
_STRING: Final = 8
_ARRAY: Final = 9
_LARGEST_DIMENSION: Final = 2**31


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a file: its type as a number in `BLOCKS`, its shape in torch's order, and where its bytes begin."""

    kind: int
    shape: tuple[int, ...]
    offset: int

    @property
    def kind_name(self) -> str:
        """Such as "Q4_0"."""
        return BLOCKS[self.kind][0]

    @property
    def row_bytes(self) -> int:
        """Number of bytes of one row."""
        _, width, size = BLOCKS[self.kind]
        return self.shape[-1] // width * size

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the tensor."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The metadata, and the tensors by name."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def bytes_of(self, name: str) -> Tensor:
        """The bytes of a tensor as the file has them, row by row [rows, bytes] uint8.

        Raises
        ------
        ValueError
            If the file has become shorter.
        """
        info = self.tensors[name]
        memory = bytearray(info.num_bytes)
        with Path(self.path).open("rb") as opened:
            opened.seek(info.offset)
            if opened.readinto(memory) != info.num_bytes:
                raise ValueError(f"{self.path}: tensor {name!r} ends behind the file")
        return torch.frombuffer(memory, dtype=torch.uint8).view(-1, info.row_bytes)


def read_header(path: str) -> GGUFHeader:
    """Read the part before the tensors.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is not a GGUF file of version 2 or 3, holds a tensor of a type that is not in `BLOCKS`, or is broken; with
        its name.
    """
    stat = Path(path).stat()
    return _read_header(path, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@functools.lru_cache(maxsize=2)  # the configuration, the tokenizer and the weights read it one after another
def _read_header(path: str, *_: int) -> GGUFHeader:
    try:
        with Path(path).open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return GGUFHeader(path, *_Reader(mapped).header())
    except ValueError as error:  # of an empty file and of decoding a text, too
        raise ValueError(f"{path}: not a GGUF file that can be read: {error}") from error


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def header(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"expected version 2 or 3, got {version}")
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(num_keys, least=13)):
            key = self._text()
            if key in metadata:
                raise ValueError(f"{key!r} is there twice")
            metadata[key] = self._value(self._number("I"))
        infos = [self._tensor() for _ in range(self._count(num_tensors, least=24))]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise ValueError(f"general.alignment: expected a number from 1 to {2**20}, got {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, kind, shape, offset in infos:
            if name in tensors:
                raise ValueError(f"tensor {name!r} is there twice")
            if offset % alignment:
                raise ValueError(f"tensor {name!r} begins at {offset}, which is no multiple of {alignment}")
            tensors[name] = info = TensorInfo(kind, shape, start + offset)
            if info.offset + info.num_bytes > len(self.data):
                raise ValueError(f"tensor {name!r} ends behind the file")
        return metadata, tensors

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends within what begins at byte {self.at}")
        self.at += size
        return self.data[self.at - size : self.at]

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _count(self, count: int, least: int) -> int:
        """The number of things, of at least `least` bytes each."""
        if count > (len(self.data) - self.at) // least:
            raise ValueError(f"{count} items do not fit into what is left at byte {self.at}")
        return count

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"unknown type {kind} of a value before byte {self.at}")
        of, count = self._number("I"), self._number("Q")
        if of in _NUMBERS:
            size = struct.calcsize(_NUMBERS[of])
            return list(struct.unpack(f"<{self._count(count, size)}{_NUMBERS[of]}", self._take(count * size)))
        if of != _STRING:
            raise ValueError(f"unknown type {of} of a list's values before byte {self.at}")
        return self._texts(self._count(count, least=8))

    def _texts(self, count: int) -> list[str]:
        """Many texts. A vocabulary has a hundred thousand of them."""
        data, at, end, texts = self.data, self.at, len(self.data), []
        for _ in range(count):
            if at + 8 > end or at + 8 + (size := _SIZE.unpack_from(data, at)[0]) > end:
                raise ValueError(f"it ends within what begins at byte {at}")
            texts.append(data[at + 8 : at + 8 + size].decode("utf-8"))
            at += 8 + size
        self.at = at
        return texts

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, num_dims = self._text(), self._number("I")
        if not 1 <= num_dims <= 4:
            raise ValueError(f"tensor {name!r}: expected 1 to 4 dimensions, got {num_dims}")
        shape = tuple(self._number("Q") for _ in range(num_dims))[::-1]  # the file has the innermost one first
        kind, offset = self._number("I"), self._number("Q")
        if kind not in BLOCKS:
            raise ValueError(
                f"tensor {name!r} is {_OTHERS.get(kind, f'of type {kind}')}; "
                f"read are {', '.join(each for each, _, _ in BLOCKS.values())}"
            )
        if not all(1 <= size < _LARGEST_DIMENSION for size in shape) or shape[-1] % BLOCKS[kind][1]:
            raise ValueError(f"tensor {name!r}: {list(shape)} is no shape of {BLOCKS[kind][0]}")
        return name, kind, shape, offset
