"""Conversations written in the formats that other trainers read: rows of Alpaca, and ShareGPT."""

from collections import Counter
from collections.abc import Iterable, Iterator

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.formats.conversation_records import KEPT

NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


@beartype
def to_instructions(conversations: Iterable[Record], *, rejected: Counter[str] | None = None) -> Iterator[Record]:
    """Yield conversations as rows of LlamaFactory: `{"instruction", "input", "output", "system", "history"}`.

    The last exchange is the instruction and the output, and the exchanges before it are the history. A conversation
    with calls of tools or weights, for which rows have no place, is counted in `rejected`. The conversations come from
    `mend_turns`.
    """
    rejected = Counter() if rejected is None else rejected
    for conversation in conversations:
        if reason := without_place(conversation):
            rejected[reason] += 1
            continue
        messages = conversation["messages"]
        system, turns = ("", messages) if messages[0]["role"] != "system" else (messages[0]["content"], messages[1:])
        texts = [turn["content"] for turn in turns]
        *history, (question, answer) = zip(texts[::2], texts[1::2], strict=True)
        row = {"instruction": question, "input": "", "output": answer, "system": system}
        yield {**row, "history": [list(pair) for pair in history]}


@beartype
def to_sharegpt(conversations: Iterable[Record], *, rejected: Counter[str] | None = None) -> Iterator[Record]:
    """Yield conversations as `{"conversations": [{"from", "value"}]}`, with their `id`, `model` and `condition`.

    A conversation with calls of tools, for which ShareGPT has no one form, or with weights is counted in `rejected`.
    """
    rejected = Counter() if rejected is None else rejected
    for conversation in conversations:
        if reason := without_place(conversation):
            rejected[reason] += 1
            continue
        turns = [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in conversation["messages"]]
        yield {**{key: conversation[key] for key in KEPT if key in conversation}, "conversations": turns}


def without_place(conversation: Record) -> str | None:
    """Return the part of a conversation that only messages can hold, as the reason to leave it out, or None."""
    messages = conversation["messages"]
    if "tools" in conversation or any(turn["role"] == "tool" or "tool_calls" in turn for turn in messages):
        return "calls of tools"
    usual = all(turn.get("weight", turn["role"] == "assistant") == (turn["role"] == "assistant") for turn in messages)
    return None if usual else "weights of messages"
