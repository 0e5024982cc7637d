"""The conversations of examples/sft.py: from files of any form, some held out, in pieces that fit a context."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from palm_rlhf.data.cleaning import mend_turns
from palm_rlhf.data.conversation import Template, encode
from palm_rlhf.data.convert import converted, form_of
from palm_rlhf.data.records import is_held_out
from palm_rlhf.data.splitting import fit_context
from palm_rlhf.data.tokenizer import Tokenizer

Messages = list[dict[str, Any]]


def read_conversations(file: Path | None) -> Iterator[dict[str, Any]]:
    """Those of a file, whose form is told by its content, or the dialogues of chatterbot-corpus."""
    return mend_turns(dialogues()) if file is None else converted(file, form_of(file), "sft")


def dialogues() -> Iterator[dict[str, Messages]]:
    """The English dialogues of chatterbot-corpus, each once, a turn on one line."""
    try:
        import chatterbot_corpus
        import yaml
    except ImportError as error:
        raise ImportError(f"{error}; the dialogues come with: pip install palm-rlhf[examples]") from error
    paths = sorted((Path(chatterbot_corpus.__file__).parent / "data/english").glob("*.yml"))
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]
    conversations = [turns for file in files for turns in file["conversations"]]
    for turns in dict.fromkeys(tuple(" ".join(text.split()) for text in turns) for turns in conversations):
        roles = ("assistant" if index % 2 else "user" for index in range(len(turns)))
        yield {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]}


def opening(messages: Messages) -> Messages:
    """What comes before the assistant first speaks."""
    return messages[: next(index for index, message in enumerate(messages) if message["role"] == "assistant")]


def split(records: Iterable[dict], held_out: float, seed: int) -> tuple[list[dict], list[dict]]:
    """The conversations to train on, and those to measure with; all that open alike are on one side."""
    sides: tuple[list[dict], list[dict]] = [], []
    for record in records:
        key = json.dumps([message["content"] for message in opening(record["messages"])])
        sides[is_held_out(key, held_out, seed)].append(record)
    if not all(sides):
        got = f"{len(sides[0])} conversations to train on and {len(sides[1])} held out"
        raise ValueError(f"got {got}, expected some of each: give more data, or another --held-out")
    return sides


def fitted(records: list[dict], seq_len: int, tokenizer: Tokenizer, template: Template) -> list[Messages]:
    """The conversations in pieces that the rows have room for, with the marks of the template."""
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    marks = -(-len(encode(empty, tokenizer, template)) // 2)
    pieces = fit_context(records, seq_len, count_tokens=lambda text: len(tokenizer.encode(text)), overhead=marks)
    if not (pieces := [piece["messages"] for piece in pieces]):
        raise ValueError(f"no exchange of {len(records)} conversations fits seq_len={seq_len}: raise it")
    return pieces
