"""One message is the same in every shape that files give it, and what is no text is refused by its name."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.data.formats.messages import content_text, one_system, parse_turn

CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}
CALLS = [{"type": "function", "function": CALL}]


@pytest.mark.parametrize(
    "turn, expected",
    [
        ({"from": "human", "value": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"role": "prompter", "text": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"role": "Assistant", "content": "Hi", "value": None}, {"role": "assistant", "content": "Hi"}),
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        (
            {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "input_text", "text": "there"}]},
            {"role": "user", "content": "Hi there"},
        ),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "Hi", "annotations": []}]},
         {"role": "assistant", "content": "Hi"}),
        ({"role": "user", "content": ["Hi", " there"]}, {"role": "user", "content": "Hi there"}),
        ({"role": "user", "content": {"type": "text", "text": "Hi"}}, {"role": "user", "content": "Hi"}),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALLS[0]}]},
        ),
        ({"role": "assistant", "content": "So:", "tool_calls": [{"function": {"name": "f", "arguments": {"é": 1}}}]},
         {"role": "assistant", "content": "So:",
          "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"é": 1}'}}]}),
        ({"role": "assistant", "content": None, "function_call": CALL},
         {"role": "assistant", "content": "", "tool_calls": CALLS}),
        ({"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
         {"role": "assistant", "content": "", "tool_calls": CALLS}),
        ({"from": "observation", "value": "Rain"}, {"role": "tool", "content": "Rain"}),
        ({"role": "tool", "tool_call_id": "1", "name": "weather", "content": "Rain"},
         {"role": "tool", "content": "Rain", "tool_call_id": "1", "name": "weather"}),
        ({"role": "user", "content": "Hi", "weight": 0, "timestamp": "1 May", "toxic": False, "turn": 3},
         {"role": "user", "content": "Hi", "weight": 0}),
    ],
)  # fmt: skip
def test_every_shape_is_a_message(turn, expected):
    assert parse_turn(turn) == expected
    assert parse_turn(expected) == expected


@pytest.mark.parametrize(
    "turn, reason",
    [
        ("Hi", "malformed message"),
        ({"role": "user"}, "malformed message"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "malformed message"),
        ({"role": "user", "content": 3}, "malformed message"),
        ({"role": "user", "content": [{"type": "text"}]}, "malformed message"),
        ({"content": "Hi"}, "unknown role"),
        ({"role": "narrator", "content": "Hi"}, "unknown role 'narrator'"),
        ({"role": "user", "from": "gpt", "content": "Hi"}, "two roles in a message"),
        ({"role": "user", "content": "Hi", "value": "Ho"}, "two texts in a message"),
        ({"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {}}]},
         "content part 'image_url'"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "content part 'input_audio'"),
        ({"role": "assistant", "content": "4", "reasoning_content": "2 and 2 are 4"},
         "unknown field 'reasoning_content'"),
        ({"role": "user", "content": "Hi", "tool_calls": CALLS}, "tool calls of another than the assistant"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}, "malformed tool call"),
        ({"role": "assistant", "content": None, "tool_calls": "f()"}, "malformed tool call"),
        ({"from": "function_call", "value": "weather(Oslo)"}, "malformed tool call"),
    ],
)  # fmt: skip
def test_what_is_no_message_says_why(turn, reason):
    with pytest.raises(ValueError) as error:
        parse_turn(turn)
    assert str(error.value) == reason


def test_fields_are_ignored_when_asked_and_labels_are_counted():
    turn = {"role": "user", "content": "Hi", "mood": "gloomy", "note": "said in haste"}
    with pytest.raises(ValueError, match="unknown field 'note'"):
        parse_turn(turn)
    mended = Counter()
    assert parse_turn(turn, ignored=("note",), mended=mended) == {"role": "user", "content": "Hi"}
    assert mended == {"field 'mood' left out": 1}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), min_size=1, max_size=4))
def test_parts_are_their_texts_in_a_row(texts):
    assert content_text([{"type": "text", "text": text} for text in texts]) == content_text(texts) == "".join(texts)


def test_the_messages_of_system_and_developer_become_one():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}]
    user = {"role": "user", "content": "Hi"}
    assert one_system([*messages, user]) == [{"role": "system", "content": "Be brief.\n\nBe kind."}, user]
    assert one_system([user]) == [user] and one_system([]) == []
