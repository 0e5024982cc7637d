"""What is read is what the file says, line by line; what is broken is named, and counted only when asked."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.files import json_array
from palm_rlhf.data.files.records import read_records, write_records

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=6)


def save(folder, content, name="a.jsonl"):
    path = Path(folder, name)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def without_lines(pieces):
    return [record for _, record in pieces]


def layout(rows, form, indent, ascii_only):
    """The rows as lines, or as one array, and the numbers of the lines on which they start."""
    if form == "lines":
        texts = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        return "\r\n\n".join(texts), [1 + 2 * place for place in range(len(rows))]
    if form == "objects":
        texts = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
        return "\n".join(texts), [1 + sum(text.count("\n") + 1 for text in texts[:place]) for place in range(len(rows))]
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    if indent is None:
        return text, [1] * len(rows)
    sizes = [json.dumps(row, indent=indent).count("\n") + 1 for row in rows]
    return text, [2 + sum(sizes[:place]) for place in range(len(rows))]


@settings(deadline=None, max_examples=40)
@given(
    rows=RECORDS,
    form=st.sampled_from(["lines", "array", "objects"]),
    indent=st.sampled_from([None, 0, 1, "\t"]),
    ascii_only=st.booleans(),
    packed=st.booleans(),
    bom=st.booleans(),
    chunk=st.sampled_from([1, 7, 1 << 20]),
)
def test_lines_and_arrays_are_the_records_in_them(rows, form, indent, ascii_only, packed, bom, chunk):
    text, numbers = layout(rows, form, indent, ascii_only)
    content = b"\xef\xbb\xbf" * bom + text.encode()
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "CHUNK", chunk)
        path = save(folder, gzip.compress(content) if packed else content)
        assert list(read_records(path)) == list(zip(numbers, rows))


@settings(deadline=None, max_examples=40)
@given(rows=RECORDS, name=st.sampled_from(["b.jsonl", "b.jsonl.gz"]))
def test_what_is_written_is_read_back_and_the_bytes_are_the_same_again(rows, name):
    with TemporaryDirectory() as folder:
        first, again = Path(folder, name), Path(folder, "again" + name)
        assert write_records(first, rows) == len(rows)
        assert without_lines(read_records(first)) == rows
        write_records(again, without_lines(read_records(first)))
        assert first.read_bytes() == again.read_bytes()
        assert not name.endswith(".gz") or first.read_bytes()[3:8] == bytes(5)  # no name and no time in the gzip header
        assert sorted(os.listdir(folder)) == sorted([first.name, again.name])


GOOD = '{"a": 1}'
BROKEN = {
    "cut short": (b'{"a": "x', "broken JSON"),
    "an object and a word": (b'{"a": 1} x', "broken JSON"),
    "cut after a bracket": (b'{"a": [', "broken JSON"),
    "cut after a comma": (b'{"a": 1,', "broken JSON"),
    "no JSON": (b"plain text", "broken JSON"),
    "NaN": (b'{"a": NaN}', "broken JSON"),
    "a number too long for Python": (b'{"a": %s}' % (b"1" * 5000), "broken JSON"),
    "a list": (b"[1, 2]", "no object"),
    "a text": (b'"x"', "no object"),
    "not UTF-8": (b'{"a": "\xff\xfe"}', "invalid UTF-8"),
    "half a character": (b'{"a": "\xc3"}', "invalid UTF-8"),
    "half of a pair": (b'{"a": "\\ud83d"}', "invalid Unicode"),
    "nested": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "long": (b'{"a": "%s"}' % (b"x" * 2_000_000), "too long"),
}
LIMIT = 1_000_000


@settings(deadline=None, max_examples=60)
@given(rows=RECORDS, ends=st.lists(st.sampled_from(["", " ", "\n", "\r\n\n"]), min_size=6, max_size=6), data=st.data())
def test_objects_one_behind_the_other_are_read_however_each_is_printed(rows, ends, data):
    indents = [data.draw(st.sampled_from([None, 1, 4])) for _ in rows]
    texts = [json.dumps(row, indent=indent) + end for row, indent, end in zip(rows, indents, ends)]
    with TemporaryDirectory() as folder:
        found = list(read_records(save(folder, "".join(texts))))
    assert without_lines(found) == rows
    assert [line for line, _ in found] == [1 + "".join(texts[:place]).count("\n") for place in range(len(rows))]


@pytest.mark.parametrize(
    ("text", "found", "broken"),
    [
        ('{\n "a": 1,\n "b": [\n{\n "a": 2\n}\n', [(4, {"a": 2})], [1]),  # the first was cut short
        ('{\n "a": tru\n}\n{\n "a": 2\n}\n', [(4, {"a": 2})], [1]),
        ('{"a": [\n{"a": {\n{"a": 3}\n{"a":', [(3, {"a": 3})], [1, 2, 4]),
        ('{"a": [\n\n\n{"a": {\n\n{"a": 3}', [(6, {"a": 3})], [1, 4]),
        ('{\n "a": 1\n}, {\n "a": 2\n}', [(1, {"a": 1})], [3]),
        ('{\n "a": {}\n}\n\n{"b": "}"}{"c": "{"}', [(1, {"a": {}}), (5, {"b": "}"}), (5, {"c": "{"})], []),
    ],
)
def test_a_broken_object_over_several_lines_ends_where_the_next_begins(tmp_path, caplog, text, found, broken):
    rejected = Counter()
    assert list(read_records(save(tmp_path, text), skip_broken=True, rejected=rejected)) == found
    named = [int(number) for number in re.findall(r"line (\d+) left out", caplog.text)]
    assert rejected.total() >= len(broken) and named[: len(broken)] == broken


def test_an_object_over_lines_that_is_too_long_costs_no_other(tmp_path):
    texts = [json.dumps({"a": ["x" * 50] * size}, indent=1) for size in (1, 100, 2)]
    path = save(tmp_path, "\n".join(texts))
    rejected = Counter()
    found = list(read_records(path, skip_broken=True, rejected=rejected, max_record_bytes=1000))
    third = (texts[0] + texts[1]).count("\n") + 3
    assert [(line, len(record["a"])) for line, record in found] == [(1, 1), (third, 2)]
    assert rejected == {"too long": 1}


@pytest.mark.parametrize(("line", "reason"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_line_is_named_or_counted_and_the_others_are_read(tmp_path, caplog, line, reason, packed):
    content = b"\n".join([GOOD.encode(), line, GOOD.encode()])
    path = save(tmp_path, gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {reason}: .*mend or delete it"):
        list(read_records(path, max_record_bytes=LIMIT))
    rejected = Counter()
    found = list(read_records(path, skip_broken=True, rejected=rejected, max_record_bytes=LIMIT))
    assert found == [(1, {"a": 1}), (3, {"a": 1})]
    assert rejected == {reason: 1}
    assert re.search(rf"a\.jsonl, line 2 left out: {reason}", caplog.text)


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT, LIMIT + 1])
@pytest.mark.parametrize("shape", ["{}\n", "{}", "[{}]", "[\n{}\n,{{}}]"])
def test_the_limit_is_the_longest_record_that_is_read(tmp_path, size, shape):
    record = json.dumps({"a": "x" * (size - len('{"a": ""}'))})
    assert len(record) == size
    path = save(tmp_path, shape.format(record))
    found = [record for _, record in read_records(path, skip_broken=True, max_record_bytes=LIMIT)]
    assert [len(record.get("a", "")) for record in found if record] == ([size - 9] if size <= LIMIT else [])


@pytest.mark.parametrize("shape", [b"%s\n%s", b"[%s,\n%s]"], ids=["lines", "array"])
def test_a_gigabyte_record_takes_little_memory(tmp_path, python, shape):
    path = tmp_path / "a.jsonl.gz"
    start, end = (shape % (b'{"a": "|"}', GOOD.encode())).split(b"|")
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(128):
            file.write(b"x" * (1 << 20))
        file.write(end)
    process = python(
        """
import resource
from collections import Counter
from palm_rlhf.data.files.records import read_records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rejected = Counter()
found = list(read_records(sys.argv[1], skip_broken=True, rejected=rejected, max_record_bytes=1 << 22))
print(found, dict(rejected), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
""",
        path,
    )
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    *start, megabytes = output.split()
    assert " ".join(start) == "[(2, {'a': 1})] {'too long': 1}"
    assert int(megabytes) < 64


@pytest.mark.parametrize(
    ("array", "found", "reason", "number"),
    [
        ('[{"a": 1}, {"a": 2', [{"a": 1}], "broken JSON", 2),
        ('[{"a": 1}, {"a": 2}', [{"a": 1}, {"a": 2}], "broken JSON", 2),
        ('[{"a": 1},', [{"a": 1}], "broken JSON", 2),
        ("[", [], "broken JSON", 1),
        ('[{"a": 1} {"a": 2}, {"a": 3}]', [{"a": 1}, {"a": 3}], "broken JSON", 1),
        ('[{"a": 1},, {"a": 2}]', [{"a": 1}, {"a": 2}], "broken JSON", 2),
        ('[{"a": 1}, {"a": 2},]', [{"a": 1}, {"a": 2}], "broken JSON", 3),
        ('[{"a": 1}, {"a": 2}] {}', [{"a": 1}, {"a": 2}], "broken JSON", None),
        ('[{"a": 1}, {"a": %s}]' % ("[" * 200_000), [{"a": 1}], "nested too deeply", 2),
        ('[{"a": 1}, {"a": "never closed}, {"b": "2"}]', [{"a": 1}], "broken JSON", 2),
    ],
)
def test_a_broken_array_gives_what_can_be_found_and_says_what_is_wrong(tmp_path, array, found, reason, number):
    path = save(tmp_path, array)
    place = "line 1" + (f", record {number}" if number else "")
    with pytest.raises(ValueError, match=rf"a\.jsonl, {place}: {reason}: "):
        list(read_records(path))
    rejected = Counter()
    assert without_lines(read_records(path, skip_broken=True, rejected=rejected)) == found
    assert rejected == {reason: 1}


def test_the_error_counts_the_characters_of_the_record(tmp_path):
    path = save(tmp_path, '[\n{"a": 1},\n  {"a": tru}]')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3, record 2: broken JSON: Expecting value at character 7;"):
        list(read_records(path))


IN_ARRAYS = {
    "NaN": (b'{"id": "x", "model": NaN, "b": {"c": [1, "]"]}}', "broken JSON"),
    "Infinity": (b'{"a": [1, -Infinity]}', "broken JSON"),
    "Python's words": (b"{'a': None, 'b': True}", "broken JSON"),
    "a comma too many": (b'{"a": [1, 2,],}', "broken JSON"),
    "a bracket too few": (b'{"a": [1, [2}', "broken JSON"),
    "a number": (b"12345678", "no object"),
    "a bare NaN": (b"NaN", "broken JSON"),
    "brackets in a broken text": (b'{"a": "\\q \\" }, {"}', "broken JSON"),
} | {name: BROKEN[name] for name in BROKEN if not name.startswith(("cut ", "an object and"))}


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(IN_ARRAYS)),
    before=st.integers(0, 2),
    after=st.integers(0, 2),
    lines=st.booleans(),
    chunk=st.sampled_from([3, 64, 1 << 20]),
)
def test_a_broken_record_of_an_array_costs_no_other(name, before, after, lines, chunk):
    broken, reason = IN_ARRAYS[name]
    chunk = max(chunk, len(broken) // 50)  # else the longest would be read three bytes at a time
    records = [b'{"a": %d, "text": "[{,}] \\\\\\" %d"}' % (place, place) for place in range(before + after)]
    pieces = [*records[:before], broken, *records[before:]]
    content = b"[" + (b",\n" if lines else b", ").join(pieces) + b"]"
    line = 1 + before * lines
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "CHUNK", chunk)
        path = save(folder, content)
        with pytest.raises(
            ValueError, match=rf"a\.jsonl, line {line}, record {before + 1}: {reason}: .*mend or delete"
        ):
            list(read_records(path, max_record_bytes=LIMIT))
        rejected = Counter()
        found = read_records(path, skip_broken=True, rejected=rejected, max_record_bytes=LIMIT)
        assert without_lines(found) == list(map(json.loads, records))
        assert rejected == {reason: 1}


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("form", ["lines", "array"])
def test_other_encodings_are_refused_by_their_names(tmp_path, form, codec):
    path = save(tmp_path, layout([{"a": 1}, {"a": 2}], form, None, True)[0].encode(codec))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no UTF-8: it looks like UTF-16 or UTF-32; convert it"):
        list(read_records(path))
    rejected = Counter()
    assert list(read_records(path, skip_broken=True, rejected=rejected)) == []
    assert rejected == {"no UTF-8": 1}


@settings(deadline=None, max_examples=40)
@given(rows=RECORDS.filter(bool), form=st.sampled_from(["lines", "array"]), data=st.data())
def test_a_gzip_that_ends_early_gives_a_prefix_and_says_so(rows, form, data):
    text, _ = layout(rows, form, 2, True)
    packed = gzip.compress(text.encode(), mtime=0)
    cut = data.draw(st.integers(1, len(packed) - 1))
    with TemporaryDirectory() as folder:
        path = save(folder, packed[:cut])
        with pytest.raises(ValueError, match=r"line \d+(, record \d+)?: damaged gzip: it ends early or is damaged"):
            list(read_records(path))
        rejected = Counter()
        found = without_lines(read_records(path, skip_broken=True, rejected=rejected))
        assert found == rows[: len(found)]
        assert rejected == {"damaged gzip": 1}


@settings(deadline=None, max_examples=60)
@given(
    content=st.binary(max_size=60) | TEXT.map(str.encode) | st.from_regex(r"[\[\]{},:\"a0 \n]{0,20}").map(str.encode)
)
def test_any_bytes_are_records_or_counted(content):
    with TemporaryDirectory() as folder:
        path = save(folder, content)
        rejected = Counter()
        found = list(read_records(path, skip_broken=True, rejected=rejected))
        try:
            assert list(read_records(path)) == found
            assert not rejected
        except ValueError:
            assert rejected


def test_a_name_that_promises_gzip_must_hold_it(tmp_path):
    for content in (b"", GOOD):
        with pytest.raises(ValueError, match="is not a gzip file, expected one by its name"):
            list(read_records(save(tmp_path, content, "a.jsonl.gz")))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(read_records(tmp_path / "nowhere.jsonl"))


def test_a_line_is_read_when_it_is_asked_for(tmp_path):
    path = save(tmp_path, f"{GOOD}\nbroken\n")
    pieces = read_records(path)
    assert next(pieces) == (1, {"a": 1})
    with pytest.raises(ValueError, match="line 2"):
        next(pieces)


COPY = """
from palm_rlhf.data.files.records import read_records, write_records
num = write_records(sys.argv[2], (record for _, record in read_records(sys.argv[1])))
print(num, file=sys.stderr)
"""


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("source", ["open('in')", "os.popen('cat in')"])
def test_a_dash_is_standard_input_and_output(tmp_path, python, source, packed):
    rows = [{"a": "é\u2028\n"}, {"b": [1, None]}]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    save(tmp_path, gzip.compress(content) if packed else content, "in")
    process = python(f"import os\nsys.stdin = {source}\n{COPY}", "-", "-")
    output, errors = process.communicate()
    assert (process.returncode, errors.strip()) == (0, "2"), errors
    assert [json.loads(line) for line in output.removesuffix("\n").split("\n")] == rows


def test_an_error_while_reading_leaves_the_old_file(tmp_path):
    path = save(tmp_path, "precious\n", "out.jsonl")

    def rows():
        yield {"a": 1}
        raise ValueError("the source is broken")

    with pytest.raises(ValueError, match="the source is broken"):
        write_records(path, rows())
    assert path.read_text() == "precious\n"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, python):
    path = save(tmp_path, "precious\n", "out.jsonl")
    process = python(
        """
from palm_rlhf.data.files.records import write_records
def rows():
    for number in range(100_000_000):
        if number == 20_000:
            print("writing", flush=True)
        yield {"number": number}
write_records(sys.argv[1], rows())
""",
        path,
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_text() == "precious\n"
    assert write_records(path, [{"a": 1}]) == 1  # and what the dead process left is in nobody's way
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_file_can_be_rewritten_from_itself(tmp_path):
    path = save(tmp_path, f"{GOOD}\n" * 3)
    assert write_records(path, ({"b": record["a"]} for _, record in read_records(path))) == 3
    assert path.read_text() == '{"b": 1}\n' * 3


def test_a_link_stays_a_link_and_a_device_stays_a_device(tmp_path):
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(target)
    write_records(link, [{"a": 1}])
    assert link.is_symlink() and target.read_text() == GOOD + "\n"
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen([sys.executable, "-c", f"print(open({str(tmp_path / 'pipe')!r}).read())"], stdout=-1)
    write_records(tmp_path / "pipe", [{"a": 1}])
    assert reader.communicate()[0].decode().strip() == GOOD
    assert (tmp_path / "pipe").is_fifo()


def test_what_json_cannot_hold_is_no_record(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_records(tmp_path / "a.jsonl", [{"a": float("nan")}])
    assert os.listdir(tmp_path) == []
