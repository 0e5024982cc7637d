"""The journal: nothing is lost, torn lines are mended, and files of others stay as they are."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.evaluation.judging.journal import Journal

ENTRIES = [{"key": f"k{place}", "text": f"ü\n{place}"} for place in range(4)]


def written(path):
    with Journal(path) as journal:
        for entry in ENTRIES:
            journal.add(entry)
    return path.read_bytes()


def test_entries_come_back_in_order(tmp_path):
    written(tmp_path / "j.jsonl")
    with Journal(tmp_path / "j.jsonl") as journal:
        assert list(journal.entries.values()) == ENTRIES
        assert "k1" in journal and "k9" not in journal


@settings(max_examples=40)
@given(st.data())
def test_a_file_cut_anywhere_opens_with_all_whole_lines(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "j.jsonl"
    content = written(path)
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = content[: cut + 1].count(b"\n")  # a last line that lacks only its end is whole, too
    with Journal(path) as journal:
        assert list(journal.entries.values()) == ENTRIES[:whole]
        journal.add({"key": "new"})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [*(entry["key"] for entry in ENTRIES[:whole]), "new"]


def test_a_damaged_line_in_the_middle_costs_only_itself(tmp_path, caplog):
    path = tmp_path / "j.jsonl"
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"key": "k1", "te\n' + b"\0\0\0\n" + b"".join(lines[2:]))
    with Journal(path) as journal:
        assert list(journal.entries) == ["k0", "k2", "k3"]
    assert "line 2 is damaged and left out" in caplog.text and "line 3 is damaged and left out" in caplog.text


@pytest.mark.parametrize("content", ['{"question_id": 1}\n', "A text without an end", '{"a": 1}', '{"key": 5}\n'])
def test_files_of_others_are_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"name (a new|another) file"):
        Journal(path)
    assert path.read_text() == content


def test_threads_write_whole_lines(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:

        def add(thread):
            for place in range(25):
                journal.add({"key": f"{thread}-{place}", "text": "x" * 500})

        threads = [threading.Thread(target=add, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({json.loads(line)["key"] for line in (tmp_path / "j.jsonl").read_text().splitlines()}) == 100


def test_what_add_returned_from_survives_a_kill(tmp_path):
    code = """
import sys
from palm_rlhf.evaluation.judging.journal import Journal
with Journal(sys.argv[1]) as journal:
    for place in range(10**6):
        journal.add({"key": str(place)})
        print(place, flush=True)
"""
    path = tmp_path / "j.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        told = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.readlines()
    with Journal(path) as journal:  # its lock has gone with the process
        assert {line.strip() for line in told if line.endswith("\n")} <= journal.entries.keys()
