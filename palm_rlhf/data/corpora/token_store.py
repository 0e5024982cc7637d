"""Text and tokens on disk: written once, in pieces, and memory-mapped when they are read."""

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
from palm_rlhf.data.corpora.documents import SourceDocument

FORMAT = 1
PIECE = 1 << 20
# An empty line joins documents.
SEPARATOR = b"\n\n"


@runtime_checkable
class TextTokenizer(Protocol):
    """A tokenizer that turns text into token ids below `vocab_size`, without adding special tokens."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; an empty string has none."""
        ...


@dataclass(frozen=True, eq=False)
class StoredText:
    """A file of text with the ends of its documents.

    `sources` holds, for errors, the byte at which each source file begins, and its name.
    """

    path: Path
    fingerprint: str
    size: int
    ends: np.ndarray
    sources: Sequence[tuple[int, str]]

    def documents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the bounds of the documents with bytes from `start` to `end`, without the separators."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        for index in range(first, len(self.ends)):
            begin = int(self.ends[index - 1]) + len(SEPARATOR) if index else 0
            if begin >= end:
                return
            yield begin, int(self.ends[index])

    def where(self, offset: int) -> str:
        """Return the name of the source of a byte, and its place in that source."""
        start, name = self.sources[bisect_right(self.sources, offset, key=lambda source: source[0]) - 1]
        return f"{name}, byte {offset - start:,}"


@dataclass(frozen=True, eq=False)
class TokenSplits:
    """The tokens of each split, and the number of bytes of text that they encode."""

    splits: tuple[np.ndarray, ...]
    num_bytes: tuple[int, ...]


def json_digest(*content: Any) -> str:
    """Return the sha256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_stamp(file: Path) -> tuple[str, int, int]:
    """Return the path, size and modification time of a file, which change whenever the file does."""
    status = file.stat()
    return os.path.abspath(file), status.st_size, status.st_mtime_ns


def map_array(path: Path, dtype: Any) -> np.ndarray:
    """Return the content of a file as a read-only array, which is read from disk when it is used."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def text_of_file(file: Path) -> StoredText:
    """Return a plain file as it is, without a copy: one document."""
    size = file.stat().st_size
    return StoredText(file, json_digest(file_stamp(file)), size, np.array([size]), [(0, str(file))])


def text_of_documents(
    folder: Path, fingerprint: str, num_bytes: int, documents: Iterable[SourceDocument]
) -> StoredText:
    """Join documents into one file in `folder`, unless it holds them already by the `fingerprint`.

    Args:
        folder: Where the text is stored.
        fingerprint: A digest of everything that the text depends on.
        num_bytes: About how much there is to write, for the error of a full disk.
        documents: The documents in their order; empty ones are left out.
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

    with stored(folder, json_digest(FORMAT, fingerprint), num_bytes, build) as content:
        ends = map_array(folder / "ends", np.int64)
        return StoredText(folder / "text", json_digest(FORMAT, fingerprint), content["size"], ends, content["sources"])


def byte_tokens(text: StoredText, bounds: Sequence[int]) -> TokenSplits:
    """Return the bytes of a text as its tokens, split at `bounds`, as views of the file itself."""
    data = map_array(text.path, np.uint8)
    splits = tuple(data[start:end] for start, end in pairwise(bounds))
    return TokenSplits(splits, tuple(len(split) for split in splits))


def tokens_of(
    text: StoredText,
    bounds: Sequence[int],
    tokenizer: TextTokenizer,
    folder: Path,
    *,
    eos_token: int | None = None,
    piece: int = PIECE,
) -> TokenSplits:
    """Return the tokens of a text, split at `bounds`; a folder below `folder` stores them.

    A bound inside a character moves to its end.

    Args:
        text: The text to tokenize.
        bounds: The bytes at which splits start and end.
        tokenizer: Encodes the text.
        folder: Where the tokens are stored.
        eos_token: Follows every document in place of the separator; its bytes are not counted.
        piece: The bytes that the tokenizer is given at a time.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    bounds = [_character_start(text, bound) for bound in bounds]
    folder = folder / json_digest(str(text.path), fingerprint_of(tokenizer, text), eos_token, piece)[:32]

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

    fingerprint = json_digest(FORMAT, text.fingerprint, bounds)
    with stored(folder, fingerprint, text.size * dtype.itemsize, build) as content:
        splits = tuple(map_array(folder / str(index), dtype) for index in range(len(bounds) - 1))
        return TokenSplits(splits, tuple(content["num_bytes"]))


def fingerprint_of(tokenizer: TextTokenizer, text: StoredText) -> str:
    """Return a digest that tells one tokenizer from another.

    It is that of the attribute `fingerprint` or else of the state that the tokenizer can write. A tokenizer without
    either is known by its class, its `vocab_size`, and the ids of characters of many scripts and of the beginning of
    the text.
    """
    kind = type(tokenizer)
    known: list[Any] = [kind.__module__, kind.__qualname__, int(tokenizer.vocab_size)]
    write = getattr(getattr(tokenizer, "backend_tokenizer", tokenizer), "to_str", None)
    fingerprint = getattr(tokenizer, "fingerprint", None)
    if isinstance(fingerprint, str):
        known.append(fingerprint)
    elif write is not None:
        known.append(write())
    else:
        with open(text.path, "rb") as file:
            beginning = file.read(PIECE // 16).decode(errors="replace")
        known += [_checked(tokenizer, probe).tolist() for probe in ("".join(map(chr, range(0x20, 0x3000))), beginning)]
    return json_digest(*known)


def _encoded(
    text: StoredText,
    source: BinaryIO,
    start: int,
    end: int,
    tokenizer: TextTokenizer,
    eos_token: int | None,
    piece: int,
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the ids of the text from `start` to `end`, each array with the number of bytes that it encodes."""
    documents = [(0, text.size)] if eos_token is None else text.documents(start, end)
    for first, last in documents:
        for offset, raw in text_pieces(source, max(first, start), min(last, end), piece):
            try:
                string = raw.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{text.where(offset + error.start)}, is not UTF-8 ({error.reason}), expected UTF-8: convert the "
                    "file, or train on bytes, without a tokenizer"
                ) from error
            yield _checked(tokenizer, string, continues=offset > first), len(raw)
        if eos_token is not None and last <= end:
            yield np.array([eos_token]), 0


def _checked(tokenizer: TextTokenizer, string: str, *, continues: bool = False) -> np.ndarray:
    """Return the ids of a text as an array; `continues` says that the text follows another piece of its document."""
    encode = getattr(tokenizer, "encode_continuation", tokenizer.encode) if continues else tokenizer.encode
    ids = encode(string)
    array = np.asarray(ids if len(ids) else np.empty(0, np.int64))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{type(tokenizer).__name__}.encode returned {type(ids).__name__}, expected a list of token ids"
        )
    if array.size and not (0 <= array.min() and array.max() < tokenizer.vocab_size):
        bad = int(array.min()) if array.min() < 0 else int(array.max())
        raise ValueError(
            f"{type(tokenizer).__name__}.encode returned the token id {bad}, expected ids from 0 to below its "
            f"vocab_size, {tokenizer.vocab_size}: count added tokens in vocab_size too"
        )
    return array


CUT_WITHIN = 1 << 16
# Where to cut text in two, best first: after a line break, or before a space, that stands alone between printing
# characters; else between two characters. Tokenizers split text into words at the former, so that no word is cut.
_CUTS = tuple(re.compile(cut, re.DOTALL) for cut in (rb".*\S\n(?=\S)", rb".*\S(?= \S)", rb".+(?=[\x00-\x7f\xc0-\xff])"))


def text_pieces(source: BinaryIO, start: int, end: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes of an unbuffered file from `start` to `end`, about `size` at a time, each with its offset."""
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


def _character_start(text: StoredText, bound: int) -> int:
    data = map_array(text.path, np.uint8)
    limit = min(bound + 3, text.size)
    while bound < limit and data[bound] & 0xC0 == 0x80:
        bound += 1
    return bound
