"""Records of conversations in any of the known formats, read as messages."""

import json
from collections import Counter
from collections.abc import Collection
from typing import Any

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.formats.chatgpt_export import is_chatgpt, parse_chatgpt
from palm_rlhf.data.formats.instructions import ANSWERS, is_instruction, is_prompt, parse_answer
from palm_rlhf.data.formats.prompt_fields import FIELDS, parse_opening
from palm_rlhf.data.formats.record_fields import check_fields, unknown_field

KEPT = ("id", "model", "condition")
TOOLS = ("tools", "functions")
KNOWN = {*FIELDS, *ANSWERS, *TOOLS, *KEPT}


@beartype
def is_sharegpt(record: Record) -> bool:
    """Whether a record has turns as ShareGPT names them, `conversations` (or `items`)."""
    return any(isinstance(record.get(key), list) for key in ("conversations", "items"))


@beartype
def is_messages(record: Record) -> bool:
    """Whether a record has turns as the ecosystem names them, `messages` (or `conversation`)."""
    return any(isinstance(record.get(key), list) for key in ("messages", "conversation"))


@beartype
def is_conversation(record: Record) -> bool:
    """Whether a record is a conversation in one of the forms of `parse_conversation`."""
    return any(is_form(record) for is_form in (is_sharegpt, is_messages, is_chatgpt, is_instruction))


@beartype
def parse_conversation(
    record: Record, *, ignored: Collection[str] = (), prompts: bool = False, mended: Counter[str] | None = None
) -> Record:
    """A conversation `{"messages": [...]}` from any of the forms; `ValueError` says why it is none.

    Its messages, those of `parse_turn`, are in `conversations`, `items`, `messages` or `conversation`, with
    a system prompt in them or beside them; or it is a question with its answer (`parse_opening`, `parse_answer`),
    or a conversation of ChatGPT's export (`parse_chatgpt`). `id`, `model`, OpenChat's `condition` and the
    `tools` of a conversation are kept; other fields are those of `check_fields`. With `prompts` a question may
    lack its answer.
    """
    if is_chatgpt(record):
        return parse_chatgpt(record, mended=mended)
    if not (is_conversation(record) or (prompts and is_prompt(record))):
        raise ValueError("no conversation")
    options = {"ignored": ignored, "mended": mended}
    opening = parse_opening(record, **options)
    answer = parse_answer(record, opening, **options)
    has_turns = is_sharegpt(record) or is_messages(record)
    if not answer and not has_turns and not opening.turns:
        raise ValueError("no question")
    if not answer and not prompts and (opening.goes_on or not has_turns):
        raise ValueError(unknown_field(opening.goes_on) if opening.goes_on else "no answer")
    conversation: Record = {"messages": [*opening.turns, *answer]}
    known = KNOWN | {"title"} if has_turns else KNOWN  # of a question it could be a part
    check_fields(record, known, [turn["content"] for turn in conversation["messages"]], **options)
    for key in KEPT:
        if isinstance(record.get(key), (str, int)):
            conversation[key] = record[key]
    if tools := _tools(record):
        conversation["tools"] = tools
    return conversation


def _tools(record: Record) -> list[Any]:
    """The tools beside a conversation, described as OpenAI does; some files hold them as JSON in a text."""
    found = next((record[key] for key in TOOLS if record.get(key)), [])
    try:
        tools = json.loads(found) if isinstance(found, str) else found
    except (ValueError, RecursionError) as error:
        raise ValueError("malformed tools") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("malformed tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
