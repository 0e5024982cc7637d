"""A store outlives killed and concurrent processes and full disks, and takes no more memory for more text."""

import re
from pathlib import Path

import pytest


def stores(folder):
    return sorted(folder.glob("*/*/meta.json"))


LOAD = """
import os, resource, sys, time
from palm_rlhf.data.text import load_corpus

class Tokenizer:
    vocab_size = 0x110000
    fingerprint = "characters"
    def encode(self, text):
        if text:
            os.write(log, f"{len(text)} ".encode())
        if hang and text:
            print("hangs", flush=True)
            time.sleep(600)
        return [ord(character) for character in text]

source, cache, hang, limit = sys.argv[1], sys.argv[2], sys.argv[3] == "hang", int(sys.argv[4])
log = os.open(f"{cache}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
tokenizer = None if sys.argv[3] == "bytes" else Tokenizer()
try:
    corpus = load_corpus(source, tokenizer=tokenizer, cache_dir=cache)
except OSError as error:
    sys.exit(f"{type(error).__name__} {error}")
print(len(corpus.train[0]))
"""


def test_what_a_killed_process_left_is_no_store(tmp_path, python):
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("some text" * 100)
    process = python(LOAD, file, cache, "hang", 0)
    assert process.stdout.readline() == "hangs\n"
    process.kill()
    process.wait()
    assert list(cache.glob("tokens/*.tmp")) and not stores(cache)
    process = python(LOAD, file, cache, "go", 0)
    assert process.communicate()[0] == "855\n"
    assert not list(cache.glob("tokens/*.tmp")) and len(stores(cache)) == 1


def test_of_several_processes_one_tokenizes(tmp_path, python):
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("some text" * 100)
    processes = [python(LOAD, file, cache, "go", 0) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["855\n"] * 3
    assert Path(f"{cache}.log").read_text() == "855 45 "


@pytest.mark.parametrize(
    ("source", "tokens", "needed"), [("a.txt", "go", 4 * 90_000), (".", "bytes", 90_000)], ids=["tokens", "text"]
)
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, python, source, tokens, needed):
    folder, cache = tmp_path / "notes", tmp_path / "cache"
    folder.mkdir()
    (folder / "a.txt").write_text("some text" * 10_000)
    (folder / "b.txt").write_text("")
    process = python(LOAD, folder / source, cache, tokens, 50_000)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "OSError" in errors and "the disk is full" in errors and str(cache) in errors
    assert re.search(rf"[\d,]+ bytes are free and about {needed:,} are needed", errors)
    assert {file.suffix for file in cache.glob("*/*")} == {".lock"}
    process = python(LOAD, folder / source, cache, tokens, 0)
    assert process.communicate()[0] == "85500\n"


MEMORY = r"""
import re, sys
from palm_rlhf.data.text import load_corpus

class Lengths:
    vocab_size = 2**32
    fingerprint = "lengths"
    def encode(self, text):
        return [len(text), 0] if text else []

for data in sys.argv[2:]:
    for tokenizer in (None, Lengths()):
        corpus = load_corpus(data, tokenizer=tokenizer, cache_dir=sys.argv[1])
# getrusage would count what the parent had in memory before it became this process.
print(sum(corpus.train_bytes), re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read()).group(1))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_text(tmp_path, python):
    peaks = []
    for size in (8 << 20, 300 << 20):
        folder = tmp_path / str(size)
        folder.mkdir()
        with open(folder / "sparse.txt", "wb") as file:
            file.truncate(size)
        (folder / "empty").touch()
        process = python(MEMORY, tmp_path / f"cache of {size}", folder / "sparse.txt", folder)
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        num_bytes, peak = map(int, out.split())
        assert num_bytes == size - size // 20
        peaks.append(peak * 1024)
    assert peaks[1] - peaks[0] < 32 << 20
