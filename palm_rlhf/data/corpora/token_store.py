"""Text and tokens on disk, memory-mapped: written once, piece by piece, and read without being loaded."""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from palm_rlhf.data.corpora.cached_folder import stored
from palm_rlhf.data.corpora.documents import Document

FORMAT = 1
PIECE = 1 << 20
# Documents are joined by an empty line, as a reader would.
SEPARATOR = b"\n\n"


@runtime_checkable
class Tokenizer(Protocol):
    """Turns text into token ids below `vocab_size`, adding no special tokens of its own."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; none for the empty string."""
        ...


@dataclass(frozen=True, eq=False)
class Text:
    """A file of text, with the ends of its documents and, for errors, the byte at which each of its sources starts."""

    path: Path
    fingerprint: str
    size: int
    ends: np.ndarray
    sources: Sequence[tuple[int, str]]

    def documents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The bounds of the documents that have bytes from `start` to `end`, separators left out."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        for index in range(first, len(self.ends)):
            begin = int(self.ends[index - 1]) + len(SEPARATOR) if index else 0
            if begin >= end:
                return
            yield begin, int(self.ends[index])

    def where(self, offset: int) -> str:
        """The source of a byte of the text, and its place there."""
        start, name = self.sources[bisect_right(self.sources, offset, key=lambda source: source[0]) - 1]
        return f"{name}, byte {offset - start:,}"


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of each split, and the bytes of text behind them."""

    splits: tuple[np.ndarray, ...]
    num_bytes: tuple[int, ...]


def digest(*content: Any) -> str:
    """The sha256 of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stamp(file: Path) -> tuple[str, int, int]:
    """What tells a file from another, or from itself before a change: path, size and time of modification."""
    status = file.stat()
    return os.path.abspath(file), status.st_size, status.st_mtime_ns


def map_array(path: Path, dtype: Any) -> np.ndarray:
    """The file's content as a read-only array that is read from disk where it is touched."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def text_of_file(file: Path) -> Text:
    """A plain file as it is: one document, no copy."""
    size = file.stat().st_size
    return Text(file, digest(stamp(file)), size, np.array([size]), [(0, str(file))])


def text_of_documents(folder: Path, fingerprint: str, num_bytes: int, documents: Iterable[Document]) -> Text:
    """The documents joined into one file in `folder`, unless it holds them already by the `fingerprint`.

    `num_bytes`: about how much there is to write, for the error of a full disk.
    """

    def build(temporary: Path) -> dict[str, Any]:
        sources: list[tuple[int, str]] = []
        bar = tqdm(desc="reading text", unit="B", unit_scale=True, delay=1.0)
        with bar, open(temporary / "text", "wb") as text, open(temporary / "ends", "wb") as ends:
            for name, chunks in documents:
                start = text.tell()
                for chunk in filter(None, chunks):
                    if text.tell() == start > 0:
                        text.write(SEPARATOR)
                    if not sources or sources[-1][1] != name:
                        sources.append((text.tell(), name))
                    text.write(chunk)
                    bar.update(len(chunk))
                if text.tell() > start:
                    ends.write(np.int64(text.tell()).tobytes())
            return {"size": text.tell(), "sources": sources}

    with stored(folder, digest(FORMAT, fingerprint), num_bytes, build) as content:
        ends = map_array(folder / "ends", np.int64)
        return Text(folder / "text", digest(FORMAT, fingerprint), content["size"], ends, content["sources"])


def bytes_of(text: Text, bounds: Sequence[int]) -> Tokens:
    """The bytes of the text as its tokens, split at `bounds`: views of the file itself."""
    data = map_array(text.path, np.uint8)
    splits = tuple(data[start:end] for start, end in pairwise(bounds))
    return Tokens(splits, tuple(len(split) for split in splits))


def tokens_of(
    text: Text,
    bounds: Sequence[int],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    eos_token: int | None = None,
    piece: int = PIECE,
) -> Tokens:
    """The text's tokens split at `bounds`, in a folder below `folder` that is written once.

    A bound inside a character moves to its end. With `eos_token` every document is followed by it, in place of the
    empty line, and its bytes are not counted. `piece`: the bytes given to the tokenizer at a time.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    bounds = [_character_start(text, bound) for bound in bounds]
    folder = folder / digest(str(text.path), fingerprint_of(tokenizer, text), eos_token, piece)[:32]

    def build(temporary: Path) -> dict[str, Any]:
        num_bytes = [0] * (len(bounds) - 1)
        bar = tqdm(desc="tokenizing", total=text.size, unit="B", unit_scale=True, delay=1.0)
        with bar, open(text.path, "rb", buffering=0) as source:
            for index, (start, end) in enumerate(pairwise(bounds)):
                with open(temporary / str(index), "wb") as out:
                    for ids, length in _encoded(text, source, start, end, tokenizer, eos_token, piece):
                        out.write(ids.astype(dtype).tobytes())
                        num_bytes[index] += length
                        bar.update(length)
        return {"num_bytes": num_bytes}

    fingerprint = digest(FORMAT, text.fingerprint, bounds)
    with stored(folder, fingerprint, text.size * dtype.itemsize, build) as content:
        splits = tuple(map_array(folder / str(index), dtype) for index in range(len(bounds) - 1))
        return Tokens(splits, tuple(content["num_bytes"]))


def fingerprint_of(tokenizer: Tokenizer, text: Text) -> str:
    """What tells one tokenizer from another: its attribute `fingerprint`, else the state it can write of itself.

    One that has neither is known by its class, its `vocab_size` and what it makes of characters of many scripts and
    of the beginning of the text.
    """
    kind = type(tokenizer)
    known: list[Any] = [kind.__module__, kind.__qualname__, int(tokenizer.vocab_size)]
    write = getattr(getattr(tokenizer, "backend_tokenizer", tokenizer), "to_str", None)
    if isinstance(getattr(tokenizer, "fingerprint", None), str):
        known.append(tokenizer.fingerprint)
    elif write is not None:
        known.append(write())
    else:
        with open(text.path, "rb") as file:
            beginning = file.read(PIECE // 16).decode(errors="replace")
        known += [_checked(tokenizer, probe).tolist() for probe in ("".join(map(chr, range(0x20, 0x3000))), beginning)]
    return digest(*known)


def _encoded(
    text: Text, source: BinaryIO, start: int, end: int, tokenizer: Tokenizer, eos_token: int | None, piece: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The ids of the text from `start` to `end`, with the number of bytes each array stands for."""
    documents = [(0, text.size)] if eos_token is None else text.documents(start, end)
    for first, last in documents:
        for offset, raw in pieces(source, max(first, start), min(last, end), piece):
            try:
                string = raw.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{text.where(offset + error.start)}, is not UTF-8 ({error.reason}): convert the file to UTF-8, or "
                    "train on bytes, without a tokenizer"
                ) from error
            yield _checked(tokenizer, string, continues=offset > first), len(raw)
        if eos_token is not None and last <= end:
            yield np.array([eos_token]), 0


def _checked(tokenizer: Tokenizer, string: str, *, continues: bool = False) -> np.ndarray:
    """The ids of a text, which may go on after another piece of its document."""
    encode = getattr(tokenizer, "encode_continuation", tokenizer.encode) if continues else tokenizer.encode
    ids = encode(string)
    array = np.asarray(ids if len(ids) else np.empty(0, np.int64))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{type(tokenizer).__name__}.encode gave {type(ids).__name__}, expected a list of token ids")
    if array.size and not (0 <= array.min() and array.max() < tokenizer.vocab_size):
        bad = int(array.min()) if array.min() < 0 else int(array.max())
        raise ValueError(
            f"{type(tokenizer).__name__}.encode gave the token id {bad}, expected ids from 0 to below its vocab_size, "
            f"{tokenizer.vocab_size}: vocab_size must count added tokens too"
        )
    return array


CUT_WITHIN = 1 << 16
# Where to cut text in two, best first: at a place where both sides keep the words that the whole has, as tokenizers
# split text into words (a line break, or a space, alone between printing characters); else between two characters.
_CUTS = tuple(re.compile(cut, re.DOTALL) for cut in (rb".*\S\n(?=\S)", rb".*\S(?= \S)", rb".+(?=[\x00-\x7f\xc0-\xff])"))


def pieces(source: BinaryIO, start: int, end: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The bytes of an unbuffered file from `start` to `end`, about `size` at a time, with the offset of each."""
    source.seek(start)
    held = b""
    while chunk := source.read(min(size, end - start - len(held))):
        held += chunk
        found = next(filter(None, (cut.match(held, max(0, len(held) - CUT_WITHIN)) for cut in _CUTS)), None)
        if end - start > len(held):
            cut = found.end() if found else len(held)
            yield start, held[:cut]
            start += cut
            held = held[cut:]
    if held:
        yield start, held


def _character_start(text: Text, bound: int) -> int:
    data = map_array(text.path, np.uint8)
    limit = min(bound + 3, text.size)
    while bound < limit and data[bound] & 0xC0 == 0x80:
        bound += 1
    return bound
