"""A corpus is the text it names: every byte of it once, the held-out part apart."""

import codecs
import gzip
import json
import os
import re
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from beartype.roar import BeartypeException
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.files.records import write_records
from palm_rlhf.data.text import load_corpus, split_weight


def whole(corpus, part=0):
    return corpus.train[part].tobytes() + corpus.valid[part].tobytes()


@pytest.fixture
def load(tmp_path):
    """``load_corpus`` with a cache of its own and no network."""
    return lambda data, **options: load_corpus(data, cache_dir=tmp_path / "cache", download=False, **options)


def test_the_last_twentieth_of_enwik6_is_held_out(load, shared_data):
    file = shared_data("enwik6")
    corpus, content = load(str(file)), file.read_bytes()
    assert corpus.train[0].tobytes() == content[:950_000]
    assert corpus.valid[0].tobytes() == content[950_000:]
    assert (corpus.train_bytes, corpus.valid_bytes) == ((950_000,), (50_000,))
    assert (corpus.vocab_size, corpus.weights, corpus.test, corpus.test_bytes) == (256, (1.0,), None, None)
    assert "1 file" in corpus.note and "1,000,000 bytes" in corpus.note and "5%" in corpus.note


MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@settings(deadline=None, max_examples=50)
@given(content=st.binary(min_size=40, max_size=3000).filter(lambda content: not content.startswith(MARKS)))
def test_any_bytes_are_text_and_the_split_is_exact(content):
    with TemporaryDirectory() as folder:
        Path(folder, "a").write_bytes(content)
        corpus = load_corpus(f"{folder}/a", cache_dir=f"{folder}/cache")
        assert whole(corpus) == content
        assert len(corpus.train[0]) == len(content) - len(content) // 20


def test_a_file_is_mapped_as_it_is(load, tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 4)
    corpus = load(str(tmp_path / "a.txt"))
    for array in (*corpus.train, *corpus.valid):
        assert isinstance(array, np.memmap) and array.dtype == np.uint8 and array.ndim == 1
        assert os.path.samefile(array.filename, tmp_path / "a.txt")
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert not (tmp_path / "cache").exists()


def fill(folder):
    """Files in an order that is not that of their names, and hidden ones that are no data."""
    contents = {"b.txt": "bb" * 20, "a/z.md": "zz" * 20, "a/b/c": "cc" * 20, "c.txt": "dd" * 20, "empty": ""}
    hidden = {".git/config": "secret" * 20, ".DS_Store": "secret" * 20, "a/.swp": "secret" * 20}
    for name, text in {**contents, **hidden}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_a_folder_is_all_files_below_it_in_order(load, tmp_path):
    fill(tmp_path / "notes")
    joined = b"\n\n".join([b"cc" * 20, b"zz" * 20, b"bb" * 20, b"dd" * 20])
    assert whole(load(f"{tmp_path}/notes")) == whole(load(f"{tmp_path}/notes/")) == joined


@pytest.mark.parametrize("cache", ["cache", "a/cache", "."])
def test_a_cache_in_the_folder_is_no_data(tmp_path, cache):
    fill(tmp_path)
    first, again = (load_corpus(str(tmp_path), cache_dir=tmp_path / cache) for _ in range(2))
    assert whole(first) == whole(again)
    assert whole(first).count(b"cc" * 20) == 1


def test_a_glob_is_the_files_it_matches(load, tmp_path):
    fill(tmp_path)
    assert whole(load(f"{tmp_path}/*.txt")) == b"bb" * 20 + b"\n\n" + b"dd" * 20
    assert whole(load(f"{tmp_path}/**/[cz]*")) == b"\n\n".join([b"cc" * 20, b"zz" * 20, b"dd" * 20])
    (tmp_path / "[draft].txt").write_text("brackets " * 10)  # a name that exists is no pattern
    assert whole(load(f"{tmp_path}/[draft].txt")) == b"brackets " * 10


DOCUMENTS = st.lists(st.text(max_size=60), min_size=3, max_size=6).filter(lambda texts: len("".join(texts)) > 40)


@settings(deadline=None, max_examples=50)
@given(texts=DOCUMENTS, packed=st.booleans(), ascii_only=st.booleans(), blank=st.booleans())
def test_jsonl_is_the_texts_of_its_lines(texts, packed, ascii_only, blank):
    lines = [json.dumps({"id": 1, "body": text}, ensure_ascii=ascii_only) + "\n" * (1 + blank) for text in texts]
    content = "".join(lines).encode()
    with TemporaryDirectory() as folder:
        file = Path(folder, "a.jsonl.gz" if packed else "a.jsonl")
        file.write_bytes(gzip.compress(content) if packed else content)
        corpus = load_corpus(str(file), text_key="body", cache_dir=f"{folder}/cache")
        assert whole(corpus).decode() == "\n\n".join(filter(None, texts))


def test_another_text_key_is_another_text(load, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 60, "title": "b" * 60}))
    for key, letter in [("text", b"a"), ("title", b"b"), ("text", b"a")]:
        assert whole(load(f"{tmp_path}/a.jsonl", text_key=key)) == letter * 60


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.parquet"])
def test_a_table_is_the_texts_of_its_rows(load, tmp_path, name):
    texts = ["one, two\n" * 20, '"three"' * 20, "", "4"]
    write_records(tmp_path / name, [{"id": place, "body": text} for place, text in enumerate(texts)])
    expected = "\n\n".join(filter(None, texts)).encode()
    assert whole(load(f"{tmp_path}/{name}", text_key="body")) == expected
    if name.endswith("parquet"):
        with pytest.raises(ValueError, match=rf"{name}, row 1: got only the keys \['body', 'id'\].*another text_key"):
            load(f"{tmp_path}/{name}")
    elif not name.endswith("gz"):  # without that column it is text like any other
        assert whole(load(f"{tmp_path}/{name}")) == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut sho', "Invalid control character|Unterminated string"),
        (b"plain text", "Expecting value"),
        (b'["text"]', "got a list, expected an object"),
        (b'{"body": "x", "a": 1}', r"got only the keys \['a', 'body'\]"),
        (b'{"text": 3}', "got a int, expected a string"),
        (b'{"text": "\xff"}', "can't decode byte 0xff"),
        (b'{"text": "\\ud800"}', "surrogates not allowed"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_broken_line_is_named(load, tmp_path, name, line, message):
    content = b'{"text": "sound"}\n\n' + line + b'\n{"text": "sound"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))}, line 3: .*({message}).*mend or delete"):
        load(str(tmp_path / name))
    assert {file.suffix for file in (tmp_path / "cache" / "text").iterdir()} == {".lock"}


PACKED = gzip.compress("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(200)).encode())


@settings(deadline=None, max_examples=50)
@given(length=st.integers(1, len(PACKED) - 1), name=st.sampled_from(["a.jsonl.gz", "a.txt.gz"]))
def test_a_gzip_file_cut_anywhere_is_refused(length, name):
    with TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(PACKED[:length])
        with pytest.raises(ValueError, match=r"is not a whole gzip file.*copy or compress it again"):
            load_corpus(str(file), cache_dir=f"{folder}/cache")
        file.write_bytes(PACKED)
        assert len(whole(load_corpus(str(file), cache_dir=f"{folder}/cache"))) > 1000


def test_a_mixture_keeps_its_parts_apart(load, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt").write_text("b" * 200)
    corpus = load([f"{tmp_path}/a.txt:3", f"{tmp_path}/b.txt:0.5", "python-docs:.5"])
    assert corpus.weights == (0.75, 0.125, 0.125)
    assert [whole(corpus, part)[:100] for part in (0, 1)] == [b"a" * 100, b"b" * 100]
    assert corpus.train_bytes[:2] == (95, 190) and corpus.valid_bytes[:2] == (5, 10)
    assert len(corpus.train) == len(corpus.valid) == 3 and corpus.test is None
    assert corpus.name == f"{tmp_path}/a.txt:0.75 + {tmp_path}/b.txt:0.125 + python-docs:0.125"
    assert all(name in corpus.note for name in ("a.txt", "b.txt", "python-docs"))
    assert load([f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"]).weights == (0.5, 0.5)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("enwik8", ("enwik8", 1.0)),
        ("enwik8:0.7", ("enwik8", 0.7)),
        ("notes/:3", ("notes/", 3.0)),
        ("a b.txt:1e-3", ("a b.txt", 0.001)),
        ("http://x:y", ("http://x:y", 1.0)),
        ("notes:", ("notes:", 1.0)),
        ("a:2:3", ("a:2", 3.0)),
    ],
)
def test_the_weight_is_the_number_after_the_last_colon(spec, parts):
    assert split_weight(spec) == parts


def test_a_path_that_exists_is_not_cut_at_its_colon(load, tmp_path):
    (tmp_path / "at 10:30").write_text("half past ten" * 10)
    assert split_weight(f"{tmp_path}/at 10:30") == (f"{tmp_path}/at 10:30", 1.0)
    assert split_weight(f"{tmp_path}/at 10:30:2") == (f"{tmp_path}/at 10:30", 2.0)
    assert whole(load(f"{tmp_path}/at 10:30:2")) == b"half past ten" * 10


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "-0.0"])
def test_weights_are_positive(weight):
    with pytest.raises(ValueError, match=r"weight .*expected a positive number"):
        split_weight(f"enwik8:{weight}")


@pytest.mark.parametrize("data", ["", ":0.5", []])
def test_no_name_is_no_data(load, data):
    with pytest.raises(ValueError, match="expected"):
        load(data)


def test_the_python_docs_are_the_topics_in_order(load):
    corpus = load("python-docs")
    assert whole(corpus).decode() == "\n\n".join(topics[name] for name in sorted(topics))
    assert corpus.name == "python-docs" and "language reference" in corpus.note


def test_every_tokenizer_is_measured_on_the_same_text(load, tmp_path):
    class Characters:
        vocab_size = 0x110000

        def encode(self, text):
            return list(map(ord, text))

    (tmp_path / "a.txt").write_text("aé€😀 " * 301)
    raw, characters = load(f"{tmp_path}/a.txt"), load(f"{tmp_path}/a.txt", tokenizer=Characters())
    held_out = "".join(map(chr, characters.valid[0])).encode()
    assert characters.valid_bytes == (len(held_out),)
    assert raw.valid[0].tobytes().endswith(held_out) and raw.valid_bytes[0] - len(held_out) <= 3
    assert characters.train_bytes[0] + characters.valid_bytes[0] == len(whole(raw))


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PALM_RLHF_CACHE", str(tmp_path / "here"))
    load_corpus("python-docs")
    assert (tmp_path / "here" / "text").is_dir()
    monkeypatch.delenv("PALM_RLHF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_corpus("python-docs")
    assert (tmp_path / "home" / ".cache" / "palm_rlhf" / "text").is_dir()


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"the cache cannot be written.*PALM_RLHF_CACHE"):
        load_corpus("python-docs", cache_dir=tmp_path / "file" / "cache")


@pytest.mark.parametrize("spec", ["missing.txt", "missing/", "*.missing", "notes:heavy", "enwik9"])
def test_what_is_missing_is_named(load, tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{spec!r}: no file, folder or glob matches {tmp_path}/")):
        load(spec)


def test_an_empty_folder_is_named(load, tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileNotFoundError, match="the folder has no files"):
        load(f"{tmp_path}/notes")


def test_a_pipe_is_no_file(load, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.txt").write_text("text" * 20)
    with pytest.raises(ValueError, match="expected a regular file"):
        load(f"{tmp_path}/pipe")
    assert whole(load(str(tmp_path))) == b"text" * 20


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_an_empty_corpus_is_refused(load, tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    with pytest.raises(ValueError, match=r"too short: got 0 tokens to train on"):
        load(f"{tmp_path}/{name}")


def test_a_corpus_shorter_than_a_window_is_refused(load, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 1000)
    assert len(load(f"{tmp_path}/a.txt", window=950).train[0]) == 950
    with pytest.raises(ValueError, match=r"a.txt is too short: got 950 tokens .*at least 951"):
        load(["python-docs", f"{tmp_path}/a.txt"], window=951)
    (tmp_path / "a.txt").write_bytes(b"a" * 39)
    with pytest.raises(ValueError, match=r"got 38 tokens to train on and 1 held out"):
        load(f"{tmp_path}/a.txt")


class Tokenizer:
    vocab_size = 300

    def __init__(self, special=()):
        self.special = list(special)

    def encode(self, text):
        return [*self.special, *text.encode()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token": 0}, "without a tokenizer"),
        ({"eos_token": 300, "tokenizer": Tokenizer()}, "expected 0 to below the vocab_size 300"),
        ({"eos_token": -1, "tokenizer": Tokenizer()}, "expected 0 to below the vocab_size 300"),
        ({"tokenizer": Tokenizer([256])}, r"returned \[256\], expected no ids.*add_special_tokens=False"),
        ({"window": 1}, "expected at least 2"),
    ],
)
def test_options_that_cannot_be_are_refused(load, options, message):
    with pytest.raises(ValueError, match=message):
        load("python-docs", **options)


def test_what_is_no_tokenizer_is_refused(load):
    with pytest.raises(BeartypeException):
        load("python-docs", tokenizer=object())
