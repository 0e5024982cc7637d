"""Every form of a labelled reply says the same: this reply to this prompt is wanted, or it is not."""

import json
from collections import Counter

import pytest

from palm_rlhf.data.preferences.unpaired_files import parse_unpaired, read_unpaired, unpaired_of


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


PROMPT, REPLY = [user("Is it blue?"), assistant("What?"), user("The sky.")], "Yes, it is."
DIALOGUE = "\n\nHuman: Is it blue?\n\nAssistant: What?\n\nHuman: The sky.\n\nAssistant:"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": PROMPT, "completion": REPLY, "label": True},
        {"prompt": PROMPT, "completion": [assistant(REPLY)], "label": True},
        {"prompt": DIALOGUE, "completion": REPLY, "label": True},
        {"prompt": PROMPT, "completion": REPLY, "label": 1},
        {"prompt": PROMPT, "completion": REPLY, "label": "True"},
        {"messages": [*PROMPT, assistant(REPLY)], "label": True},
        {"conversations": [{"from": "human", "value": "Is it blue?"}, {"from": "gpt", "value": "What?"},
                           {"from": "human", "value": "The sky."}, {"from": "gpt", "value": REPLY}], "label": True},
        {"prompt": PROMPT, "completion": REPLY, "label": True, "id": "7", "source": "people"},
    ],
)  # fmt: skip
def test_every_form_says_the_same(record):
    assert parse_unpaired(record) == {"prompt": PROMPT, "completion": REPLY, "label": True}
    for label in (False, 0, "false"):
        assert parse_unpaired({**record, "label": label}) == {"prompt": PROMPT, "completion": REPLY, "label": False}


def test_a_system_prompt_and_the_instruction_of_a_row_are_the_prompt():
    row = {"system": "Be brief.", "instruction": "Add.", "input": "2, 3", "output": "5", "label": False}
    prompt = [{"role": "system", "content": "Be brief."}, user("Add.\n2, 3")]
    assert parse_unpaired(row) == {"prompt": prompt, "completion": "5", "label": False}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"label": None}, "no label"),
        ({"label": 2}, "no label"),
        ({"label": "good"}, "no label"),
        ({"label": 0.5}, "no label"),
        ({"completion": "  "}, "blank replies"),
        ({"completion": ""}, "no answer"),
        ({"prompt": ""}, "no question"),
        ({"prompt": [user("Hi"), user("Ho")]}, "roles do not alternate"),
        ({"completion": [user("Hi")]}, "no reply of the assistant"),
        ({"background": "It was dark."}, "unknown field 'background'"),
        ({"tools": [{"name": "f"}]}, "calls of tools"),
        ({"answer": "No."}, "two answers, 'answer' and 'completion'"),
    ],
)
def test_what_is_no_labelled_reply_is_counted_by_its_reason(tmp_path, change, reason):
    record = {"prompt": PROMPT, "completion": REPLY, "label": True}
    path, rejected = tmp_path / "in.jsonl", Counter()
    path.write_text(json.dumps(record) + "\n" + json.dumps({**record, **change}) + "\n")
    assert list(read_unpaired(path, rejected=rejected)) == [record]
    assert rejected == {reason: 1}


def test_a_file_of_something_else_is_an_error(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "Hi", "label": true}\n')
    with pytest.raises(
        ValueError, match=r"line 1: got a record with the keys \['label', 'text'\], expected a labelled"
    ):
        list(read_unpaired(tmp_path / "in.jsonl"))


def test_the_best_reply_of_a_ranking_is_wanted_and_the_worst_is_not():
    replies = list(unpaired_of({"prompt": PROMPT, "responses": ["Yes", "Maybe", "No"]}))
    assert [(reply["completion"], reply["label"]) for reply in replies] == [("Yes", True), ("No", False)]
    assert all(reply["prompt"] == PROMPT for reply in replies)
