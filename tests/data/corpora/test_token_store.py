"""Tokens on disk say what the text says, are written once, and are whole or absent."""

import gzip
import json
import os
import re
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.corpora.token_store import text_of_file, text_pieces, tokens_of
from palm_rlhf.data.text import load_corpus

REFERENCE = "\n\n".join(text for _, text in sorted(topics.items()))


class Characters:
    """One token for each character, its code point."""

    vocab_size = 0x110000

    def encode(self, text):
        return [ord(character) for character in text]

    @staticmethod
    def decode(ids):
        return "".join(map(chr, ids))


class Counted(Characters):
    """Remembers what it was asked to encode."""

    def __init__(self, fingerprint, shift=0):
        self.fingerprint, self.shift, self.texts = fingerprint, shift, []

    def encode(self, text):
        self.texts.append(text)
        return [ord(character) + self.shift for character in text]


class ByteBPE:
    """The byte-level BPE of GPT-2, trained on the text given."""

    def __init__(self, text, vocab_size):
        self.bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        self.bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        self.bpe.train_from_iterator([text], trainer)
        self.vocab_size = self.bpe.get_vocab_size()

    def encode(self, text):
        return self.bpe.encode(text).ids


def cut_at(text, size, cuts):
    """The pieces ``cuts`` makes of a text's bytes."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "text")
        file.write_bytes(text)
        with open(file, "rb", buffering=0) as source:
            return list(cuts(source, 0, len(text), size))


def anywhere(source, start, end, size):
    """What ``text_pieces`` must not do: cut where the bytes are full."""
    for offset in range(start, end, size):
        source.seek(offset)
        yield offset, source.read(min(size, end - offset))


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("a. \n\r\té€😀"), max_size=200), size=st.integers(4, 60))
def test_pieces_join_to_the_text_and_never_cut_a_character(text, size):
    parts = cut_at(text.encode(), size, text_pieces)
    assert "".join(raw.decode() for _, raw in parts) == text
    assert [offset for offset, _ in parts] == [sum(len(raw) for _, raw in parts[:i]) for i in range(len(parts))]
    assert all(0 < len(raw) <= 2 * size + 4 for _, raw in parts)


def test_pieces_of_bytes_that_are_no_text_still_join():
    for text in (bytes(1000), b"\x80" * 1000, b"\n" * 1000, b" " * 1000, "é".encode() * 500):
        parts = cut_at(text, 64, text_pieces)
        assert b"".join(raw for _, raw in parts) == text
        assert max(len(raw) for _, raw in parts) <= 2 * 64 + 4


@pytest.mark.parametrize("text", [REFERENCE, REFERENCE.replace(" ", "")], ids=["prose", "no spaces"])
def test_words_are_the_same_in_pieces_as_in_the_whole(text):
    tokenizer = ByteBPE(text[:100_000], 1000)
    whole = tokenizer.encode(text)

    def in_pieces(cuts):
        parts = cut_at(text.encode(), 2000, cuts)
        return [token for _, raw in parts for token in tokenizer.encode(raw.decode(errors="replace"))]

    assert in_pieces(text_pieces) == whole
    assert in_pieces(anywhere) != whole


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (250_000, np.uint32)],
)
def test_tokens_take_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    tokenizer = Counted(str(vocab_size))
    tokenizer.vocab_size, tokenizer.encode = vocab_size, lambda text: [vocab_size - 1, 0] * len(text)
    (tmp_path / "a.txt").write_text("some text" * 10)
    corpus = load_corpus(str(tmp_path / "a.txt"), tokenizer=tokenizer, cache_dir=tmp_path / "cache")
    assert corpus.vocab_size == vocab_size
    assert corpus.train[0].dtype == dtype
    assert corpus.train[0].tolist() == [vocab_size - 1, 0] * (90 - 90 // 20)


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.text(st.sampled_from("ab \né😀"), min_size=1, max_size=60), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 300), max_size=2),
    piece=st.integers(4, 40),
    eos=st.sampled_from([None, 0, 7]),
)
def test_the_splits_are_the_text_and_every_document_ends_with_eos(documents, cuts, piece, eos):
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        load = {"tokenizer": Characters(), "eos_token": eos, "cache_dir": folder}
        try:
            corpus = load_corpus(str(folder / "a.jsonl"), **load)
        except ValueError:
            assert len("\n\n".join(documents).encode()) // 20 < 2 * 4 + 3  # may hold out fewer than two characters
        else:
            assert joined(corpus.train + corpus.valid) == expected(documents, eos)
        (text_file,) = folder.glob("text/*/text")
        joined_text = text_file.read_bytes()
        assert joined_text.decode() == "\n\n".join(documents)
        bounds = sorted(min(cut, len(joined_text)) for cut in (0, *cuts, len(joined_text)))
        tokens = tokens_of(text_of_file(text_file), bounds, Characters(), folder / "b", piece=piece)
        assert joined(tokens.splits) == "\n\n".join(documents)
        for split, size, (start, end) in zip(tokens.splits, tokens.num_bytes, pairwise(bounds)):
            assert size == len(Characters.decode(split).encode())
            assert abs(size - (end - start)) <= 3


def joined(splits):
    return "".join(Characters.decode(split) for split in splits)


def expected(documents, eos):
    return "\n\n".join(documents) if eos is None else "".join(text + chr(eos) for text in documents)


def test_eos_and_separators_are_no_bytes_of_text(tmp_path):
    documents = ["é" * 20, "b" * 300, "c" * 61]
    for index, text in enumerate(documents):
        (tmp_path / f"{index}.txt").write_text(text)
    corpus = load_corpus(f"{tmp_path}/*.txt", tokenizer=Characters(), eos_token=3, cache_dir=tmp_path / "cache")
    total = 40 + 2 + 300 + 2 + 61
    assert corpus.valid_bytes == (total // 20,) == (20,)
    assert corpus.train_bytes == (40 + 300 + 61 - 20,)
    assert joined(corpus.train) == "é" * 20 + "\3" + "b" * 300 + "\3" + "c" * 41
    assert joined(corpus.valid) == "c" * 20 + "\3"


def test_only_documents_are_separated(tmp_path):
    long = "some text " * 300_000  # read in several chunks
    for name in "ab":
        (tmp_path / name).write_text(long)
    corpus = load_corpus(f"{tmp_path}/[ab]", cache_dir=tmp_path / "cache")
    assert corpus.train[0].tobytes() + corpus.valid[0].tobytes() == f"{long}\n\n{long}".encode()


def write(file, text, mtime):
    file.write_text(text)
    os.utime(file, ns=(mtime, mtime))


def stores(folder):
    return sorted(folder.glob("*/*/meta.json"))


def test_text_is_tokenized_once_until_it_changes(tmp_path):
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    write(file, "one text" * 10, 1)

    def train(tokenizer):
        return joined(load_corpus(str(file), tokenizer=tokenizer, cache_dir=cache).train)

    def asked(tokenizer):
        train(tokenizer)
        return any(tokenizer.texts)

    assert asked(Counted("a"))
    assert not asked(Counted("a"))
    for text, mtime in [("two text" * 10, 2), ("two text!" * 10, 2)]:
        write(file, text, mtime)
        assert asked(Counted("a"))
        assert train(Counted("a")) == text[: len(text) - len(text) // 20]
        assert len(stores(cache)) == 1  # in the place of the old one
    assert train(Counted("b", shift=1)) == "".join(chr(ord(character) + 1) for character in train(Counted("a")))
    assert not asked(Counted("a"))
    assert not asked(Counted("b", shift=1))


def test_a_folder_is_read_anew_when_a_file_of_it_changes(tmp_path):
    notes, cache = tmp_path / "notes", tmp_path / "cache"
    notes.mkdir()
    write(notes / "a.txt", "a" * 50, 1)
    write(notes / "b.txt", "b" * 50, 1)
    load = {"cache_dir": cache}
    (text,) = load_corpus(str(notes), **load).train
    assert text.tobytes().startswith(b"a" * 50 + b"\n\n" + b"b" * 40)
    write(notes / "a.txt", "c" * 50, 2)
    assert load_corpus(str(notes), **load).train[0].tobytes().startswith(b"c" * 50 + b"\n\n")
    (notes / "b.txt").unlink()
    write(notes / "0.txt", "0" * 50, 1)
    assert load_corpus(str(notes), **load).train[0].tobytes().startswith(b"0" * 50 + b"\n\n" + b"c" * 40)
    assert len(stores(cache)) == 1
    assert text.tobytes().startswith(b"a" * 50)  # who has mapped the old store keeps it


class Rare(Counted):
    """Differs from one of another shift in one rare character only."""

    def encode(self, text):
        return [ord(character) + self.shift * (character == "龘") for character in text]


@pytest.mark.parametrize("described", ["fingerprint", "to_str", "backend_tokenizer", "nothing"])
def test_tokenizers_are_told_apart(tmp_path, described):
    def tokenizer(shift):
        made = (Counted if described == "nothing" else Rare)(None, shift)
        if described == "fingerprint":
            made.fingerprint = str(shift)
        elif described == "to_str":
            made.to_str = lambda: f"shift {shift}"
        elif described == "backend_tokenizer":
            made.backend_tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": shift}, unk_token="a"))
        return made

    (tmp_path / "a.txt").write_text("some text" * 10_000 + "龘" * 10)

    def last(made):
        return load_corpus(str(tmp_path / "a.txt"), tokenizer=made, cache_dir=tmp_path / "cache").valid[0][-1]

    assert [last(tokenizer(shift)) for shift in (0, 1, 0, 1)] == [ord("龘"), ord("龘") + 1] * 2
    assert len(stores(tmp_path / "cache")) == 2


def test_a_damaged_store_is_written_anew(tmp_path):
    (tmp_path / "a.txt").write_text("some text" * 100)
    load = {"tokenizer": Characters(), "cache_dir": tmp_path / "cache"}
    text = joined(load_corpus(str(tmp_path / "a.txt"), **load).train)
    (meta,) = stores(tmp_path / "cache")
    for damage in (
        lambda: os.truncate(meta.parent / "0", 40),
        lambda: (meta.parent / "1").unlink(),
        lambda: meta.write_text("{"),
        lambda: meta.unlink(),
    ):
        damage()
        assert joined(load_corpus(str(tmp_path / "a.txt"), **load).train) == text


def test_a_tokenizer_that_fails_leaves_nothing(tmp_path):
    class Failing(Counted):
        def encode(self, text):
            if "x" in text:
                raise RuntimeError("no x")
            return super().encode(text)

    (tmp_path / "a.txt").write_text("text" * 10)
    with pytest.raises(RuntimeError, match="no x"):
        load_corpus(str(tmp_path / "a.txt"), tokenizer=Failing("f"), cache_dir=tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [([5, 300], "token id 300"), ([-1], "token id -1"), ([[1]], "expected a list"), ([0.5], "expected a list")],
)
def test_ids_that_are_none_are_refused(tmp_path, ids, message):
    tokenizer = Counted("t")
    tokenizer.vocab_size, tokenizer.encode = 300, lambda text: ids if text else []
    (tmp_path / "a.txt").write_text("text" * 10)
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path / "a.txt"), tokenizer=tokenizer, cache_dir=tmp_path / "cache")


def test_an_encoding_object_is_no_list_of_ids(tmp_path):
    bpe = ByteBPE("text", 300)
    tokenizer = Counted("t")
    tokenizer.vocab_size, tokenizer.encode = bpe.vocab_size, bpe.bpe.encode
    (tmp_path / "a.txt").write_text("text" * 10)
    with pytest.raises(ValueError, match="encode returned Encoding, expected a list of token ids"):
        load_corpus(str(tmp_path / "a.txt"), tokenizer=tokenizer, cache_dir=tmp_path / "cache")


@settings(deadline=None, max_examples=30)
@given(before=st.text("aé€\n ", max_size=50), after=st.text("aé€\n ", max_size=50), packed=st.booleans())
def test_what_is_not_utf8_is_named_with_its_file_and_byte(before, after, packed):
    with TemporaryDirectory() as name:
        folder = Path(name, "notes")
        folder.mkdir()
        (folder / "a.txt").write_text("sound text " * 20)
        content = before.encode() + b"\xff" + after.encode()
        bad = folder / ("b.txt.gz" if packed else "b.txt")
        bad.write_bytes(gzip.compress(content) if packed else content)
        (folder / "c.txt").write_text("sound text " * 20)
        place = re.escape(f"{bad}, byte {len(before.encode()):,}, is not UTF-8")
        with pytest.raises(ValueError, match=place):
            load_corpus(str(folder), tokenizer=Characters(), cache_dir=Path(name, "cache"))
        if not packed:
            with pytest.raises(ValueError, match=place):
                load_corpus(str(bad), tokenizer=Characters(), cache_dir=Path(name, "cache"))
        corpus = load_corpus(str(folder), cache_dir=Path(name, "cache"))
        assert content in corpus.train[0].tobytes() + corpus.valid[0].tobytes()
