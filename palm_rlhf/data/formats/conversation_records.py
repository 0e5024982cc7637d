"""Records of conversations in any of the known formats, read as messages."""

import json
from collections import Counter
from collections.abc import Collection
from typing import Any

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.formats.chatgpt_export import is_chatgpt, parse_chatgpt
from palm_rlhf.data.formats.instructions import ANSWERS, is_instruction, is_prompt, parse_answer
from palm_rlhf.data.formats.prompt_fields import FIELDS, parse_prompt_fields
from palm_rlhf.data.formats.record_fields import check_fields, unknown_field

KEPT = ("id", "model", "condition")
TOOLS = ("tools", "functions")
KNOWN = {*FIELDS, *ANSWERS, *TOOLS, *KEPT}


@beartype
def is_sharegpt(record: Record) -> bool:
    """Return whether a record has messages under the keys of ShareGPT, `conversations` or `items`."""
    return any(isinstance(record.get(key), list) for key in ("conversations", "items"))


@beartype
def is_messages(record: Record) -> bool:
    """Return whether a record has messages under the keys `messages` or `conversation`."""
    return any(isinstance(record.get(key), list) for key in ("messages", "conversation"))


@beartype
def is_conversation(record: Record) -> bool:
    """Return whether a record is a conversation in one of the formats of `parse_conversation`."""
    return any(is_form(record) for is_form in (is_sharegpt, is_messages, is_chatgpt, is_instruction))


@beartype
def parse_conversation(
    record: Record, *, ignored: Collection[str] = (), prompts: bool = False, mended: Counter[str] | None = None
) -> Record:
    """Return the conversation of a record as `{"messages": [...]}`, from any of the known formats.

    Its messages (see `parse_turn`) are in `conversations`, `items`, `messages` or `conversation`, with a system prompt
    among them or beside them. Or the record is a question with its answer (`parse_prompt_fields`, `parse_answer`), or a
    conversation of ChatGPT's export (`parse_chatgpt`). The `id`, the `model`, OpenChat's `condition` and the `tools`
    are kept. Other fields are subject to `check_fields`.

    Raises ValueError with the reason if it is no conversation.

    Args:
        record: The record.
        ignored: Fields to leave out although they may hold text.
        prompts: Whether a question may lack its answer.
        mended: Counts the changes by their kinds.
    """
    if is_chatgpt(record):
        return parse_chatgpt(record, mended=mended)
    if not (is_conversation(record) or (prompts and is_prompt(record))):
        raise ValueError("no conversation")
    prompt = parse_prompt_fields(record, ignored=ignored, mended=mended)
    answer = parse_answer(record, prompt, ignored=ignored, mended=mended)
    has_turns = is_sharegpt(record) or is_messages(record)
    if not answer and not has_turns and not prompt.turns:
        raise ValueError("no question")
    if not answer and not prompts and (prompt.question_field or not has_turns):
        raise ValueError(unknown_field(prompt.question_field) if prompt.question_field else "no answer")
    conversation: Record = {"messages": [*prompt.turns, *answer]}
    known = KNOWN | {"title"} if has_turns else KNOWN  # the title of a question may be a part of the question
    texts = [turn["content"] for turn in conversation["messages"]]
    check_fields(record, known, texts, ignored=ignored, mended=mended)
    for key in KEPT:
        if isinstance(record.get(key), (str, int)):
            conversation[key] = record[key]
    if tools := _tools(record):
        conversation["tools"] = tools
    return conversation


def _tools(record: Record) -> list[Any]:
    """Return the tools beside a conversation in the form of OpenAI; some files hold them as JSON in a string."""
    found: Any = next((record[key] for key in TOOLS if record.get(key)), [])
    try:
        tools = json.loads(found) if isinstance(found, str) else found
    except (ValueError, RecursionError) as error:
        raise ValueError("malformed tools") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("malformed tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
