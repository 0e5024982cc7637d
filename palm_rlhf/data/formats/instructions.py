"""Rows of an instruction and its answer, as Alpaca and others have them, read as conversations."""

from collections import Counter
from collections.abc import Collection

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.formats.messages import Turn, content_text, parse_turn
from palm_rlhf.data.formats.prompt_fields import CONTEXTS, QUESTIONS, PromptTurns
from palm_rlhf.data.formats.record_fields import shown_name, unknown_field
from palm_rlhf.data.formats.transcripts import parse_transcript

ANSWERS = ("output", "response", "answer", "completion", "solution", "reply", "assistant")


@beartype
def is_instruction(record: Record) -> bool:
    """Return whether a record has a field for a question (`instruction`, `question`, ...) and one for its answer."""
    return any(name in record for name in (*QUESTIONS, *CONTEXTS)) and any(name in record for name in ANSWERS)


@beartype
def is_prompt(record: Record) -> bool:
    """Return whether a record has a question and no field for its answer."""
    return any(record.get(name) for name in QUESTIONS) and not any(name in record for name in ANSWERS)


@beartype
def parse_answer(
    record: Record, prompt: PromptTurns, *, ignored: Collection[str] = (), mended: Counter[str] | None = None
) -> list[Turn]:
    """Return the messages of the answer to a prompt, or none if the prompt is a conversation that holds it already.

    The answer is in one of `ANSWERS`: a text, or messages. Raises ValueError if there are two different answers or no
    question, and if `label` is false: the files of KTO mark answers so that people did not want.
    """
    found = {name: record[name] for name in ANSWERS if name not in ignored and record.get(name) not in (None, "", [])}
    if not found:
        return []
    if record.get("label") is False:
        raise ValueError("answer labelled as bad")
    (name, answer), *others = found.items()
    for other, text in others:
        if text != answer:
            raise ValueError(f"two answers, {shown_name(name)} and {shown_name(other)}")
    if isinstance(answer, list) and all(isinstance(turn, dict) and "type" not in turn for turn in answer):
        turns = [parse_turn(turn, ignored=ignored, mended=mended) for turn in answer]
    elif prompt.is_transcript and isinstance(answer, str):
        turns = parse_transcript(answer, "assistant")
    else:
        turns = [{"role": "assistant", "content": content_text(answer)}]
    if not prompt.turns:
        raise ValueError("no question")
    if prompt.turns[-1]["role"] != "assistant":
        return turns
    if all(turn["content"].strip() in prompt.turns[-1]["content"] for turn in turns):
        return []
    raise ValueError(unknown_field(name))
