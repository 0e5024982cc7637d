"""Conversations written in formats that other trainers read: rows of LlamaFactory and Alpaca, and ShareGPT."""

from collections import Counter
from collections.abc import Iterable, Iterator

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.formats.conversation_records import KEPT

NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


@beartype
def to_instructions(conversations: Iterable[Record], *, rejected: Counter[str] | None = None) -> Iterator[Record]:
    """Conversations as rows `{"instruction", "input", "output", "system", "history"}`, as LlamaFactory reads them.

    The last exchange is the instruction and the output, those before are the history. What such a row cannot hold,
    calls of tools and weights, is counted in `rejected`. The conversations are those of `mend_turns`.
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
    """Conversations as `{"conversations": [{"from", "value"}]}`, with the same `id`, `model` and `condition`.

    Calls of tools, for which there is no one form, are counted in `rejected`, and so are weights.
    """
    rejected = Counter() if rejected is None else rejected
    for conversation in conversations:
        if reason := without_place(conversation):
            rejected[reason] += 1
            continue
        turns = [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in conversation["messages"]]
        yield {**{key: conversation[key] for key in KEPT if key in conversation}, "conversations": turns}


def without_place(conversation: Record) -> str | None:
    """What of a conversation only messages can hold, as the reason to leave it out of another form."""
    messages = conversation["messages"]
    if "tools" in conversation or any(turn["role"] == "tool" or "tool_calls" in turn for turn in messages):
        return "calls of tools"
    usual = all(turn.get("weight", turn["role"] == "assistant") == (turn["role"] == "assistant") for turn in messages)
    return None if usual else "weights of messages"
