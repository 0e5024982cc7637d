"""ChatGPT's conversations.json: the branch that was current, with its custom instructions and calls of tools."""

import json
from collections import Counter

import pytest

from palm_rlhf.data.formats.chatgpt_export import is_chatgpt, parse_chatgpt
from palm_rlhf.data.formats.conversation_files import read_conversations


def node(parent, message, *children):
    return {"parent": parent, "message": message, "children": list(children)}


def message(role, *parts, kind="text", recipient="all", name=None, model=None, **content):
    content = {"content_type": kind, **({"parts": list(parts)} if parts else {}), **content}
    metadata = {"model_slug": model} if model else {}
    return {"author": {"role": role, "name": name}, "content": content, "recipient": recipient, "metadata": metadata}


EXPORT = {
    "title": "The weather in Oslo",
    "create_time": 1.5,
    "conversation_id": "c1",
    "current_node": "last",
    "mapping": {
        "root": node(None, None, "system"),
        "system": node("root", message("system", ""), "custom"),
        "custom": node(
            "system",
            message(
                "user", kind="user_editable_context", user_profile="I live in Oslo.", user_instructions="Be brief."
            ),
            "old",
            "new",
        ),
        "old": node("custom", message("user", "How is the wether?"), "old reply"),
        "old reply": node("old", message("assistant", "What is wether?")),
        "new": node("custom", message("user", "How is the weather?"), "thoughts"),
        "thoughts": node("new", message("assistant", kind="thoughts", thoughts=[{"content": "Hm."}]), "call"),
        "call": node(
            "thoughts", message("assistant", kind="code", text='{"city": "Oslo"}', recipient="weather"), "tool"
        ),
        "tool": node("call", message("tool", "Rain", name="weather"), "last"),
        "last": node("tool", message("assistant", "It ", "rains.", model="gpt-4o")),
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
PARSED = {
    "messages": [
        {"role": "system", "content": "I live in Oslo.\n\nBe brief."},
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "Rain", "name": "weather"},
        {"role": "assistant", "content": "It rains."},
    ],
    "id": "c1",
    "model": "gpt-4o",
}


def test_the_current_branch_is_the_conversation_and_the_others_are_counted():
    assert is_chatgpt(EXPORT)
    mended = Counter()
    assert parse_chatgpt(EXPORT, mended=mended) == PARSED
    assert mended == {"messages of other branches left out": 2, "reasoning left out": 1}
    other = parse_chatgpt({**EXPORT, "current_node": "old reply"})
    assert [turn["content"] for turn in other["messages"][1:]] == ["How is the wether?", "What is wether?"]


def test_without_a_current_node_the_last_message_tells_the_branch():
    assert parse_chatgpt({key: value for key, value in EXPORT.items() if key != "current_node"}) == PARSED


def test_a_file_of_them_is_read_and_the_rest_is_counted(tmp_path):
    image = {"content_type": "image_asset_pointer", "asset_pointer": "file-service://1"}
    seen = message("user", image, "What is this?", kind="multimodal_text")
    heard = message("user", {"content_type": "audio_transcription", "text": "Hi"}, kind="multimodal_text")
    others = [
        {"mapping": {"a": node(None, seen)}, "current_node": "a"},
        {"mapping": {}, "current_node": None},
        {"mapping": {"a": node("b", heard), "b": node("a", heard)}, "current_node": "a"},
        {"mapping": {"a": node(None, message("user", kind="canvas"))}, "current_node": "a"},
    ]
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps([EXPORT, *others, {"mapping": {"a": node(None, heard)}, "current_node": "a"}]))
    rejected = Counter()
    found = list(read_conversations(path, rejected=rejected))
    assert found == [PARSED, {"messages": [{"role": "user", "content": "Hi"}]}]
    assert rejected == {
        "content part 'image_asset_pointer'": 1,
        "no conversation": 1,
        "cycle": 1,
        "content part 'canvas'": 1,
    }


@pytest.mark.parametrize(
    "broken, reason",
    [
        ({"author": {"role": "user"}, "content": "Hi"}, "malformed message"),
        ({"author": {"role": "martian"}, "content": {"parts": ["Hi"]}}, "unknown role 'martian'"),
        ({"author": None, "content": {"parts": ["Hi"]}}, "unknown role None"),
        ({"author": {"role": "user"}, "content": {"parts": [3]}}, "content part 'int'"),
    ],
)
def test_a_message_of_another_shape_says_why(broken, reason):
    with pytest.raises(ValueError) as error:
        parse_chatgpt({"mapping": {"a": node(None, broken)}, "current_node": "a"})
    assert str(error.value) == reason


def test_words_before_a_call_belong_to_it():
    mapping = {
        "a": node(None, message("user", "Weather?")),
        "b": node("a", message("assistant", "I look.")),
        "c": node("b", message("assistant", kind="code", text="Oslo", recipient="weather")),
    }
    call = {"type": "function", "function": {"name": "weather", "arguments": "Oslo"}}
    assert parse_chatgpt({"mapping": mapping, "current_node": "c"})["messages"] == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
    ]
