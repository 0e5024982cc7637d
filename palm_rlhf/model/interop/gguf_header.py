"""The header of a GGUF file, the format of llama.cpp: its metadata, and where each tensor lies.

The layout is that of ggml's docs/gguf.md. Every count in the header is checked against the length of the file before
anything is read or allocated by it, since the file may be damaged or hostile.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from palm_rlhf.model.local_model import GGUF_SUFFIX

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# The types of numbers in the metadata, by their ids, as the module struct writes them.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SMALLEST_VALUE = 8 + 4 + 1  # bytes of an entry: the length of its name, its type, a number
SMALLEST_TENSOR = 8 + 4 + 4 + 8  # bytes of a tensor's entry: the length of its name, its axes, its type, its place
MAX_AXES, MAX_ENTRIES = 4, 2**24  # of a tensor, and of a list in the metadata
ALIGNMENT = "general.alignment"
DAMAGED = "copy or download the file again"
ENDS_EARLY = f"ends in the middle of its header, expected a whole file: {DAMAGED}"


def is_gguf(path: Path) -> bool:
    """Return whether a path is that of a GGUF file, by its suffix."""
    return path.suffix.lower() == GGUF_SUFFIX and not path.is_dir()


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its shape, in PyTorch's order of axes, its type's id, and its first byte in the file.

    `limit` is the size of the file, in bytes.
    """

    shape: tuple[int, ...]
    type_id: int
    start: int
    file: Path
    limit: int


class GGUFHeader:
    """The `metadata` of a GGUF file, as plain Python values and lists, and its `tensors` by name; `files` has its path.

    Raises FileNotFoundError where there is no file, and ValueError for a file that is damaged, or of another format,
    version or byte order.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; expected a GGUF file")
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.files = [path]
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self._file: BinaryIO = file
            self._read()

    def _read(self) -> None:
        magic = self._file.read(4)
        if magic != MAGIC:
            raise ValueError(
                f"{self.path} begins with {magic!r}, expected {MAGIC!r}: it is no GGUF file; download it "
                "again (a pointer of Git LFS, which begins with b'vers', by git lfs pull)"
            )
        version = self._number("I")
        if version & 0xFFFF == 0:
            raise ValueError(
                f"{self.path} is a big-endian GGUF file, expected a little-endian one: convert it with "
                "gguf-convert-endian of the package gguf"
            )
        if version not in VERSIONS:
            raise ValueError(
                f"{self.path} has the GGUF version {version}, expected one of {VERSIONS}: convert it again"
            )
        num_tensors, num_values = self._number("Q"), self._number("Q")
        self._check_count(num_values, SMALLEST_VALUE, "entries of metadata")
        self._check_count(num_tensors, SMALLEST_TENSOR, "tensors")
        for _ in range(num_values):
            name = self._new_name(self.metadata)
            self.metadata[name] = self._value(self._number("I"), name)
        starts: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self._new_name(starts)
            starts[name] = self._tensor(name)
        alignment = self.metadata.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path} has the {ALIGNMENT} {alignment!r}, expected a power of two: {DAMAGED}")
        data = -(-self._file.tell() // alignment) * alignment
        for name, (shape, type_id, start) in starts.items():
            self.tensors[name] = StoredTensor(shape, type_id, data + start, self.path, self.size)

    def _tensor(self, name: str) -> tuple[tuple[int, ...], int, int]:
        num_axes = self._number("I")
        if num_axes > MAX_AXES:
            raise ValueError(f"{self.path} has {num_axes} axes in {name}, expected at most {MAX_AXES}: {DAMAGED}")
        shape = tuple(self._number("Q") for _ in range(num_axes))[::-1]
        if not 0 < math.prod(shape) < 2**63:
            raise ValueError(f"{self.path} has the shape {shape} of {name}, expected another: {DAMAGED}")
        return shape, self._number("I"), self._number("Q")

    def _new_name(self, known: dict[str, Any]) -> str:
        name = self._string()
        if name in known:
            raise ValueError(f"{self.path} has {name!r} twice, expected each name once: {DAMAGED}")
        return name

    def _value(self, type_id: int, name: str) -> Any:
        if type_id == STRING:
            return self._string()
        if type_id in NUMBERS:
            return self._number(NUMBERS[type_id])
        if type_id != ARRAY:
            raise ValueError(f"{self.path} has {name} of the type {type_id}, expected one of GGUF: {DAMAGED}")
        kind, count = self._number("I"), self._number("Q")
        if kind == STRING:
            self._check_count(count, 8, f"strings in {name}")
            return self._strings(count)
        if kind not in NUMBERS:
            raise ValueError(f"{self.path} has an array {name} of the type {kind}, expected numbers or strings")
        self._check_count(count, struct.calcsize(NUMBERS[kind]), f"numbers in {name}")
        form = f"<{count}{NUMBERS[kind]}"
        return list(struct.unpack(form, self._bytes(struct.calcsize(form))))

    def _check_count(self, count: int, smallest: int, things: str) -> None:
        most = min(MAX_ENTRIES, (self.size - self._file.tell()) // smallest)
        if count > most:
            raise ValueError(f"{self.path} announces {count} {things}, expected at most {most} there: {DAMAGED}")

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        """Return strings that follow each other, of which a vocabulary has hundreds of thousands."""
        read, room = self._file.read, self.size - self._file.tell()
        strings = []
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            room -= 8 + length
            if room < 0 or len(data := read(length)) < length:
                raise ValueError(f"{self.path} {ENDS_EARLY}")
            strings.append(data)
        try:
            return [data.decode() for data in strings]
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} has a string that is not UTF-8 ({error}): {DAMAGED}") from error

    def _number(self, kind: str) -> Any:
        number = struct.unpack(f"<{kind}", self._bytes(struct.calcsize(kind)))[0]
        return float(str(np.float32(number))) if kind == "f" else number  # the decimal number that was written

    def _bytes(self, count: int) -> bytes:
        if count > self.size - self._file.tell() or len(data := self._file.read(count)) < count:
            raise ValueError(f"{self.path} {ENDS_EARLY}")
        return data
