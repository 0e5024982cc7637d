"""One message of a conversation in the forms that files have: names of roles, parts of content, calls of tools."""

import json
from collections import Counter
from collections.abc import Collection
from typing import Any

from beartype import beartype

from palm_rlhf.data.formats.record_fields import check_fields, shown_name

Turn = dict[str, Any]
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "bot", "model"),
    "tool": ("tool", "function", "observation", "ipython"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
CALLER = "function_call"  # the role of the assistant in some files when it calls a tool
SPEAKERS, TEXTS = ("from", "role"), ("value", "content", "text")
OF_TOOLS = ("tool_call_id", "name")
KNOWN = {*SPEAKERS, *TEXTS, *OF_TOOLS, "weight", "tool_calls", "function_call"}
TEXT_PARTS = (None, "text", "input_text", "output_text")


@beartype
def parse_turn(turn: Any, *, ignored: Collection[str] = (), mended: Counter[str] | None = None) -> Turn:
    """Return a message `{"role", "content"}` of the system, the user, the assistant or a tool.

    The role is in `from` or `role` (`human`, `gpt`, `developer`, `observation`, ...). The content is in `value`,
    `content` or `text`: a string, or a list of OpenAI's parts, all of them text. A message may have a `weight`, and a
    message of the assistant `tool_calls`, with or without a text. Results of tools keep their `tool_call_id` and
    `name`. Other fields are subject to `check_fields`.

    Raises ValueError with the reason if it is no such message.
    """
    if not isinstance(turn, dict):
        raise ValueError("malformed message")
    role, calls = _role(turn), _calls(turn)
    texts = [content_text(turn[key]) for key in TEXTS if turn.get(key) is not None]
    if len(set(texts)) > 1:
        raise ValueError("two texts in a message")
    if not texts and not calls:
        raise ValueError("malformed message")
    message: Turn = {"role": role, "content": texts[0] if texts else ""}
    if _speaker(turn) == CALLER:
        calls, message["content"] = [_call(_json(message["content"]))], ""
    if calls:
        if role != "assistant":
            raise ValueError("tool calls of another than the assistant")
        message["tool_calls"] = calls
    if role == "tool":
        message.update({key: turn[key] for key in OF_TOOLS if isinstance(turn.get(key), str)})
    if (weight := turn.get("weight")) is not None:
        if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
            raise ValueError("malformed message")
        message["weight"] = weight
    check_fields(turn, KNOWN, [message["content"]], ignored=ignored, mended=mended)
    return message


@beartype
def content_text(content: Any) -> str:
    """Return the text of a message's content: a string, or parts joined.

    Raises ValueError if a part is no text, with the type of the part.
    """
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list):
        raise ValueError("malformed message")
    texts = []
    for part in parts:
        if isinstance(part, dict):
            if (kind := part.get("type")) not in TEXT_PARTS:
                raise ValueError(f"content part {shown_name(kind)}")
            part = part.get("text")
        if not isinstance(part, str):
            raise ValueError("malformed message")
        texts.append(part)
    return "".join(texts)


def one_system(messages: list[Turn]) -> list[Turn]:
    """Return the messages with the system and developer messages at their start joined into one."""
    count = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return messages
    contents = (message["content"].strip() for message in messages[:count])
    return [{"role": "system", "content": "\n\n".join(filter(None, contents))}, *messages[count:]]


def _speaker(turn: Turn) -> Any:
    found = [turn[key] for key in SPEAKERS if turn.get(key) is not None]
    if any(other != found[0] for other in found):
        raise ValueError("two roles in a message")
    return found[0].strip().lower() if found and isinstance(found[0], str) else None


def _role(turn: Turn) -> str:
    speaker = _speaker(turn)
    role = "assistant" if speaker == CALLER else ROLE_OF.get(speaker)
    if role is None:
        raise ValueError("unknown role" if speaker is None else f"unknown role {shown_name(speaker)}")
    return role


def _calls(turn: Turn) -> list[Turn]:
    calls = turn.get("tool_calls")
    if turn.get("function_call") is not None:  # the older form of OpenAI
        calls = [*(calls or []), turn["function_call"]]
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise ValueError("malformed tool call")
    return [_call(call) for call in calls]


def _call(call: Any) -> Turn:
    """Return a call in the form of OpenAI, with its arguments as JSON in a string."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("malformed tool call")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str | dict):
        raise ValueError("malformed tool call")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("malformed tool call") from error
