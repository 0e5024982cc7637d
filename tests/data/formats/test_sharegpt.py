"""ShareGPT's exports, as JSON and as web pages, and conversations in the form of the ecosystem."""

import gzip
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.formats.conversation_files import read_conversations
from palm_rlhf.data.formats.conversation_records import parse_conversation
from palm_rlhf.data.formats.saved_pages import parse_page

EXPORT = {
    "id": "abc",
    "model": "GPT-4",
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
}
PARSED = {
    "id": "abc",
    "model": "GPT-4",
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
}

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
EXPORTS = st.fixed_dictionaries(
    {"conversations": st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": TEXTS}))},
    optional={"id": TEXTS, "model": TEXTS, "views": st.integers()},
)


def test_every_name_of_a_turn_means_the_same():
    items = {**EXPORT, "items": EXPORT["conversations"]}
    del items["conversations"]
    assert parse_conversation(EXPORT) == parse_conversation(items) == parse_conversation(PARSED) == PARSED


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("turns", ["conversations", "items", "messages", "conversation"])
def test_a_system_prompt_beside_the_turns_comes_first(key, turns):
    record = {turns: EXPORT["conversations"], key: "Answer in French.", "condition": "GPT4"}
    system = {"role": "system", "content": "Answer in French."}
    expected = {"messages": [system, *PARSED["messages"]], "condition": "GPT4"}
    assert parse_conversation(record) == expected
    assert parse_conversation({**record, turns: [{"from": "system", "value": ""}, *record[turns]]}) == expected
    assert parse_conversation({**record, turns: [system, *record[turns]]}) == expected
    with pytest.raises(ValueError, match=r"^two system prompts$"):
        parse_conversation({**record, turns: [{"from": "system", "value": "In English."}, *record[turns]]})
    assert parse_conversation({**record, key: " "})["messages"] == PARSED["messages"]


def test_what_stands_beside_the_turns_is_never_dropped_unsaid():
    with pytest.raises(ValueError, match=r"^unknown field 'background'$"):
        parse_conversation({**EXPORT, "background": "The user is a child."})
    with pytest.raises(ValueError, match=r"^unknown field 'chosen'$"):
        parse_conversation({**EXPORT, "chosen": {"from": "gpt", "value": "Red."}})
    mended = Counter()
    record = {**EXPORT, "background": "The user is a child.", "bucket": "b2", "source": "a forum", "title": "Of it"}
    assert parse_conversation(record, ignored=("background",), mended=mended) == PARSED
    assert mended == {"field 'bucket' left out": 1}


TOOL = {"name": "weather", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    "beside",
    [
        {"tools": [{"type": "function", "function": TOOL}]},
        {"tools": json.dumps([TOOL])},
        {"functions": [TOOL]},
    ],
)
def test_tools_beside_the_turns_are_kept(beside):
    tools = [{"type": "function", "function": TOOL}]
    assert parse_conversation({**EXPORT, **beside}) == {**PARSED, "tools": tools}
    for broken in ("[", "3", ["weather"]):
        with pytest.raises(ValueError, match=r"^malformed tools$"):
            parse_conversation({**EXPORT, "tools": broken})


@settings(max_examples=30)
@given(records=st.lists(EXPORTS, max_size=5))
def test_lines_arrays_and_gzip_hold_the_same_conversations(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("forms")
    lines = "\n".join(map(json.dumps, records))
    forms = {
        "lines.jsonl": lines.encode(),
        "array.json": json.dumps(records).encode(),
        "pretty.json": json.dumps(records, indent=2, ensure_ascii=False).encode(),
        "packed": gzip.compress(lines.encode()),
    }
    roles = {"human": "user", "gpt": "assistant"}
    expected = [
        {
            "messages": [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]],
            **{key: record[key] for key in ("id", "model") if key in record},
        }
        for record in records
    ]
    for name, content in forms.items():
        (folder / name).write_bytes(content)
        assert list(read_conversations(folder / name)) == expected, name


def test_the_real_file_is_read_whole(shared_data):
    path = shared_data("sharegpt_dummy_conversation.json")
    exports = json.loads(path.read_text(encoding="utf-8"))
    rejected = Counter()
    found = list(read_conversations(path, rejected=rejected))
    assert len(found) == len(exports) == 500 and not rejected
    for conversation, export in zip(found, exports):
        assert conversation["id"] == export["id"]
        assert [m["content"] for m in conversation["messages"]] == [t["value"] for t in export["conversations"]]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"id": 1}, "no conversation"),
        ({"conversations": "Hi"}, "no conversation"),
        ({"conversations": ["Hi"]}, "malformed message"),
        ({"conversations": [{"from": "human"}]}, "malformed message"),
        ({"conversations": [{"from": "human", "value": None}]}, "malformed message"),
        ({"conversations": [{"from": "martian", "value": "Hi"}]}, "unknown role 'martian'"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": "Hi", "weight": "much"}]}, "malformed message"),
        ({"messages": [{"role": "user", "content": "Hi", "weight": -1}]}, "malformed message"),
    ],
)
def test_what_is_no_conversation_is_counted_by_its_reason(tmp_path, record, reason):
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, [EXPORT, record, EXPORT])))
    rejected = Counter()
    assert list(read_conversations(path, rejected=rejected)) == [PARSED, PARSED]
    assert rejected == {reason: 1}


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "Why?"}\n')
    with pytest.raises(ValueError, match=r"line 1: got a record with the keys \['question'\], expected a conversation"):
        list(read_conversations(path))


def test_a_broken_line_is_named_and_skipped_only_when_asked(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(f"{json.dumps(EXPORT)}\n{{\n{json.dumps(EXPORT)}\n")
    with pytest.raises(ValueError, match="line 2: broken JSON"):
        list(read_conversations(path))
    rejected = Counter()
    assert list(read_conversations(path, skip_broken=True, rejected=rejected)) == [PARSED, PARSED]
    assert rejected == {"broken JSON": 1}


def page_of(content):
    data = json.dumps({"props": {"pageProps": {"content": content}}})
    script = f'<script id="__NEXT_DATA__" type="application/json">{data}</script>'
    return f"<!DOCTYPE html><html><body><p>chrome</p>{script}</body></html>"


CHAT_PAGE = """
<html><body><nav>New chat</nav>
<div data-message-author-role="user"><div class="whitespace-pre-wrap">Is a &lt; b?</div></div>
<div data-message-author-role="assistant" data-message-model-slug="gpt-4"><div>Copy</div>
<div class="markdown prose"><p>It <em>is</em>.</p></div></div></body></html>
"""


def test_a_page_of_sharegpt_holds_its_conversation(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("\ufeff" + page_of({"model": "GPT-4", "id": "abc", "items": EXPORT["conversations"]}))
    assert list(read_conversations(path)) == [PARSED]


def test_a_saved_chat_holds_its_conversation():
    assert parse_page(CHAT_PAGE) == {
        "model": "gpt-4",
        "messages": [
            {"role": "user", "content": "Is a < b?"},
            {"role": "assistant", "content": '<div class="markdown prose"><p>It <em>is</em>.</p></div>'},
        ],
    }


@pytest.mark.parametrize(
    "page, message",
    [
        (b"<html><body>News</body></html>", "a web page without a conversation"),
        (page_of({"title": "x"}).encode(), "holds no conversation"),
        (page_of({"items": [{"from": "gpt", "value": "\ud800"}]}).encode(), "holds no conversation"),
        (b'<script id="__NEXT_DATA__">[[[</script>', "holds no conversation"),
        (b"<html>\xff</html>", "byte 7 is not UTF-8"),
    ],
)
def test_a_page_without_a_conversation_is_an_error_or_counted(tmp_path, page, message):
    path = tmp_path / "page.html"
    path.write_bytes(page)
    with pytest.raises(ValueError, match=message):
        list(read_conversations(path))
    rejected = Counter()
    assert list(read_conversations(path, skip_broken=True, rejected=rejected)) == []
    assert rejected == {"page without a conversation": 1}


def test_a_page_that_never_ends_is_refused(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<p>" * 100)
    with pytest.raises(ValueError, match="a web page of more than 200 bytes"):
        list(read_conversations(path, max_record_bytes=200))


NAMES = ["messages", "conversations", "system", "prompt", "instruction", "input", "output", "response", "history", "id"]
NAMES += ["mapping", "current_node", "tools", "text", "weather", "model"]
TURNS = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "tool_calls", "weight", "name", "note"]),
        st.sampled_from(
            ["user", "assistant", "tool", "gpt", "Hi you", "", None, 1, [], {}, [{"type": "text", "text": "a"}]]
        ),
        max_size=4,
    ),
    max_size=3,
)
ANY = st.recursive(
    st.none() | st.integers(-2, 2) | st.sampled_from(["", "Hi", "Hi you"]) | TURNS, st.lists, max_leaves=3
)


@settings(deadline=None, max_examples=200)
@given(record=st.dictionaries(st.sampled_from(NAMES), ANY), prompts=st.booleans())
def test_any_record_is_a_conversation_or_has_a_reason(record, prompts):
    try:
        conversation = parse_conversation(record, prompts=prompts)
    except ValueError as error:
        assert len(str(error)) < 60  # a name to count under, not a message of Python's
        return
    for message in conversation["messages"]:
        assert message["role"] in ("system", "user", "assistant", "tool") and isinstance(message["content"], str)
    assert parse_conversation({**conversation, "id": 3}) == {**conversation, "id": 3}
