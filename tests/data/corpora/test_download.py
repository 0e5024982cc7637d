"""A corpus from the web is the expected one to the byte, or is not there; what was received is not fetched again."""

import hashlib
import io
import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palm_rlhf.data.corpora.download import ENWIK8, Archive, DownloadError, fetch
from palm_rlhf.data.text import load_corpus

TEXT = random.Random(0).randbytes(300_000)
SPLITS = (270_000, 15_000, 15_000)


def zipped(content=TEXT, name="enwik8"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


ZIP = zipped()


def archive_at(url):
    return Archive(name="enwik8", url=url, sha256=hashlib.sha256(TEXT).hexdigest(), splits=SPLITS)


@pytest.fixture
def server(serve):
    return serve(ZIP)


@pytest.fixture
def archive(server):
    return archive_at(server.url)


def names(folder):
    return sorted(file.name for file in folder.iterdir() if file.suffix != ".lock")


def test_enwik8_is_the_one_of_the_hutter_prize():
    assert (ENWIK8.num_bytes, ENWIK8.splits[0], ENWIK8.splits[1]) == (100_000_000, 90_000_000, 5_000_000)
    assert ENWIK8.sha256 == "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"


def test_downloads_once_with_a_progress_bar(server, archive, tmp_path, capsys):
    path = fetch(archive, tmp_path)
    assert path.read_bytes() == TEXT
    assert "downloading enwik8" in capsys.readouterr().err
    assert fetch(archive, tmp_path) == path
    assert server.ranges == [None]
    assert names(tmp_path) == ["enwik8"]


def test_a_broken_transfer_goes_on_where_it_stopped(server, archive, tmp_path):
    server.plans = [{"cut": 100_000}, {"cut": 50_000}]
    assert fetch(archive, tmp_path).read_bytes() == TEXT
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_what_a_failed_call_received_is_kept_for_the_next(server, archive, tmp_path):
    server.plans = [{"cut": 100_000}, {"status": 503}]
    with pytest.raises(DownloadError, match=r"503.*100,000 bytes are kept"):
        fetch(archive, tmp_path)
    assert names(tmp_path) == ["enwik8.zip.part"]
    assert fetch(archive, tmp_path).read_bytes() == TEXT
    assert server.ranges == [None, "bytes=100000-", "bytes=100000-"]
    assert names(tmp_path) == ["enwik8"]


def test_a_server_without_ranges_starts_over(server, archive, tmp_path):
    server.plans = [{"cut": 100_000}, {"ranges": False}]
    assert fetch(archive, tmp_path).read_bytes() == TEXT
    assert len(server.ranges) == 2


def test_a_file_longer_than_the_servers_is_fetched_anew(server, archive, tmp_path):
    (tmp_path / "enwik8.zip.part").write_bytes(bytes(len(ZIP) + 5))
    assert fetch(archive, tmp_path).read_bytes() == TEXT
    assert server.ranges == [f"bytes={len(ZIP) + 5}-", None]


def test_a_zip_received_whole_needs_no_server(server, archive, tmp_path):
    (tmp_path / "enwik8.zip.part").write_bytes(ZIP)
    assert fetch(archive, tmp_path).read_bytes() == TEXT
    assert server.ranges == []


PLANS = st.fixed_dictionaries(
    {},
    optional={
        "cut": st.integers(0, len(ZIP)),
        "ranges": st.booleans(),
        "rewind": st.integers(0, len(ZIP)),
        "length": st.booleans(),
        "status": st.sampled_from([403, 404, 500]),
    },
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans=st.lists(PLANS, max_size=5))
def test_however_it_breaks_the_file_is_exact_or_absent(server, plans):
    with TemporaryDirectory() as name:
        folder, archive = Path(name), archive_at(server.url)
        server.plans = list(plans)
        for _ in range(len(plans) + 1):
            try:
                path = fetch(archive, folder)
                break
            except DownloadError:
                assert not (folder / "enwik8").exists()
        assert path.read_bytes() == TEXT
        assert names(folder) == ["enwik8"]


FETCH = """
import json, sys
from pathlib import Path
from palm_rlhf.data.corpora.download import Archive, fetch
fields = json.loads(sys.argv[1])
archive = Archive(**{**fields, "splits": tuple(fields["splits"])})
if len(sys.argv) > 3:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    fetch(archive, Path(sys.argv[2]))
except OSError as error:
    sys.exit(str(error))
"""


def test_a_killed_download_is_resumed(server, archive, tmp_path, python):
    server.plans = [{"stall": 200_000}]
    folder = tmp_path / "cache"
    process = python(FETCH, json.dumps(vars(archive)), folder)
    assert server.sent.wait(900)
    part = folder / "enwik8.zip.part"
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None, process.stderr.read()
    process.kill()
    process.wait()
    received = part.stat().st_size
    assert fetch(archive, folder).read_bytes() == TEXT
    assert server.ranges == [None, f"bytes={received}-"]


def test_of_several_processes_one_downloads(server, archive, tmp_path, python):
    processes = [python(FETCH, json.dumps(vars(archive)), tmp_path / "cache") for _ in range(3)]
    for process in processes:
        assert process.wait() == 0, process.stderr.read()
    assert server.ranges == [None]
    assert (tmp_path / "cache" / "enwik8").read_bytes() == TEXT


@pytest.mark.parametrize(("limit", "kept"), [(100_000, 100_000), (len(ZIP) - 1, len(ZIP) - 1)])
def test_a_full_disk_keeps_what_was_received(server, archive, tmp_path, python, limit, kept):
    process = python(FETCH, json.dumps(vars(archive)), tmp_path / "cache", limit)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "the disk is full" in errors and str(tmp_path / "cache") in errors and "bytes are free" in errors
    assert (tmp_path / "cache" / "enwik8.zip.part").read_bytes() == ZIP[:kept]
    assert fetch(archive, tmp_path / "cache").read_bytes() == TEXT


def test_a_disk_too_full_to_unpack_keeps_the_zip(serve, tmp_path, python):
    text = b"a" * 300_000
    server = serve(zipped(text))
    archive = replace(archive_at(server.url), sha256=hashlib.sha256(text).hexdigest())
    process = python(FETCH, json.dumps(vars(archive)), tmp_path / "cache", 100_000)
    _, errors = process.communicate()
    assert process.returncode == 1 and "about 300,000 are needed" in errors
    assert names(tmp_path / "cache") == ["enwik8.zip.part"]
    assert fetch(archive, tmp_path / "cache").read_bytes() == text
    assert len(server.ranges) == 1


def flipped(body):
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


BAD = {
    "other content": zipped(TEXT[:-1] + b"?"),
    "too short": zipped(TEXT[:-1]),
    "too long": zipped(TEXT + b"?"),
    "far too long": zipped(TEXT + bytes(50_000_000)),
    "one bit flipped": flipped(ZIP),
    "another name": zipped(name="enwik9"),
    "no zip": b"<html>Sign in to this network</html>" * 100,
    "empty": b"",
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_bytes_that_are_not_the_expected_ones_are_not_kept(serve, tmp_path, body):
    server = serve(body)
    archive = archive_at(server.url)
    with pytest.raises(DownloadError, match=r"enwik8.*try again"):
        fetch(archive, tmp_path)
    assert names(tmp_path) == []
    server.body = ZIP
    assert fetch(archive, tmp_path).read_bytes() == TEXT


def test_no_more_than_was_expected_is_unpacked(serve, tmp_path, python):
    archive = archive_at(serve(BAD["far too long"]).url)
    process = python(FETCH, json.dumps(vars(archive)), tmp_path / "cache", 1_000_000)
    _, errors = process.communicate()
    assert process.returncode == 1 and "has sha256" in errors


def test_a_wrong_hash_says_which(serve, tmp_path):
    text = bytes(300_000)
    archive = archive_at(serve(zipped(text)).url)
    with pytest.raises(DownloadError, match=f"{hashlib.sha256(text).hexdigest()}, expected {archive.sha256}"):
        fetch(archive, tmp_path)


def test_a_server_that_falls_silent_is_given_up(server, archive, tmp_path):
    server.plans = [{"stall": 1000}, {"silent": True}]
    with pytest.raises(DownloadError, match=r"timed out|no answer within 0.3 seconds"):
        fetch(archive, tmp_path, timeout=0.3)
    assert (tmp_path / "enwik8.zip.part").read_bytes() == ZIP[:1000]
    assert server.ranges == [None, "bytes=1000-"]


def test_a_file_of_that_name_and_another_size_is_refused(archive, tmp_path, server):
    (tmp_path / "enwik8").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="has 4 bytes, expected 300,000"):
        fetch(archive, tmp_path)
    assert (tmp_path / "enwik8").read_bytes() == b"mine"
    assert server.ranges == []


def test_the_splits_are_those_of_the_archive(archive, tmp_path):
    corpus = load_corpus("enwik8", cache_dir=tmp_path, enwik8=archive)
    assert (corpus.name, corpus.vocab_size, corpus.weights) == ("enwik8", 256, (1.0,))
    assert corpus.train[0].tobytes() == TEXT[:270_000]
    assert corpus.valid[0].tobytes() == TEXT[270_000:285_000]
    assert corpus.test[0].tobytes() == TEXT[285_000:]
    assert (corpus.train_bytes, corpus.valid_bytes, corpus.test_bytes) == ((270_000,), (15_000,), (15_000,))


def test_auto_downloads_enwik8_then_finds_it(server, archive, tmp_path):
    first = load_corpus(cache_dir=tmp_path, enwik8=archive)
    again = load_corpus("auto", cache_dir=tmp_path, enwik8=archive, download=False)
    assert first.name == again.name == "enwik8"
    assert first.note.startswith(f"auto took enwik8, downloaded from {server.url}")
    assert again.note.startswith("auto took enwik8, found in")
    assert len(server.ranges) == 1


def test_auto_says_why_it_took_the_python_docs(server, archive, tmp_path):
    server.plans = [{"status": 404}]
    corpus = load_corpus(cache_dir=tmp_path, enwik8=archive)
    assert corpus.name == "python-docs"
    assert corpus.note.startswith("auto took python-docs") and "404" in corpus.note
    corpus = load_corpus(cache_dir=tmp_path, enwik8=archive, download=False)
    assert corpus.name == "python-docs" and "download=False" in corpus.note
    assert len(server.ranges) == 1


def test_enwik8_by_name_never_becomes_another_corpus(server, archive, tmp_path):
    with pytest.raises(FileNotFoundError, match="download=False"):
        load_corpus("enwik8", cache_dir=tmp_path, enwik8=archive, download=False)
    server.plans = [{"status": 404}]
    with pytest.raises(DownloadError, match="404"):
        load_corpus("enwik8", cache_dir=tmp_path, enwik8=archive)
