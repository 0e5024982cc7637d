"""Tables: CSV and parquet hold the same records as lines of JSON, and text in a cell stays the text that it is."""

import datetime
import decimal
import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from palm_rlhf.cli import main
from palm_rlhf.data.files.records import read_records, write_records
from palm_rlhf.data.formats.conversation_files import read_conversations
from palm_rlhf.data.preferences.ranking_files import read_rankings

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
TEXTS = TEXT.filter(lambda text: text.strip()[:1] not in ("[", "{"))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]), "content": TEXT}, optional={"weight": st.floats(0, 2)}
    ),
    min_size=1,
    max_size=3,
)
CONVERSATIONS = st.lists(
    st.fixed_dictionaries({"messages": MESSAGES}, optional={"id": TEXTS, "model": TEXTS}), max_size=5
)
RANKINGS = st.lists(
    st.fixed_dictionaries({"prompt": MESSAGES, "responses": st.lists(TEXT, min_size=2, max_size=3)}), max_size=4
)
PAIRS = st.lists(st.fixed_dictionaries({"prompt": MESSAGES, "chosen": TEXTS, "rejected": TEXTS}), max_size=4)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"instruction": TEXTS, "output": TEXTS, "history": st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=2)}
    ),
    max_size=4,
)


def records_of(path):
    """Without the columns that have no value in a row."""
    return [{name: v for name, v in record.items() if v is not None} for _, record in read_records(path)]


@settings(max_examples=60)
@given(
    rows=st.one_of(CONVERSATIONS, RANKINGS, PAIRS, ROWS),
    name=st.sampled_from(["a.csv", "a.tsv", "a.csv.gz", "a.parquet", "a.parquet.gz"]),
)
def test_what_is_written_as_a_table_is_read_back(rows, name):
    with TemporaryDirectory() as folder:
        path, again = Path(folder, name), Path(folder, "again." + name)
        assert write_records(path, rows) == len(rows)
        assert records_of(path) == rows
        assert (path.read_bytes()[:1] == b"\x1f") == name.endswith(".gz")
        write_records(again, records_of(path))
        assert again.read_bytes() == path.read_bytes()


def test_tables_of_many_rows_and_of_rows_with_other_keys(tmp_path):
    rows = [{"id": f"{i}", "messages": [{"role": "user", "content": "x" * i}]} for i in range(2500)]
    rows[2400]["condition"] = "GPT4"
    rows[2401]["messages"][0]["weight"] = 0.5
    for name in ("a.csv", "a.parquet"):
        write_records(tmp_path / name, iter(rows))
        assert records_of(tmp_path / name) == rows


CSV = (
    "\ufeffid,question,answer,notes\r\n"
    '007,"What is ""3"", or\r\n4?",3,\r\n'
    "8,Is it null?,null,\r\n"
    '9,"Give me [1, 2]","[1, 2]",\r\n'
)


def test_cells_of_csv_are_texts_though_they_look_like_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(CSV.encode())
    expected = [
        {"id": "007", "question": 'What is "3", or\r\n4?', "answer": "3", "notes": None},
        {"id": "8", "question": "Is it null?", "answer": "null", "notes": None},
        {"id": "9", "question": "Give me [1, 2]", "answer": "[1, 2]", "notes": None},
    ]
    assert list(read_records(path)) == list(zip([2, 4, 5], expected))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    assert list(read_records(tmp_path / "a.csv.gz")) == list(read_records(path))
    (tmp_path / "a.tsv").write_text("id\tanswer\n1\ta, b; c\n")
    assert list(read_records(tmp_path / "a.tsv")) == [(2, {"id": "1", "answer": "a, b; c"})]
    (tmp_path / "b.csv").write_text("id;answer\n1;a, b\n")  # as spreadsheets write it where a comma marks decimals
    assert list(read_records(tmp_path / "b.csv")) == [(2, {"id": "1", "answer": "a, b"})]


@pytest.mark.parametrize(
    ("column", "cell", "value"),
    [
        ("messages", '[{"role": "user", "content": "Hi"}]', [{"role": "user", "content": "Hi"}]),
        ("prompt", "[{'role': 'user', 'content': \"It's\"}]", [{"role": "user", "content": "It's"}]),
        ("chosen", '{"from": "gpt", "value": "Hi"}', {"from": "gpt", "value": "Hi"}),
        ("chosen", '{"answer": 3}', '{"answer": 3}'),
        ("output", "[1, 2]", "[1, 2]"),
        ("scores", "[1, 2.5]", [1, 2.5]),
        ("messages", "[{'role': 'user' 'content'}]", "[{'role': 'user' 'content'}]"),
        ("rank", "2.0", 2.0),
        ("preference", "1", 1),
        ("preference", "none", "none"),
        ("deleted", "False", False),
        ("index", "3", 3),
    ],
)
def test_columns_that_hold_something_else_are_known_by_their_names(tmp_path, column, cell, value):
    quoted = '"' + cell.replace('"', '""') + '"'
    (tmp_path / "a.csv").write_text(f"{column},x\n{quoted},y\n")
    ((_, record),) = read_records(tmp_path / "a.csv")
    assert record == {column: value, "x": "y"}
    assert type(record[column]) is type(value)


def test_a_text_that_a_table_would_read_as_something_else_is_refused(tmp_path):
    text = '[{"role": "user", "content": "Hi"}]'
    with pytest.raises(ValueError, match=r"under 'chosen'.*write \.jsonl or \.parquet"):
        write_records(tmp_path / "a.csv", [{"chosen": text}])
    assert not list(tmp_path.iterdir())
    write_records(tmp_path / "a.parquet", [{"chosen": text}])
    assert records_of(tmp_path / "a.parquet") == [{"chosen": text}]


@pytest.mark.parametrize(
    ("content", "line", "reason", "found"),
    [
        (b"a,b\n1,2\n1\n3,4\n", 3, "broken CSV: got 1 cells, expected 2", 2),
        (b"a,b\n1,2\n1,2,3\n3,4\n", 3, "broken CSV: got 3 cells, expected 2", 2),
        (b'a,b\n1,2\n"1"x,2\n3,4\n', 3, "broken CSV: ", 2),
        (b'a,b\n1,2\n3,"4\n', 3, "broken CSV: ", 1),
        (b"a,b\n1,\xff\n3,4\n", 2, "invalid UTF-8: byte 0xff", 1),
        (b"a,b\n1,%s\n3,4\n" % (b"x" * 5000), 2, "too long: ", 1),
        ("a,b\n1,2\n".encode("utf-16"), 1, "no UTF-8: ", 0),
    ],
)
def test_a_broken_row_is_named_or_counted_and_the_others_are_read(tmp_path, content, line, reason, found):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.csv, line {line}: {reason}"):
        list(read_records(path, max_record_bytes=1000))
    rejected = Counter()
    assert len(list(read_records(path, skip_broken=True, rejected=rejected, max_record_bytes=1000))) == found
    assert rejected == {reason.partition(":")[0]: 1}


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("a,a\n1,2\n")
    with pytest.raises(ValueError, match=r"a\.csv: got the columns \['a', 'a'\], expected a different name for each"):
        list(read_records(tmp_path / "a.csv"))
    write_records(tmp_path / "a.parquet", [{"a": "x" * 1000}] * 50)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole parquet file"):
        list(read_records(tmp_path / "a.parquet"))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 5000)[:-20])
    with pytest.raises(ValueError, match="damaged gzip"):
        list(read_records(tmp_path / "a.csv.gz"))


def test_values_that_json_has_no_word_for(tmp_path):
    table = pyarrow.table(
        {
            "score": [1.5, float("nan")],
            "day": [datetime.date(2024, 2, 3), None],
            "cost": [decimal.Decimal("1.25"), None],
            "turn": [{"role": "user", "content": None}, None],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    first = {"score": 1.5, "day": "2024-02-03", "cost": 1.25, "turn": {"role": "user"}}
    assert list(read_records(tmp_path / "a.parquet")) == [(1, first), (2, dict.fromkeys(first))]
    parquet.write_table(pyarrow.table({"image": [b"x", None]}), tmp_path / "a.parquet")
    rejected = Counter()
    found = list(read_records(tmp_path / "a.parquet", skip_broken=True, rejected=rejected))
    assert found == [(2, {"image": None})] and rejected == {"no text": 1}
    with pytest.raises(ValueError, match="line 1: no text: got bytes in a column"):
        list(read_records(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"got records whose values have no common type .*write \.jsonl"):
        write_records(tmp_path / "b.parquet", [{"id": 1}, {"id": "a"}])


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    write_records(tmp_path / "a.parquet", [{"a": "b"}])
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: records_of(tmp_path / "a.parquet"),
        lambda: write_records(tmp_path / "b.parquet", [{"a": "b"}]),
    ):
        with pytest.raises(ImportError, match=r"Parquet needs packages .*pip install 'palm-rlhf\[data\]'"):
            call()
    write_records(tmp_path / "a.csv", [{"a": "b"}])  # which needs none
    assert records_of(tmp_path / "a.csv") == [{"a": "b"}]
    assert not (tmp_path / "b.parquet").exists()


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which colour has the sky?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "blue", "tool_call_id": "1"},
    {"role": "assistant", "content": "Blue."},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "tsv", "parquet", "jsonl", "jsonl.gz"])
def test_every_command_reads_and_writes_every_kind_of_file(tmp_path, capsys, suffix):
    def run(*arguments):
        main(["data", *map(str, arguments)])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    conversations = [{"messages": TALK, "id": "a", "tools": TOOLS}, {"messages": TALK[1:2] + TALK[4:], "id": "b"}]
    source = tmp_path / "in.jsonl"
    write_records(source, conversations)
    assert run("clean", source, "--out", tmp_path / f"clean.{suffix}")["threads"] == 2
    assert run("filter", tmp_path / f"clean.{suffix}", "--out", tmp_path / f"small.{suffix}")["threads"] == 2
    assert list(read_conversations(tmp_path / f"small.{suffix}")) == conversations
    counts = run("convert", tmp_path / f"small.{suffix}", "--to", "sft", "--out", tmp_path / f"sft.{suffix}")
    assert counts["assistant_turns"] == 3
    without_ids = [{key: value for key, value in record.items() if key != "id"} for record in conversations]
    assert list(read_conversations(tmp_path / f"sft.{suffix}")) == without_ids
    run("convert", tmp_path / f"small.{suffix}", "--to", "alpaca", "--out", tmp_path / f"rows.{suffix}")
    assert list(read_conversations(tmp_path / f"rows.{suffix}")) == without_ids[1:]
    ranking = {"prompt": TALK[:2], "responses": ["Blue.", "It is blue.", "Red."]}
    write_records(source, [ranking])
    run("convert", source, "--to", "preferences", "--out", tmp_path / f"pairs.{suffix}")
    pairs = [["Blue.", "It is blue."], ["Blue.", "Red."], ["It is blue.", "Red."]]
    found = list(read_rankings(tmp_path / f"pairs.{suffix}"))
    assert found == [{"prompt": TALK[:2], "responses": pair} for pair in pairs]
    run("convert", source, "--to", "rankings", "--out", tmp_path / f"rankings.{suffix}")
    assert list(read_rankings(tmp_path / f"rankings.{suffix}")) == [ranking]
