"""Every reader of evaluation: content in any shape is read right, or refused with the file and the line."""

import copy
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.evaluation.alpaca import evaluate_annotations, read_annotations, read_outputs
from palm_rlhf.evaluation.comparisons import summarise
from palm_rlhf.evaluation.judging.answers import read_answers, read_questions
from palm_rlhf.evaluation.judging.journal import Journal
from palm_rlhf.evaluation.judging.reviews import compare_reviews, read_reviews
from palm_rlhf.evaluation.judging.study import count_votes, read_votes
from palm_rlhf.evaluation.measures.answer_statistics import read_output_texts, statistics_by_language
from palm_rlhf.evaluation.measures.reward_bench import read_trios
from palm_rlhf.evaluation.measures.rlhf_runs import read_run
from palm_rlhf.evaluation.measures.text_prediction import read_documents
from palm_rlhf.evaluation.message_text import text_of, without_thoughts
from palm_rlhf.evaluation.ratings import elo, read_battles
from palm_rlhf.evaluation.reports.report import read_report, render
from palm_rlhf.evaluation.verdicts import parse_rating, parse_scores, parse_verdict
from palm_rlhf.training.run.log import read_metrics

PARTS = [{"type": "text", "text": "An "}, {"type": "image_url", "image_url": {"url": "a"}}, {"text": "answer"}]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("a", "a"),
        (None, None),
        (["a", "b"], "ab"),
        (PARTS, "An answer"),
        ({"type": "text", "text": "a"}, "a"),
        ({"role": "assistant", "content": PARTS}, "An answer"),
        ({"from": "gpt", "value": "a"}, "a"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}], "a"),
        ([{"type": "thinking", "thinking": "hm"}], None),
        ([{"type": "tool_use", "input": {}}, {"type": "output_text", "text": "a"}], "a"),
        ({"role": "assistant", "content": None, "tool_calls": []}, None),
        ([], None),
        ({}, None),
    ],
)
def test_the_text_of_a_content(content, expected):
    assert text_of(content) == expected


@pytest.mark.parametrize("content", [3, True, 1.5, [3], {"text": 3}, [[[[["a"]]]]]])
def test_what_is_no_content_is_refused(content):
    with pytest.raises(ValueError, match="expected a text, or parts with one"):
        text_of(content)


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}, answer]}, ["Noon."])
        for answer in ({"role": "assistant", "content": "Noon."}, {"role": "assistant", "content": [{"text": "Noon."}]})
    ]
    + [
        ({"choices": [{"turns": [{"content": "An answer"}, "more"]}]}, ["An answer", "more"]),
        ({"choices": ["one", {"message": {"content": PARTS}}, {"text": "three"}]}, ["one", "An answer", "three"]),
        ({"output": PARTS}, ["An answer"]),
        ({"output": None, "text": "a"}, ["a"]),
        ({"choices": None, "messages": None, "completion": "a"}, ["a"]),
    ],
)
def test_outputs_in_every_shape(tmp_path, write_lines, record, expected):
    path = write_lines(tmp_path / "a.jsonl", [record])
    assert [document.text for document in read_output_texts(path)] == expected


@pytest.mark.parametrize(
    "record",
    [
        {"output": None},
        {"output": 3},
        {"messages": [None]},
        {"messages": [{"role": "assistant", "content": None}]},
        {"messages": [{"role": "assistant", "content": 3}]},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"choices": [None]},
        {"choices": [{"turns": None}]},
        {"choices": [{"turns": ["a", None]}]},
        {"choices": [{"turns": 3}]},
        {"choices": []},
        {},
    ],
)
def test_outputs_without_an_answer_are_named(tmp_path, write_lines, record):
    path = write_lines(tmp_path / "a.jsonl", [{"output": "first"}, record])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: "):
        read_output_texts(path)


def test_answers_and_questions_in_parts(tmp_path, write_lines):
    choices = [{"turns": [PARTS, {"content": "more"}]}]
    answers = [{"question_id": 1.0, "model_id": "m", "choices": choices}, {"question_id": 2, "choices": ["text"]}]
    answers[1]["model_id"] = "m"
    found = read_answers(write_lines(tmp_path / "a.jsonl", answers))
    assert found.turns == {"1": ("An answer", "more"), "2": ("text",)}
    questions = [{"question_id": "1", "turns": None, "text": PARTS, "reference": None, "category": None}]
    (question,) = read_questions(write_lines(tmp_path / "q.jsonl", questions))
    assert (question.turns, question.references, question.category) == (("An answer",), (), None)


@pytest.mark.parametrize(
    "winner, score",
    [("model_a", 1.0), ("model_b", 0.0), ("Model_A ", 1.0)]
    + [
        (winner, 0.5)
        for winner in (
            "tie",
            "Tie",
            "tie (bothbad)",
            "tie (both good)",
            "tie (anything)",
            "both_bad",
            "bothbad",
            "draw",
        )
    ],
)
def test_winners(tmp_path, write_lines, winner, score):
    path = write_lines(tmp_path / "a.jsonl", [{"model_a": "a", "model_b": "b", "winner": winner}])
    assert read_battles(path) == [("a", "b", score)]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"model_a": "a", "model_b": "a", "winner": "tie"}, "got 'a' against itself"),
        ({"generator_1": "a", "generator_2": "a", "preference": 1}, "got 'a' against itself"),
        ({"model_a": "a", "model_b": "b", "winner": None}, "got the winner None, expected model_a, model_b or a tie"),
        ({"model_a": "a", "model_b": "b", "winner": "tied up"}, "got the winner 'tied up'"),
        ({"model_a": None, "model_b": "b", "winner": "tie"}, "got None as model_a"),
        ({"model_a": "a", "winner": "tie"}, "got None as model_b"),
        ({"generator_1": "a", "preference": 1}, "got None as generator_2"),
        ({}, "got None as model_a"),
    ],
)
def test_what_is_no_battle_is_named(tmp_path, write_lines, record, message):
    path = write_lines(tmp_path / "a.jsonl", [{"model_a": "a", "model_b": "b", "winner": "tie"}, record])
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {re.escape(message)}.*expected a battle"):
        read_battles(path)


@pytest.mark.parametrize(
    "thought",
    [
        "<think>Maybe 3 4.\n1 2</think>",
        "<think>\n1 2\n</think>\n\n",
        " <THINKING>[[A]] 1 2</THINKING>\n",
        "<think>a</think><thought>b</thought>\n",
        "The prompt opened it: [[1]]\n1 2\n</think>\n",
    ],
)
def test_thoughts_before_a_verdict_are_passed_over(thought):
    assert parse_scores(f"{thought}9 8\nThe first.") == (9.0, 8.0)
    assert parse_scores(f"{thought}The first.\n9 8", "last") == (9.0, 8.0)
    assert parse_rating(f"{thought}So [[7]]") == 7.0
    assert parse_verdict(f"{thought}So [[B]]") == (0.0, 1.0)


@pytest.mark.parametrize("text", ["<think>9 8\n", "<think>The first\n\n9 8\n[[A]] [[7]]"])
def test_a_thought_without_an_end_is_no_verdict(text):
    assert without_thoughts(text) == ""
    assert parse_scores(text) is parse_scores(text, "last") is parse_rating(text) is parse_verdict(text) is None


def test_reasons_may_speak_of_thoughts():
    text = "9 8\nAssistant 1 leaves <think> open, and Assistant 2 writes </think> twice: it is better."
    assert without_thoughts(text) == text and parse_scores(text) == (9.0, 8.0)


# For each reader: records that it reads, and what is done with them.
MODELS = {"generator_1": "a", "generator_2": "b"}
RECORDS = {
    "outputs": {"messages": [{"role": "assistant", "content": "Hi"}], "choices": [{"turns": ["a"]}], "lang": "en"},
    "texts": {"output": "a", "completion": "b", "text": "c", "response": "d", "lang": "en"},
    "questions": {"question_id": 1, "turns": ["a", "b"], "text": "c", "reference": ["d"], "category": "e"},
    "answers": {"question_id": 1, "model_id": "m", "choices": [{"turns": ["a"]}], "text": "b"},
    "instructions": {"instruction": "Do", "output": "a", "generator": "m"},
    "reviews": {"question_id": 1, "text": "9 8\nSo.", "score": [9, 8]},
    "annotations": {"preference": 1.5, "output_1": "a", "output_2": "bc", "index": 0, **MODELS},
    "battles": {"model_a": "a", "model_b": "b", "winner": "tie"},
    "judged battles": {"preference": 1.5, **MODELS},
    "trios": {"prompt": "Hi", "chosen": "a", "rejected": "b", "subset": "x"},
    "documents": {"text": "a", "lang": "en"},
}
READERS = {
    "outputs": lambda path: statistics_by_language(read_output_texts(path)),
    "texts": lambda path: statistics_by_language(read_output_texts(path)),
    "questions": read_questions,
    "answers": read_answers,
    "instructions": lambda path: (read_outputs(path), read_answers(path), read_questions(path)),
    "reviews": lambda path: [
        summarise(compare_reviews(read_reviews(path), reparse=reparse)[0], "a", "b") for reparse in (False, True)
    ],
    "annotations": lambda path: evaluate_annotations(read_annotations(path)),
    "battles": lambda path: (battles := read_battles(path)) and elo(battles),
    "judged battles": lambda path: (battles := read_battles(path)) and elo(battles),
    "trios": read_trios,
    "documents": read_documents,
}
SCALARS = st.sampled_from([None, True, 0, -1, 3, 1.5, 1e308, 10**400, "", "a", "model_a", "tie", "[[A]]"])
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "content", "turns", "type", "role", "message", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
# What is wrong with a whole file, or with records together, has no line.
OF_THE_FILE = (
    r"expected each question once|expected those of one model|against \[|got no (?:pair|battles|text|annotations)"
    r"|got \d+ annotations without"
)


@st.composite
def changed(draw, record):
    """The record with something in it replaced, or left out."""
    record = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 2))):
        place = record
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(list(keys)))
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
                break
            place = inner
        if isinstance(place, dict) and len(place) > 1 and draw(st.integers(0, 3)) == 0:
            del place[key]
        else:
            place[key] = draw(JSON)
    return record


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=60)
@given(data=st.data())
def test_no_record_raises_anything_but_an_error_with_its_file_and_line(name, data):
    good = RECORDS[name]
    records = [data.draw(st.one_of(st.just(good), changed(good), st.dictionaries(st.text(max_size=3), JSON)))]
    records += [good] * data.draw(st.integers(0, 1))
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        try:
            READERS[name](path)
        except ValueError as error:
            assert re.search(rf"a\.jsonl, line \d+: |{OF_THE_FILE}", str(error)), str(error)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=10)
@given(content=st.binary(max_size=30) | st.text(max_size=20).map(str.encode))
def test_no_file_raises_anything_but_an_error_with_its_name(name, content):
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_bytes(content)
        try:
            READERS[name](path)
        except ValueError as error:
            assert "a.jsonl" in str(error) or re.search(OF_THE_FILE, str(error))


VOTE = {"key": "k", "question_id": "1", "participant": "ann", "models": ["a", "b"], "share": 0.5}
REPORT = {
    "title": "T",
    "results": {"a": 1},
    "sections": [
        {"kind": "table", "title": "t", "columns": ["a"], "rows": [[1]], "note": ""},
        {"kind": "bar", "title": "t", "y_label": "y", "labels": ["a"], "values": [1.0], "intervals": [[0.5, 1.5]]},
        {"kind": "line", "title": "t", "x_label": "x", "y_label": "y", "lines": [{"name": "l", "points": [[0, 1]]}]},
    ],
}


@settings(max_examples=60)
@given(entries=st.lists(st.just(VOTE) | changed(VOTE), min_size=1, max_size=2), torn=st.integers(0, 9))
def test_a_file_of_votes_is_read_or_refused_by_its_name(entries, torn):
    content = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    with TemporaryDirectory() as folder:
        path = Path(folder, "votes.jsonl")
        path.write_bytes(content[: len(content) - torn])
        try:
            with Journal(path) as journal:
                count_votes(read_votes(journal, ("a", "b")))
        except ValueError as error:
            assert "votes.jsonl" in str(error)


def test_a_line_nested_too_deeply_is_damaged(tmp_path, caplog):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(VOTE) + "\n" + '{"key": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with Journal(path) as journal:
        assert list(journal.entries) == ["k"]
    assert "line 2 is damaged and left out" in caplog.text


@settings(max_examples=100)
@given(record=st.just(REPORT) | changed(REPORT))
def test_a_report_is_read_or_refused_by_its_name(record):
    with TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        path.write_text(json.dumps(record))
        try:
            render(read_report(path))
        except ValueError as error:
            assert "report.json" in str(error)


SAMPLE = {"step": 1, "prompt": "Hi", "completion": [1, 2]}


@settings(max_examples=60)
@given(sample=st.just(SAMPLE) | changed(SAMPLE))
def test_samples_of_a_run_are_read_or_refused_with_their_line(sample):
    with TemporaryDirectory() as folder:
        Path(folder, "metrics.jsonl").write_text('{"step": 1, "kl": 0.5}\n')
        Path(folder, "samples.jsonl").write_text(json.dumps(sample) + "\n")
        try:
            read_run(Path(folder))
        except ValueError as error:
            assert "samples.jsonl, line 1: " in str(error)


@pytest.mark.parametrize("line", ["{", "[1]", "3", "[" * 100_000, "\ufffe"])
def test_a_broken_line_of_metrics_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(tmp_path / "metrics.jsonl")
