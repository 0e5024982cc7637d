"""Corpora of text as memory-mapped tokens, split into train, valid and test."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from beartype import beartype

from palm_rlhf.data.corpora.documents import documents_of_files, find_files, is_plain, python_docs
from palm_rlhf.data.corpora.download import ENWIK8, Archive, cached, fetch
from palm_rlhf.data.corpora.token_store import (
    StoredText,
    TextTokenizer,
    TokenSplits,
    byte_tokens,
    file_stamp,
    json_digest,
    text_of_documents,
    text_of_file,
    tokens_of,
)
from palm_rlhf.data.tokenizer_base import NUM_BYTES
from palm_rlhf.ops.cpu.native_library import default_cache_dir


@beartype
@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on, to validate with and to test with.

    `train`, `valid` and `test` hold one array `n` for each part of a mixture, in its order. `test` is None unless every
    part has a test split. `train_bytes`, `valid_bytes` and `test_bytes` are the bytes of text that each array encodes,
    so that bits per byte do not depend on the tokenizer. The `weights` of the parts sum to 1. `note` says in words
    which data was taken and why.
    """

    name: str
    note: str
    vocab_size: int
    weights: tuple[float, ...]
    train: tuple[np.ndarray, ...]
    valid: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...] | None
    train_bytes: tuple[int, ...]
    valid_bytes: tuple[int, ...]
    test_bytes: tuple[int, ...] | None


@dataclass(frozen=True)
class _Part:
    """A text, the bytes at which its splits start and end, and a note for users."""

    name: str
    note: str
    text: StoredText
    bounds: tuple[int, ...]


@beartype
def load_corpus(
    data: str | Sequence[str] = "auto",
    *,
    tokenizer: TextTokenizer | None = None,
    eos_token: int | None = None,
    text_key: str = "text",
    window: int = 2,
    cache_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    timeout: float = 10.0,
    enwik8: Archive = ENWIK8,
) -> Corpus:
    """Open text as tokens, memory-mapped; text that must be unpacked, joined or tokenized is written to the cache once.

    Without `tokenizer` the tokens are the bytes. The splits of enwik8 are its first 90, next 5 and last 5 million
    bytes. Every other text of n bytes holds out its last n // 20 for validation, and trains on the bytes before them.
    Splits are cut before they are tokenized, so that every tokenizer is measured on the same text (a cut inside a
    character moves to its end).

    Raises ValueError, FileNotFoundError or OSError if a part cannot be opened or is too short.

    Args:
        data: The parts of the mixture, each with an optional weight after a colon (`notes/:0.3`; else 1): `enwik8`;
            `python-docs`, the language reference inside this Python; `auto`, the first of these that can be had; or
            a file, a folder with everything below it, or a glob. Each line of a `.jsonl` file is a document, and
            each row of parquet, or of CSV that has a column `text_key`; every other file is one document. `.gz` is
            unpacked.
        tokenizer: Encodes the text; see `TextTokenizer`.
        eos_token: Follows each document; without one an empty line joins documents.
        text_key: The key, or the column, of the text of a document.
        window: The fewest tokens that a part must have to train on.
        cache_dir: The cache; else `PALM_RLHF_CACHE`, else `~/.cache/palm_rlhf`.
        download: Whether the network may be used.
        timeout: The seconds to wait for the network.
        enwik8: Where that corpus comes from.
    """
    _check(tokenizer, eos_token, window)
    specs = [split_weight(spec) for spec in ([data] if isinstance(data, str) else data)]
    if not specs:
        raise ValueError("got no data, expected at least one corpus, file, folder or glob: name one, or 'auto'")
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    parts = [_open_part(name, text_key, cache, download, timeout, enwik8) for name, _ in specs]
    tokens = [_tokens(part, tokenizer, eos_token, window, cache) for part in parts]
    total = math.fsum(weight for _, weight in specs)
    weights = tuple(weight / total for _, weight in specs)
    names = [part.name for part in parts]
    if len(parts) > 1:
        names = [f"{name}:{weight:.3g}" for name, weight in zip(names, weights)]
    # zip ends with the shortest: there is a test split only if every part has one.
    train, valid, *test = zip(*(part.splits for part in tokens))
    train_bytes, valid_bytes, *test_bytes = zip(*(part.num_bytes for part in tokens))
    return Corpus(
        name=" + ".join(names),
        note="; ".join(part.note for part in parts),
        vocab_size=NUM_BYTES if tokenizer is None else int(tokenizer.vocab_size),
        weights=weights,
        train=train,
        valid=valid,
        test=test[0] if test else None,
        train_bytes=train_bytes,
        valid_bytes=valid_bytes,
        test_bytes=test_bytes[0] if test else None,
    )


@beartype
def split_weight(spec: str) -> tuple[str, float]:
    """Return the name and weight of a part: `notes/:0.3` is `notes/` and 0.3; without a weight it is 1."""
    name, weight = spec, 1.0
    head, colon, tail = spec.rpartition(":")
    if colon and not os.path.exists(os.path.expanduser(spec)):
        try:
            name, weight = head, float(tail)
        except ValueError:
            pass  # no number, so the colon belongs to the name
    if not name:
        raise ValueError(f"got {spec!r} as data, expected the name of a corpus, file, folder or glob before the weight")
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(
            f"got the weight {weight:g} in {spec!r}, expected a positive number: leave out the part, or its weight"
        )
    return name, weight


def _check(tokenizer: TextTokenizer | None, eos_token: int | None, window: int) -> None:
    if window < 2:
        raise ValueError(f"got window={window}, expected at least 2: a token and the one to predict from it")
    if tokenizer is None:
        if eos_token is not None:
            raise ValueError(
                f"got eos_token={eos_token} without a tokenizer, expected none, since every byte is text: leave it out"
            )
        return
    kind = type(tokenizer).__name__
    if tokenizer.vocab_size < 1:
        raise ValueError(f"got a {kind} with vocab_size {tokenizer.vocab_size}, expected at least 1")
    if eos_token is not None and not 0 <= eos_token < tokenizer.vocab_size:
        raise ValueError(f"got eos_token={eos_token}, expected 0 to below the vocab_size {tokenizer.vocab_size}")
    if len(extra := tokenizer.encode("")):
        raise ValueError(
            f"{kind}.encode('') returned {list(extra)}, expected no ids, since text is tokenized in pieces: turn its "
            "special tokens off (add_special_tokens=False), and mark documents with eos_token"
        )


def _open_part(name: str, text_key: str, cache: Path, download: bool, timeout: float, archive: Archive) -> _Part:
    if name == "enwik8":
        return _open_enwik8(cache, download, timeout, archive)
    if name == "python-docs":
        return _open_python_docs(cache)
    if name != "auto":
        return _open_files(name, text_key, cache)
    try:
        part = _open_enwik8(cache, download, timeout, archive)
        return replace(part, note=f"auto took {part.note}")
    except OSError as error:
        part = _open_python_docs(cache)
        return replace(part, note=f"auto took {part.note}; enwik8 could not be had: {error}")


def _open_enwik8(cache: Path, download: bool, timeout: float, archive: Archive) -> _Part:
    how, path = "found in", cached(archive, cache)
    if path is None and not download:
        raise FileNotFoundError(
            f"{cache} has no {archive.name}, expected it there, since download=False: allow the download, or put the "
            "unpacked file there"
        )
    if path is None:
        how, path = f"downloaded from {archive.url} to", fetch(archive, cache, timeout)
    sizes = " / ".join(f"{size:,}" for size in archive.splits)
    note = f"{archive.name}, {how} {cache}: {sizes} bytes to train, validate and test"
    return _Part(archive.name, note, text_of_file(path), tuple(accumulate(archive.splits, initial=0)))


def _open_python_docs(cache: Path) -> _Part:
    version = platform.python_version()
    documents = python_docs()
    content = [chunk for _, chunks in documents for chunk in chunks]
    text = text_of_documents(
        cache / "text" / f"python-docs-{version}",
        json_digest([chunk.decode() for chunk in content]),
        sum(map(len, content)),
        documents,
    )
    return _held_out("python-docs", f"python-docs (the language reference inside Python {version})", text)


def _open_files(spec: str, text_key: str, cache: Path) -> _Part:
    files = find_files(spec, cache)
    if len(files) == 1 and is_plain(files[0]):
        text = text_of_file(files[0])
    else:
        stamps = [file_stamp(file) for file in files]
        place = os.path.abspath(os.path.expanduser(spec))
        text = text_of_documents(
            cache / "text" / json_digest(place, text_key)[:32],
            json_digest(stamps),
            sum(size for _, size, _ in stamps),
            documents_of_files(files, text_key),
        )
    return _held_out(spec, f"{spec} ({len(files):,} file{'s' * (len(files) > 1)})", text)


def _held_out(name: str, what: str, text: StoredText) -> _Part:
    bounds = (0, text.size - text.size // 20, text.size)
    return _Part(name, f"{what}: {text.size:,} bytes, the last 5% held out", text, bounds)


def _tokens(
    part: _Part, tokenizer: TextTokenizer | None, eos_token: int | None, window: int, cache: Path
) -> TokenSplits:
    if tokenizer is None:
        tokens = byte_tokens(part.text, part.bounds)
    else:
        tokens = tokens_of(part.text, part.bounds, tokenizer, cache / "tokens", eos_token=eos_token)
    train, *held_out = (len(split) for split in tokens.splits)
    if train < window or min(held_out) < 2:
        raise ValueError(
            f"{part.name} is too short: got {train:,} tokens to train on and {min(held_out):,} held out, expected at "
            f"least {window:,} (one training window) and 2: add text, or train on shorter windows"
        )
    return tokens
