"""`palm-rlhf data` as people run it: whole processes, files and pipes."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc

import pytest

from palm_rlhf.cli import main
from palm_rlhf.data.curation.cleaning import mend_turns, to_markdown
from palm_rlhf.data.curation.context_length import fit_context
from palm_rlhf.data.curation.deduplicate import drop_duplicates
from palm_rlhf.data.files.records import write_records
from palm_rlhf.data.formats.conversation_files import read_conversations

HTML = (
    '<div class="markdown prose"><p>So:</p><pre><div><span>python</span><button>Copy code</button></div>'
    '<code class="language-python">a_b = 1</code></pre></div>'
)


def export(*values, first="human", **fields):
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    turns = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]
    return {**fields, "conversations": turns}


RECORDS = [
    export("Hi", HTML, "And?", id="a", model="GPT-4"),
    export("Welcome!", "Hi", "Hello", first="gpt", id="b", model="Default (GPT-3.5)"),
    export("Hi", "Hello", id="c"),  # a duplicate of b, once that is mended
    export("Hi", "Too many requests in 1 hour. Try again later.", id="d"),
    export("Hi", id="e"),
    {"id": "f"},
]
CLEAN = [
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "So:\n\n```python\na_b = 1\n```"},
        ],
        "id": "a",
        "model": "GPT-4",
    },
    {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "id": "b",
        "model": "Default (GPT-3.5)",
    },
]
COUNTS = {
    "conversations": 5,
    "threads": 2,
    "assistant_turns": 2,
    "mended": {"HTML to Markdown": 1, "leading assistant turns dropped": 1, "trailing user turns dropped": 1},
    "rejected": {"duplicate": 1, "no conversation": 1, "no exchange": 1, "provider error": 1},
}


def run(*arguments, stdin=None, hash_seed="0"):
    """A process of its own; its output is bytes."""
    command = [sys.executable, "-m", "palm_rlhf.cli", "data", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, input=stdin, env=environment, capture_output=True, timeout=900)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(capsys):
    """Runs a command in this process and returns its counts, the last line it prints."""

    def call(*arguments):
        main(["data", *map(str, arguments), "--overwrite"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def test_the_help_names_every_command_and_what_it_writes():
    found = run("--help")
    text = " ".join(found.stdout.decode().split())
    assert found.returncode == 0
    forms = ("ShareGPT", "Open-Assistant", "Alpaca", "ChatGPT", "Nectar", "HH", "UltraFeedback", "CSV", "parquet")
    for words in ("clean", "filter", "convert", "sft", "rankings", "JSON", *forms):
        assert words in text


@pytest.mark.slow(8)
def test_cleaning_a_file_gives_the_same_bytes_in_every_run(tmp_path, data):
    source = tmp_path / "export.json"
    source.write_text(json.dumps(RECORDS, indent=1))
    first = run("clean", source, "--out", tmp_path / "1.jsonl", hash_seed="1")
    assert first.returncode == 0, first.stderr
    *table, counts = first.stdout.decode().splitlines()
    assert json.loads(counts) == COUNTS
    assert "rejected" in "\n".join(table) and "provider error" in "\n".join(table)
    assert lines(tmp_path / "1.jsonl") == CLEAN
    # The same through pipes, where the counts go to standard error and only lines to standard output.
    piped = run("clean", "-", "--out", "-", stdin=gzip.compress(source.read_bytes()), hash_seed="2")
    assert piped.stdout == (tmp_path / "1.jsonl").read_bytes()
    assert json.loads(piped.stderr.splitlines()[-1]) == COUNTS
    # What is clean stays as it is.
    assert data("clean", tmp_path / "1.jsonl", "--out", tmp_path / "2.jsonl")["threads"] == 2
    assert (tmp_path / "2.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()


def test_a_broken_file_is_an_error_that_leaves_what_was_there(tmp_path, data):
    source, out = tmp_path / "broken.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([json.dumps(RECORDS[0]), '{"conversations": [', json.dumps(RECORDS[1])]))
    out.write_text("precious\n")
    found = run("clean", source, "--out", out, "--overwrite")
    assert found.returncode == 1
    assert b"line 2: broken JSON" in found.stderr and b"Traceback" not in found.stderr
    assert out.read_text() == "precious\n" and sorted(tmp_path.iterdir()) == [source, out]
    counts = data("clean", source, "--out", out, "--skip-broken")
    assert counts["rejected"] == {"broken JSON": 1}
    assert lines(out) == CLEAN


def test_a_reader_that_has_gone_is_no_crash(tmp_path):
    source = tmp_path / "long.jsonl"
    write_records(source, ({"messages": [*CLEAN[0]["messages"]], "id": i} for i in range(5000)))
    command = f"{sys.executable} -m palm_rlhf.cli data clean {source} --keep-duplicates --out - | head -n 1"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, timeout=900)
    assert json.loads(found.stdout)["id"] == 0
    assert b"Traceback" not in found.stderr and b"BrokenPipe" not in found.stderr


def test_a_folder_of_pages_is_read_in_the_order_of_names(tmp_path, data):
    pages = tmp_path / "pages"
    (pages / "b").mkdir(parents=True)
    (pages / ".hidden.json").write_text("[")
    for place, name in enumerate(["b/1.html", "a.html"]):
        turns = ((role, f"<p>{place} {role}</p>") for role in ("user", "assistant"))
        text = "".join(f'<div data-message-author-role="{role}">{content}</div>' for role, content in turns)
        (pages / name).write_text(f"<html>{text}</html>")
    counts = data("clean", pages, "--out", tmp_path / "out.jsonl")
    assert counts["threads"] == 2
    assert [record["messages"][1]["content"] for record in lines(tmp_path / "out.jsonl")] == [
        "1 assistant",
        "0 assistant",
    ]


def test_filter_splits_and_holds_out_by_conversation(tmp_path, shared_data, data):
    source, out, held_out = (tmp_path / name for name in ("clean.jsonl", "train.jsonl", "eval.jsonl"))
    cleaned = data("clean", shared_data("sharegpt_dummy_conversation.json"), "--out", source)
    assert cleaned["threads"] == 500 and cleaned["assistant_turns"] == 1000 and not cleaned["rejected"]
    counts = data(
        *("filter", source, "--out", out, "--eval-fraction", 0.2, "--eval-out", held_out, "--context", 120),
        *("--blocked-words", "ChatGPT", "--lang", "en"),
    )
    parts = lines(out), lines(held_out)
    assert [counts["threads"], counts["eval_threads"]] == [len(part) for part in parts]
    # The pieces of identity_3 are identity_3_0, identity_3_1, ...
    train, valid = ({"_".join(record["id"].split("_")[:2]) for record in part} for part in parts)
    assert train.isdisjoint(valid) and 50 < len(valid) < 150
    for record in parts[0] + parts[1]:
        text = "".join(message["content"] for message in record["messages"])
        assert len(text.encode()) <= 120 and "chatgpt" not in text.lower()
    # Every exchange is in one of the files, or counted.
    all_turns = counts["assistant_turns"] + counts["eval_assistant_turns"]
    blocked = [r for r in lines(source) if any("chatgpt" in m["content"].lower() for m in r["messages"])]
    num_blocked = sum(len(record["messages"]) // 2 for record in blocked)
    assert counts["rejected"]["blocked word"] == len(blocked)
    assert all_turns + num_blocked + counts["rejected"]["exchange longer than the context"] == 1000


def test_filter_by_model_length_digits_and_likeness(tmp_path, data):
    source, out = tmp_path / "some.jsonl", tmp_path / "out.jsonl"
    story = "once upon a time there was a model that learnt to answer every question of every user with care"
    write_records(
        source,
        [
            export("Hi", f"{story} again", id="kept", model="GPT-4"),
            export("Hi", f"{story} anew", id="near", model="GPT-4"),
            export("Hi", story, id="3.5", model="Default (GPT-3.5)"),
            export("Hi", "1" * 50, id="digits", model="GPT-4"),
            export("Hi", "Hello", id="short", model="GPT-4"),
        ],
    )
    options = ["--model", "gpt-4", "--repeated-digits", 9, "--min-tokens", 20, "--near-duplicates", 0.7]
    counts = data("filter", source, "--out", out, *options)
    assert [record["id"] for record in lines(out)] == ["kept"]
    assert counts["rejected"] == {"another model": 1, "near-duplicate": 1, "repeated digits": 1, "too short": 1}


def test_filter_counts_in_the_tokens_of_a_tokenizer(tmp_path, data):
    from palm_rlhf.data.tokenizer import HuggingFaceTokenizer

    source, out = tmp_path / "some.jsonl", tmp_path / "out.jsonl"
    write_records(source, [export("the the the", "the the", "the", "the", id="x")])
    HuggingFaceTokenizer.train(["the the the"] * 9, 270).save_pretrained(tmp_path / "tokenizer")
    assert data("filter", source, "--out", out, "--context", 12)["threads"] == 1
    (piece,) = lines(out)
    assert len(piece["messages"]) == 2  # in bytes the first exchange is too long
    counts = data("filter", source, "--out", out, "--context", 12, "--tokenizer", tmp_path / "tokenizer")
    assert len(lines(out)[0]["messages"]) == 4 and not counts["rejected"]


@pytest.mark.parametrize(
    "options", [["--eval-fraction", "0.1"], ["--eval-out", "x"], ["--eval-fraction", "0.1", "--eval-out", "out"]]
)
def test_filter_refuses_half_of_a_split(tmp_path, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="give both --eval-fraction and --eval-out"):
        main(["data", "filter", "in", "--out", "out", *options])


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--to", "sft"], {"threads": 529, "assistant_turns": 886}),
        (["--to", "rankings"], {"rankings": 207, "pairs": 732}),
        (["--to", "rankings", "--max-replies", "5"], {"rankings": 207, "pairs": 658}),
        (["--to", "prompts"], {"prompts": 475}),
        (["--to", "preferences"], {"pairs": 732}),
        (["--to", "sft", "--top-k", "1"], {"threads": 96, "assistant_turns": 142}),
        (["--to", "rankings", "--top-k", "1"], {"rankings": 133, "pairs": 510}),
        (["--to", "preferences", "--top-k", "1", "--max-replies", "5"], {"pairs": 451}),
        (["--to", "sft", "--top-k", "2"], {"threads": 273, "assistant_turns": 447}),
        (["--to", "rankings", "--top-k", "2"], {"rankings": 169, "pairs": 604}),
    ],
)
def test_open_assistant_converts_to_the_counts_of_its_trees(tmp_path, shared_data, data, options, expected):
    out = tmp_path / "out.jsonl"
    counts = data("convert", shared_data("oasst_en_100_tree.jsonl"), "--lang", "en", "--out", out, *options)
    assert {name: counts[name] for name in expected} == expected
    keys = {"sft": {"messages"}, "rankings": {"prompt", "responses"}, "prompts": {"prompt"}}
    found = lines(out)
    assert {frozenset(record) for record in found} == {
        frozenset(keys.get(options[1], {"prompt", "chosen", "rejected"})),
    }
    assert len(found) == next(iter(expected.values()))


def test_converting_a_pipe_tells_its_form_by_its_content(tmp_path, shared_data, data):
    source = shared_data("oasst_en_100_tree.jsonl")
    piped = run("convert", "-", "--to", "rankings", "--lang", "en", "--out", "-", stdin=source.read_bytes())
    data("convert", source, "--to", "rankings", "--lang", "en", "--out", tmp_path / "out.jsonl")
    assert piped.stdout == (tmp_path / "out.jsonl").read_bytes()
    counts = json.loads(piped.stderr.splitlines()[-1])
    assert (counts["rankings"], counts["pairs"]) == (207, 732)


QUESTION, BETTER, WORSE = "Why is the sky blue?", "Light scatters.", "No idea."
PAIR = {"prompt": [{"role": "user", "content": QUESTION}], "chosen": BETTER, "rejected": WORSE}
SAID = [*PAIR["prompt"], {"role": "assistant", "content": BETTER}]
HH = {key: f"\n\nHuman: {QUESTION}\n\nAssistant: {PAIR[key]}" for key in ("chosen", "rejected")}
BOTH = {"prompt": PAIR["prompt"], "responses": [BETTER, WORSE]}
LIKED = {"prompt": PAIR["prompt"], "completion": BETTER, "label": True}


@pytest.mark.parametrize("record", [PAIR, HH, BOTH], ids=["pair", "hh", "ranking"])
def test_preferences_convert_to_all(tmp_path, data, record):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_records(source, [record])
    expected = {"sft": {"messages": SAID}, "rankings": BOTH, "prompts": {"prompt": PAIR["prompt"]}, "preferences": PAIR}
    for target, converted in expected.items():
        data("convert", source, "--to", target, "--out", out)
        assert lines(out) == [converted], target
    counts = data("convert", source, "--to", "unpaired", "--out", out)
    assert lines(out) == [LIKED, {**LIKED, "completion": WORSE, "label": False}]
    assert (counts["replies"], counts["desirable"]) == (2, 1)


def test_labelled_replies_are_read_back_and_those_that_people_want_are_learnt_from(tmp_path, data):
    source, out, again = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    rows = [{"prompt": QUESTION, "completion": reply, "label": reply == BETTER} for reply in (BETTER, WORSE)]
    write_records(source, [*rows, {"prompt": QUESTION, "completion": BETTER}])
    counts = data("convert", source, "--to", "unpaired", "--out", out)
    assert lines(out) == [LIKED, {**LIKED, "completion": WORSE, "label": False}]
    assert counts["rejected"] == {"no label": 1}
    data("convert", out, "--to", "unpaired", "--out", again)
    assert again.read_bytes() == out.read_bytes()
    table = tmp_path / "out.csv"
    data("convert", out, "--to", "unpaired", "--out", table)
    data("convert", table, "--to", "unpaired", "--out", again, "--overwrite")
    assert again.read_bytes() == out.read_bytes()
    counts = data("convert", out, "--to", "sft", "--out", again, "--overwrite")
    assert lines(again) == [{"messages": SAID}] and counts["rejected"] == {"answer labelled as bad": 1}


def test_open_assistant_converts_to_its_best_and_worst_replies(tmp_path, shared_data, data):
    source, rankings, out = shared_data("oasst_en_100_tree.jsonl"), tmp_path / "rankings.jsonl", tmp_path / "out.jsonl"
    data("convert", source, "--lang", "en", "--to", "rankings", "--out", rankings)
    counts = data("convert", source, "--lang", "en", "--to", "unpaired", "--out", out)
    assert (counts["replies"], counts["desirable"]) == (2 * 207, 207)
    said = [(record["completion"], record["label"]) for record in lines(out)]
    ranked = [record["responses"] for record in lines(rankings)]
    assert said == [pair for replies in ranked for pair in ((replies[0], True), (replies[-1], False))]


@pytest.mark.parametrize("record", [export(QUESTION, HTML, "And?", "Yes"), {"messages": [*SAID, *SAID]}])
def test_conversations_convert_to_threads_and_prompts(tmp_path, data, record):
    source, out = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps([record]))
    assert data("convert", source, "--to", "sft", "--lang", "en", "--out", out)["assistant_turns"] == 2
    (thread,) = lines(out)
    assert thread.keys() == {"messages"} and "<" not in str(thread)
    assert data("convert", source, "--to", "prompts", "--out", out)["prompts"] == 2
    assert [record["prompt"] for record in lines(out)] == [thread["messages"][:1], thread["messages"][:3]]


@pytest.mark.parametrize(
    "record, options, message",
    [
        (RECORDS[0], ["--to", "rankings"], "they compare no replies"),
        (PAIR, ["--to", "unpaired", "--form", "alpaca"], "expected a labelled reply"),
        (RECORDS[0], ["--to", "unpaired", "--html", "always"], "since only these are converted to Markdown"),
        (RECORDS[0], ["--to", "sft", "--top-k", "1"], "only messages of Open-Assistant have ranks"),
        (PAIR, ["--to", "sft", "--max-replies", "3"], "for rankings or preferences"),
        (PAIR, ["--to", "rankings", "--max-replies", "1"], "expected at least 2"),
        ({"text": "x"}, ["--to", "sft"], r"line 1: got a record with the keys \['text'\]"),
        (PAIR, ["--to", "sft", "--form", "sharegpt"], "expected a conversation"),
        (RECORDS[0], ["--to", "sft", "--form", "oasst"], "expected an Open-Assistant tree"),
    ],
)
def test_what_cannot_be_converted_is_an_error(tmp_path, record, options, message):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_records(source, [record])
    with pytest.raises(SystemExit, match=message):
        main(["data", "convert", str(source), "--out", str(out), *options])
    assert not out.exists()


@pytest.mark.parametrize(
    ("key", "options", "reply"),
    [
        ("conversations", [], "**bold**"),
        ("conversations", ["--html", "never"], "<p><b>bold</b></p>"),
        ("messages", [], "<p><b>bold</b></p>"),
        ("messages", ["--html", "always"], "**bold**"),
    ],
)
@pytest.mark.parametrize("target", ["sft", "sharegpt", "alpaca"])
def test_html_is_converted_as_asked(tmp_path, data, key, options, reply, target):
    names = ("from", "value") if key == "conversations" else ("role", "content")
    turns = [dict(zip(names, turn)) for turn in (("user", "Hi"), ("assistant", "<p><b>bold</b></p>"))]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_records(source, [{key: turns}])
    data("convert", source, "--to", target, "--out", out, *options)
    (record,) = lines(out)
    found = {"sft": "messages", "sharegpt": "conversations", "alpaca": "output"}[target]
    last = record[found] if target == "alpaca" else record[found][-1]["content" if target == "sft" else "value"]
    assert last == reply


def test_only_conversations_have_html_to_convert(tmp_path, data):
    write_records(tmp_path / "in.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(SystemExit, match="html='always' for the form hh"):
        options = ["--to", "sft", "--html", "always", "--out", str(tmp_path / "out.jsonl")]
        main(["data", "convert", str(tmp_path / "in.jsonl"), *options])


@pytest.mark.parametrize("command", [["clean"], ["filter"], ["convert", "--to", "sft"]])
def test_every_command_says_what_it_cannot_read(tmp_path, shared_data, command):
    for name in ("enwik6", "vicuna_bench/question.jsonl", "vicuna_bench/review_bard_vicuna-13b.jsonl"):
        with pytest.raises(SystemExit, match=f"{name}.*expected"):
            main(["data", *command, str(shared_data(name)), "--out", str(tmp_path / "out.jsonl")])
    with pytest.raises(SystemExit, match="No such file"):
        main(["data", *command, str(tmp_path / "none"), "--out", str(tmp_path / "out.jsonl")])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow(8)
def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for num_records in (500, 4000):
        path = tmp_path / "export.json"
        text = "\n".join(f"line {i} of a reply" for i in range(50))
        path.write_text(json.dumps([export(f"{i}", text, f"{i}", text) for i in range(num_records)]))
        tracemalloc.start()
        records = drop_duplicates(mend_turns(to_markdown(read_conversations(path))))
        assert write_records(tmp_path / "out.jsonl", fit_context(records, 1200)) == 2 * num_records
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 8e6
    assert peaks[1] - peaks[0] < 1e6 + 150 * 4000  # the hashes of duplicates


EMPTY = [
    export("Which city is the capital of France?", "Paris, for a thousand years or so.", id="whole"),
    {"id": "empty", "conversations": []},
    {"id": "system", "conversations": [{"from": "system", "value": "Be brief and answer in English."}]},
    {"id": "question", "messages": [{"role": "user", "content": "A question without a reply to it, and a long one."}]},
    {"id": "reply", "conversations": [{"from": "gpt", "value": "A reply to nothing, which is as long as that."}]},
    {"id": "blank", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": " "}]},
    {"id": "unknown", "messages": [{"role": "user", "content": "Hi"}], "background": "Of all this nothing is known."},
    {"id": "none"},
]


@pytest.mark.parametrize(
    "command",
    [
        ["clean"],
        ["filter"],
        ["filter", "--context", 20],
        ["filter", "--context", 20, "--overlong", "truncate"],
        ["filter", "--context", 1000],
        ["filter", "--min-tokens", 10, "--near-duplicates", 0.9, "--lang", "en"],
        ["convert", "--to", "sft"],
        ["convert", "--to", "sft", "--lang", "en"],
        ["convert", "--to", "alpaca"],
        ["convert", "--to", "sharegpt"],
    ],
)
def test_what_comes_out_and_what_is_left_out_add_up_to_what_went_in(tmp_path, data, command):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_records(source, EMPTY)
    counts = data(command[0], source, "--out", out, *command[1:])
    assert len(lines(out)) == counts.get("threads", 0)
    assert counts.get("threads", 0) + sum(counts["rejected"].values()) == len(EMPTY)
    assert counts["rejected"]["unknown field 'background'"] == counts["rejected"]["no conversation"] == 1


def test_fields_are_left_out_when_asked(tmp_path, data):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_records(source, [{**export("Hi", "Hello"), "background": "A b", "bucket": "x"}])
    for command in (["clean"], ["filter"], ["convert", "--to", "sft"]):
        assert "threads" not in data(*command, source, "--out", out)
        counts = data(*command, source, "--out", out, "--ignore-fields", "background")
        assert counts["threads"] == 1 and counts["mended"] == {"field 'bucket' left out": 1}
    pair = {**PAIR, "background": "A b"}
    write_records(source, [pair])
    assert data("convert", source, "--to", "rankings", "--out", out)["rejected"] == {"unknown field 'background'": 1}
    assert data("convert", source, "--to", "rankings", "--out", out, "--ignore-fields", "background")["rankings"] == 1


def test_a_file_that_is_there_is_written_over_only_where_that_is_asked_for(tmp_path):
    conversation = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]}
    source, out, held_out = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "eval.jsonl"
    source.write_text(json.dumps(conversation) + "\n")
    split = ["--eval-fraction", "0.5", "--eval-out", str(held_out)]
    for existing, command in (
        (out, ["clean"]),
        (out, ["convert", "--to", "sft"]),
        (out, ["filter"]),
        (held_out, ["filter", *split]),
    ):
        out.unlink(missing_ok=True)
        existing.write_text("mine")
        arguments = ["data", command[0], str(source), "--out", str(out), *command[1:]]
        with pytest.raises(SystemExit, match=rf"^palm-rlhf: .*{existing.name} exists already: .*--overwrite$"):
            main(arguments)
        assert existing.read_text() == "mine"
        main([*arguments, "--overwrite"])
        assert existing.read_text() != "mine"
        held_out.unlink(missing_ok=True)
    with pytest.raises(SystemExit, match=r"in\.jsonl exists already"):
        main(["data", "clean", str(source), "--out", str(source)])
    main(["data", "clean", str(source), "--out", os.devnull])


def test_prompts_are_read_back_and_questions_without_a_reply_are_prompts(tmp_path, data):
    source, out, again = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    user, reply = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    write_records(source, [{"messages": [user]}, {"messages": [user, reply, user, user]}, {"messages": [reply]}])
    counts = data("convert", source, "--to", "prompts", "--out", out)
    prompts = [[user], [user], [user, reply, user]]
    assert [record["prompt"] for record in lines(out)] == prompts
    assert counts["mended"] == {"trailing user turns dropped": 1} and counts["rejected"] == {"no question": 1}
    assert data("convert", out, "--to", "prompts", "--out", again)["prompts"] == 3
    assert again.read_bytes() == out.read_bytes()
    rows = [
        {"prompt": "Hi"},
        {"question": "Hi", "system": "Be brief.", "source": "a forum"},
        {"instruction": "Add.", "input": "2, 3"},
        {"prompt": [user, user]},
        {"prompt": [user, reply]},
        {"prompt": " "},
        {"prompt": "Hi", "background": "A b"},
    ]
    write_records(source, rows)
    counts = data("convert", source, "--to", "prompts", "--out", out)
    contents = [[message["content"] for message in record["prompt"]] for record in lines(out)]
    assert contents == [["Hi"], ["Be brief.", "Hi"], ["Add.\n2, 3"]]
    reasons = {"roles do not alternate": 1, "no question": 2, "unknown field 'background'": 1}
    assert counts["rejected"] == reasons
    with pytest.raises(SystemExit, match="they have no replies"):
        main(["data", "convert", str(source), "--to", "sft", "--out", str(out), "--overwrite"])


def test_the_summary_says_how_to_leave_out_fields(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    write_records(source, [{**export("Hi", "Hello"), name: "A b"} for name in ("background", "mood", "background")])
    main(["data", "convert", str(source), "--to", "sft", "--out", str(tmp_path / "out.jsonl")])
    captured = capsys.readouterr()
    assert captured.err == "to leave out such fields and keep their records: --ignore-fields background mood\n"
    reasons = {"unknown field 'background'": 2, "unknown field 'mood'": 1}
    assert json.loads(captured.out.splitlines()[-1])["rejected"] == reasons
