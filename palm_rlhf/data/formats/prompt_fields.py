"""The prompt of a reply, from the fields in which files keep it: system prompt, history, question and context."""

from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.formats.messages import Turn, content_text, one_system, parse_turn
from palm_rlhf.data.formats.record_fields import shown_name, unknown_field
from palm_rlhf.data.formats.transcripts import is_transcript, parse_transcript

SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")
CONVERSATIONS = ("conversations", "items", "messages", "conversation")
QUESTIONS = ("prompt", "question", "instruction", "query", "problem", "user", "user_prompt", "user_input", "human")
CONTEXTS = ("input", "context")  # the first is the question if there is no other
HISTORY = "history"
FIELDS = (*SYSTEMS, *CONVERSATIONS, *QUESTIONS, *CONTEXTS, HISTORY)


class PromptTurns(NamedTuple):
    """The messages before a reply.

    `question_field` is the field of a question that follows a conversation, else None. `is_transcript` is whether the
    prompt is a dialogue in one text.
    """

    turns: list[Turn]
    question_field: str | None
    is_transcript: bool


@beartype
def parse_prompt_fields(
    record: Record, *, ignored: Collection[str] = (), mended: Counter[str] | None = None
) -> PromptTurns:
    """Return the messages that the fields of a record hold before a reply.

    The system prompt comes first, then the history or a conversation, then the question: a text (an input or context
    follows on a line of its own), messages, or a transcript. A question that the conversation holds is not repeated.

    Raises ValueError if two fields contradict each other.
    """
    fields = {name: record[name] for name in FIELDS if name not in ignored and record.get(name) is not None}
    history, conversation = _history(fields.get(HISTORY)), _conversation(fields, ignored, mended)
    name, question, transcript = _question(fields, ignored, mended)
    contents = {turn["content"].strip() for turn in conversation}
    if all(turn["content"].strip() in contents for turn in question):
        question = []
    turns = _with_system([*history, *conversation, *question], system_of(fields))
    return PromptTurns(turns, name if conversation and question else None, transcript)


@beartype
def could_hold_prompt(record: Record, ignored: Collection[str] = ()) -> bool:
    """Return whether a record has a field for a prompt, even an empty one; an empty system prompt does not count."""
    return any(record.get(name) is not None and name not in ignored for name in FIELDS[len(SYSTEMS) :]) or bool(
        system_of({name: record.get(name) for name in SYSTEMS if name not in ignored})
    )


@beartype
def system_of(record: Record) -> str:
    """Return the system prompt beside a conversation, or an empty text; ValueError if there are two."""
    found = {name: content_text(record[name]) for name in SYSTEMS if record.get(name) is not None}
    texts = list(dict.fromkeys(text.strip() for text in found.values() if text.strip()))
    if len(texts) > 1:
        raise ValueError("two system prompts")
    return texts[0] if texts else ""


def _with_system(turns: list[Turn], system: str) -> list[Turn]:
    turns = one_system(turns)
    if not system:
        return turns
    if turns and turns[0]["role"] == "system" and turns[0]["content"].strip():
        if turns[0]["content"].strip() != system:
            raise ValueError("two system prompts")
        return turns
    rest = turns[1:] if turns and turns[0]["role"] == "system" else turns
    return [{"role": "system", "content": system}, *rest]


def _conversation(fields: Record, ignored: Collection[str], mended: Counter[str] | None) -> list[Turn]:
    found = {name: fields[name] for name in CONVERSATIONS if isinstance(fields.get(name), list) and fields[name]}
    parsed = {
        name: [parse_turn(turn, ignored=ignored, mended=mended) for turn in turns] for name, turns in found.items()
    }
    first_name, first = next(iter(parsed.items()), ("", []))
    for name, turns in parsed.items():
        if turns != first:
            raise ValueError(f"two conversations, {shown_name(first_name)} and {shown_name(name)}")
    for name in CONVERSATIONS:
        if isinstance(fields.get(name), str | dict) and fields[name]:
            raise ValueError(f"no messages in {shown_name(name)}")
    return first


def _history(history: Any) -> list[Turn]:
    """Return earlier exchanges, which are pairs of a question and its answer, or messages."""
    if not history:
        return []
    if not isinstance(history, list):
        raise ValueError(unknown_field(HISTORY))
    if all(isinstance(entry, dict) for entry in history):
        return [parse_turn(entry) for entry in history]
    if not all(isinstance(entry, list) and len(entry) == 2 for entry in history):
        raise ValueError("malformed history")
    return [
        {"role": role, "content": content_text(text)}
        for pair in history
        for role, text in zip(("user", "assistant"), pair)
    ]


def _question(
    fields: Record, ignored: Collection[str], mended: Counter[str] | None
) -> tuple[str | None, list[Turn], bool]:
    """Return the field of the question, its messages, and whether it is a transcript."""
    found = {name: fields[name] for name in QUESTIONS if _is_filled(fields.get(name))}
    contexts = [name for name in CONTEXTS if _is_filled(fields.get(name))]
    if not found and contexts:
        found = {contexts[0]: fields[contexts.pop(0)]}
    if not found:
        return None, [], False
    (name, question), *others = found.items()
    for other, text in others:
        if text != question:
            raise ValueError(f"two prompts, {shown_name(name)} and {shown_name(other)}")
    if not isinstance(question, str) or (name == "prompt" and is_transcript(question)):
        if contexts:
            raise ValueError(unknown_field(contexts[0]))
        if isinstance(question, str):
            turns = parse_transcript(question, "user")
            # a dialogue may end on "Assistant:", after which the reply follows
            return name, turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns, True
        turns = question if isinstance(question, list) else [question]
        return name, [parse_turn(turn, ignored=ignored, mended=mended) for turn in turns], False
    text = "\n".join([question, *(content_text(fields[context]) for context in contexts)])
    return name, [{"role": "user", "content": text}], False


def _is_filled(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != []
