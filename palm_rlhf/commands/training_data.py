"""Files of any form that `palm-rlhf data` knows, as what a trainer learns from: tokens, some of them held out."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from beartype import beartype
from torch import Tensor

from palm_rlhf.commands.run_folder import say
from palm_rlhf.commands.start_models import ChatModel
from palm_rlhf.data.conversation import encode, encode_all, encode_prompt, encode_response, has_tools
from palm_rlhf.data.convert import ROWS, converted_records, form_of, prompt_rows
from palm_rlhf.data.curation.context_length import fit_context
from palm_rlhf.data.curation.held_out import is_held_out, key_digest
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.preferences.ranking_files import fit_rankings
from palm_rlhf.training.preference_data import Preference, UnpairedPreference
from palm_rlhf.training.ranked_data import Ranking
from palm_rlhf.training.rlhf.prompts import read_lines
from palm_rlhf.training.weighted_examples import Example

Messages = list[dict[str, Any]]
Item = TypeVar("Item")
TEXT_SUFFIXES = (".txt", ".text", ".md")


@beartype
def read(file: Path, to: Literal["sft", "rankings", "prompts", "preferences", "unpaired"]) -> list[Record]:
    """The records of a file, whose form is told by its content; what is left out is said, with its reasons.

    ValueError for a file that has none.
    """
    return _counted_records(file, to, lambda rejected: converted_records(file, form_of(file), to, rejected=rejected))


def _counted_records(file: Path, to: str, read_them: Callable[[Counter[str]], Iterable[Record]]) -> list[Record]:
    rejected: Counter[str] = Counter()
    records = list(read_them(rejected))
    if left_out := +rejected:
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.most_common())
        say(f"{file}: left out {reasons}")
    if not records:
        raise ValueError(f"{file} has no {to} to learn from, expected at least one")
    return records


@beartype
def split(records: Iterable[Record], held_out: float, seed: int) -> tuple[list[Record], list[Record]]:
    """The records to learn from, and those to measure with; all with one beginning are on one side.

    ValueError where one side is empty, unless nothing is to be held out.
    """
    sides: tuple[list[Record], list[Record]] = [], []
    for record in records:
        opening_ = record["prompt"] if "prompt" in record else opening(record["messages"])
        key = json.dumps([message["content"] for message in opening_])
        sides[is_held_out(key_digest(key, seed), held_out)].append(record)
    _check_sides(sides, held_out)
    return sides


@beartype
def split_prompts(
    rows: list[dict[str, Any]], held_out: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of `read_prompt_rows` to learn from, and those to measure with; ValueError as of `split`."""
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for row in rows:
        key = json.dumps(row["prompt"].tolist())
        sides[is_held_out(key_digest(key, seed), held_out)].append(row)
    _check_sides(sides, held_out)
    return sides


def _check_sides(sides: tuple[list, list], held_out: float) -> None:
    if not sides[0] or (held_out and not sides[1]):
        raise ValueError(
            f"got {len(sides[0])} records to train on and {len(sides[1])} held out, expected some of each: give more "
            "data, or another --held-out (0 holds out none)"
        )


@beartype
def opening(messages: Messages) -> Messages:
    """What comes before the assistant first speaks."""
    return messages[: next(index for index, message in enumerate(messages) if message["role"] == "assistant")]


@beartype
def fitted(records: list[Record], seq_len: int, model: ChatModel) -> list[Record]:
    """Conversations in pieces that rows of `seq_len` tokens have room for, with the marks of the template."""
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    marks = -(-len(encode(empty, model.tokenizer, model.template)) // 2)
    pieces = fit_context(records, seq_len, count_tokens=lambda text: len(model.tokenizer.encode(text)), overhead=marks)
    if not (pieces := list(pieces)):
        raise ValueError(f"no exchange of {len(records)} conversations fits seq_len={seq_len}: raise it")
    return pieces


@beartype
def examples_of(conversations: Iterable[Record], model: ChatModel) -> list[Example]:
    """Conversations as tokens, with the weights of what the assistant says; those left out are counted aloud."""
    rejected: Counter[str] = Counter()
    examples = list(encode_all(conversations, model.tokenizer, model.template, rejected=rejected))
    for reason, number in rejected.items():
        say(f"left out {number} conversations: {reason}")
    if rejected and not examples:
        raise ValueError("no conversation is left, expected some without tools: take a model whose template has them")
    return examples


@beartype
def rankings_of(records: Iterable[Record], model: ChatModel, max_seq_len: int) -> list[Ranking]:
    """Rankings as tokens within `max_seq_len`; replies that the cut makes equal are left out, and counted aloud."""
    rankings = (
        Ranking(_prompt(record["prompt"], model), [_reply(record, text, model) for text in record["responses"]])
        for record in records
    )
    return list(_counted(lambda rejected: fit_rankings(rankings, max_seq_len, rejected=rejected), max_seq_len))


@beartype
def preferences_of(records: Iterable[Record], model: ChatModel, max_seq_len: int) -> list[Preference]:
    """Pairs as tokens within `max_seq_len`; those that the cut makes equal are left out, and counted aloud."""
    pairs = [{**record, "responses": [record["chosen"], record["rejected"]]} for record in records]
    return [Preference(pair.prompt, *pair.responses) for pair in rankings_of(pairs, model, max_seq_len)]


@beartype
def unpaired_preferences_of(records: Iterable[Record], model: ChatModel) -> list[UnpairedPreference]:
    """Labelled replies as tokens."""
    return [
        UnpairedPreference(
            _prompt(record["prompt"], model), _reply(record, record["completion"], model), record["label"]
        )
        for record in records
    ]


@beartype
def read_prompts(file: Path, model: ChatModel) -> list[Tensor]:
    """Prompts as tokens up to where the assistant is to speak: those of a file's records, or of its lines of text."""
    return [row["prompt"] for row in read_prompt_rows(file, model)]


@beartype
def read_prompt_rows(file: Path, model: ChatModel, *, with_columns: bool = False) -> list[dict[str, Any]]:
    """The same as rows, with the tokens as their "prompt"; a prompt that comes twice with the same fields is one.

    `with_columns` keeps the other fields of records of a question, an answer to it among them.
    """
    unique = {json.dumps(record): record for record in _prompt_records(file, with_columns)}
    if not unique:
        raise ValueError(f"{file} has no prompt, expected one a line")
    rows, with_tools = [], 0
    for record in unique.values():
        tools = record.get("tools") or ()
        try:
            tokens = encode_prompt(record["prompt"], model.tokenizer, model.template, tools=tools)
        except ValueError:
            if not has_tools(record["prompt"], tools):
                raise
            with_tools += 1
        else:
            rows.append({**record.get("columns", {}), "prompt": tokens})
    if with_tools:
        say(f"{file}: left out {with_tools} prompts with tools that the template does not write")
    if not rows:
        raise ValueError(f"{file} has only prompts with tools, expected others: take a model whose template has them")
    return rows


def _prompt_records(file: Path, with_columns: bool) -> Iterable[Record]:
    if file.suffix in TEXT_SUFFIXES:
        return ({"prompt": [{"role": "user", "content": x.strip()}]} for x in read_lines(file))
    if with_columns and form_of(file) in ROWS:
        return _counted_records(file, "prompts", lambda rejected: prompt_rows(file, rejected=rejected))
    return read(file, "prompts")


def _prompt(messages: Messages, model: ChatModel) -> Tensor:
    return encode_prompt(messages, model.tokenizer, model.template)


def _reply(record: Record, text: str, model: ChatModel) -> Tensor:
    return encode_response(record["prompt"], text, model.tokenizer, model.template)


def _counted(fit: Callable[[Counter[str]], Iterator[Item]], max_seq_len: int) -> Iterator[Item]:
    rejected: Counter[str] = Counter()
    yield from fit(rejected)
    if number := sum(rejected.values()):
        say(f"left out {number} pairs of replies that are the same within max_seq_len={max_seq_len}")
