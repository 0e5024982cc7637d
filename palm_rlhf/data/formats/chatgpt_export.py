"""Conversations as ChatGPT exports them (`conversations.json`): trees of messages, each with a current branch."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.formats.messages import ROLE_OF, Turn, one_system
from palm_rlhf.data.formats.record_fields import shown_name

# Content types of the model's reasoning, which is no part of its reply.
REASONING = ("thoughts", "reasoning_recap")
INSTRUCTIONS = ("user_profile", "user_instructions", "model_set_context")
TO_ALL = (None, "", "all")


@beartype
def is_chatgpt(record: Record) -> bool:
    """Return whether a record is a conversation of ChatGPT's export, with its messages in a `mapping` of nodes."""
    mapping = record.get("mapping")
    return isinstance(mapping, dict) and all(isinstance(node, dict) for node in mapping.values())


@beartype
def parse_chatgpt(record: Record, *, mended: Counter[str] | None = None) -> Record:
    """Return the conversation on the current branch, from the root to `current_node`.

    Custom instructions and messages of the system make the system message. A message of the assistant to a tool is a
    call, with its text as the arguments. Messages on other branches and the model's reasoning are left out and counted
    in `mended`.

    Raises ValueError with the reason if there is no conversation, or if content is not text, such as an image.
    """
    nodes = _branch(record)
    messages: list[Turn] = []
    left_out: Counter[str] = Counter()
    for node in nodes:
        for turn in _turns(node.get("message"), left_out):
            if messages and _is_call(turn) and messages[-1]["role"] == "assistant" and not _is_call(messages[-1]):
                turn = {**turn, "content": messages.pop()["content"]}
            messages.append(turn)
    head = [turn for turn in messages if turn["role"] == "system"]
    messages = one_system(head + [turn for turn in messages if turn["role"] != "system"])
    if not messages:
        raise ValueError("no conversation")
    if mended is not None:
        on_branch = {id(node) for node in nodes}
        others = [node for node in record["mapping"].values() if id(node) not in on_branch and _has_text(node)]
        left_out["messages of other branches left out"] = len(others)
        mended.update(+left_out)
    conversation: Record = {"messages": messages}
    if isinstance(identity := record.get("conversation_id", record.get("id")), str):
        conversation["id"] = identity
    models = [_metadata(node).get("model_slug") for node in nodes] + [record.get("default_model_slug")]
    if model := next((model for model in models if isinstance(model, str) and model), None):
        conversation["model"] = model
    return conversation


def _branch(record: Record) -> list[dict[str, Any]]:
    """Return the nodes from the root to the current one, or to the last node without children."""
    mapping = record["mapping"]
    last = record.get("current_node")
    if last not in mapping:
        last = next((name for name in reversed(mapping) if not mapping[name].get("children")), None)
    branch: list[dict[str, Any]] = []
    seen = set()
    while isinstance(last, str) and last in mapping:
        if last in seen:
            raise ValueError("cycle")
        seen.add(last)
        branch.append(mapping[last])
        last = mapping[last].get("parent")
    return branch[::-1]


def _turns(message: Any, left_out: Counter[str]) -> Iterator[Turn]:
    """Yield the message of a node, unless it is empty."""
    if message is None:
        return
    if not isinstance(message, dict) or not isinstance(message.get("content"), dict):
        raise ValueError("malformed message")
    author = message.get("author")
    author = author if isinstance(author, dict) else {}
    speaker = author.get("role")
    role = ROLE_OF.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"unknown role {shown_name(speaker)}")
    content = message["content"]
    kind = content.get("content_type")
    if kind in REASONING:
        left_out["reasoning left out"] += 1
        return
    text = _text(content)
    if not text.strip():
        return
    if "editable_context" in str(kind):
        yield {"role": "system", "content": text}
    elif role == "assistant" and message.get("recipient") not in TO_ALL:
        function = {"name": str(message["recipient"]), "arguments": text}
        yield {"role": role, "content": "", "tool_calls": [{"type": "function", "function": function}]}
    elif role == "tool" and isinstance(author.get("name"), str):
        yield {"role": role, "content": text, "name": author["name"]}
    else:
        yield {"role": role, "content": text}


def _text(content: dict[str, Any]) -> str:
    kind = content.get("content_type")
    if "editable_context" in str(kind):
        return "\n\n".join(content[key].strip() for key in INSTRUCTIONS if isinstance(content.get(key), str))
    if "parts" not in content:
        texts = [content.get(key) for key in ("text", "result") if content.get(key) is not None]
        if not texts or not isinstance(texts[0], str):
            raise ValueError(f"content part {shown_name(kind)}")
        return texts[0]
    parts = content["parts"] if isinstance(content["parts"], list) else [content["parts"]]
    parts = [part.get("text") if _is_speech(part) else part for part in parts]
    for part in parts:
        if not isinstance(part, str):
            kind = part.get("content_type", part.get("type")) if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"content part {shown_name(kind)}")
    return "".join(parts)


def _is_speech(part: Any) -> bool:
    return isinstance(part, dict) and part.get("content_type") == "audio_transcription"


def _is_call(turn: Turn) -> bool:
    return "tool_calls" in turn


def _metadata(node: dict[str, Any]) -> dict[str, Any]:
    message = node.get("message")
    metadata = message.get("metadata") if isinstance(message, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _has_text(node: dict[str, Any]) -> bool:
    try:
        return any(True for _ in _turns(node.get("message"), Counter()))
    except ValueError:
        return True
