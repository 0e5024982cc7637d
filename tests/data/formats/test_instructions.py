"""Rows of a question and its answer: every naming of them, histories and contexts, and back."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.data.formats.conversation_records import parse_conversation
from palm_rlhf.data.formats.conversation_writers import to_instructions, to_sharegpt
from palm_rlhf.data.formats.instructions import is_instruction


def talk(*contents, system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize(
    "record, messages",
    [
        ({"instruction": "Add.", "input": "2 and 3", "output": "5"}, talk("Add.\n2 and 3", "5")),
        ({"instruction": "Say hi.", "input": "", "output": "Hi"}, talk("Say hi.", "Hi")),
        ({"instruction": "Say hi.", "context": None, "response": "Hi", "category": "open_qa"}, talk("Say hi.", "Hi")),
        ({"input": "Why?", "output": "So."}, talk("Why?", "So.")),
        ({"prompt": "Why?", "completion": "So.", "label": True}, talk("Why?", "So.")),
        (
            {"id": "flan.1", "system_prompt": "Be brief.", "question": "Why?", "response": "So."},
            talk("Why?", "So.", system="Be brief."),
        ),
        (
            {"instruction": "And now?", "output": "Later.", "system": "Be brief.", "history": [["Hi", "Ho"]]},
            talk("Hi", "Ho", "And now?", "Later.", system="Be brief."),
        ),
        ({"prompt": talk("Hi"), "completion": talk("Hi", "Ho")[1:]}, talk("Hi", "Ho")),
        ({"messages": talk("Hi"), "response": "Ho"}, talk("Hi", "Ho")),
        ({"messages": talk("Hi", "Ho"), "prompt": "And?", "response": "So."}, talk("Hi", "Ho", "And?", "So.")),
        ({"prompt": "Hi", "messages": talk("Hi", "Ho")}, talk("Hi", "Ho")),  # as in UltraChat
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Ho"}, talk("Hi", "Ho")),
        (
            {
                "instruction": "Add.",
                "input": "2 and 3",
                "output": "5",
                "text": "Below is a task.\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n5",
            },
            talk("Add.\n2 and 3", "5"),
        ),
    ],
)
def test_every_row_is_a_conversation(record, messages):
    assert parse_conversation(record)["messages"] == messages


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"instruction": "Add.", "output": ""}, "no answer"),
        ({"instruction": " ", "output": "5"}, "no question"),
        ({"instruction": "Add.", "question": "Why?", "output": "5"}, "two prompts, 'question' and 'instruction'"),
        ({"instruction": "Add.", "output": "5", "answer": "6"}, "two answers, 'output' and 'answer'"),
        ({"instruction": "Add.", "output": "5", "hint": "Use your fingers."}, "unknown field 'hint'"),
        ({"task": "Put it into French.", "input": "Hi", "output": "Salut"}, "unknown field 'task'"),
        ({"title": "Of cats", "question": "Why?", "answer": "So."}, "unknown field 'title'"),
        ({"character_name": "Sherlock Holmes", "question": "Why?", "answer": "So."}, "unknown field 'character_name'"),
        ({"question": "Why?", "answer": "So.", "explanation": "Because."}, "unknown field 'explanation'"),
        ({"instruction": "Add.", "output": 5}, "malformed message"),
        ({"instruction": "Add.", "output": "5", "history": "We talked."}, "unknown field 'history'"),
        ({"instruction": "Add.", "output": "5", "history": [["Hi"]]}, "malformed history"),
        ({"system": "A b", "system_prompt": "C d", "question": "Why?", "answer": "So."}, "two system prompts"),
        ({"system": "A b", "messages": talk("Hi", "Ho", system="C d")}, "two system prompts"),
        ({"messages": talk("Hi", "Ho"), "conversations": talk("Hi", "Hm")},
         "two conversations, 'conversations' and 'messages'"),
        ({"messages": talk("Hi", "Ho"), "response": "Hm"}, "unknown field 'response'"),
        ({"prompt": "Hi", "completion": "Go away.", "label": False}, "answer labelled as bad"),
        ({"messages": talk("Hi", "Ho"), "instruction": "Answer in French."}, "unknown field 'instruction'"),
        ({"messages": talk("Hi", "Ho"), "user": "u-123"}, "unknown field 'user'"),
    ],
)  # fmt: skip
def test_what_is_no_row_says_why(record, reason):
    with pytest.raises(ValueError) as error:
        parse_conversation(record)
    assert str(error.value) == reason


def test_a_question_alone_is_no_row():
    assert is_instruction({"question": "Why?", "answer": None})
    assert not is_instruction({"question_id": 1, "text": "Why?"}) and not is_instruction({"output": "So."})


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@given(exchanges=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), system=st.none() | TEXTS)
def test_what_is_written_is_read_back(exchanges, system):
    messages = talk(*(text for exchange in exchanges for text in exchange), system=system and system.strip())
    conversation = {"messages": messages}
    for written in (*to_instructions([conversation]), *to_sharegpt([conversation])):
        assert parse_conversation(json.loads(json.dumps(written))) == conversation


def test_what_only_messages_can_hold_is_counted():
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    conversations = [
        {"messages": [*talk("Hi"), {"role": "assistant", "content": "", "tool_calls": calls}]},
        {"messages": talk("Hi", "Ho"), "tools": [{"type": "function"}]},
        {"messages": [*talk("Hi"), {"role": "assistant", "content": "Ho", "weight": 0.5}]},
        {"messages": [{**talk("Hi")[0], "weight": 0.0}, {"role": "assistant", "content": "Ho", "weight": 1.0}]},
    ]
    for write in (to_instructions, to_sharegpt):
        rejected = Counter()
        assert len(list(write(conversations, rejected=rejected))) == 1
        assert rejected == {"calls of tools": 2, "weights of messages": 1}
