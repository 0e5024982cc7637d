"""Training data of the commands: files in any format of `palm-rlhf data` as tokens, some of them held out."""

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
def read_records_for(file: Path, to: Literal["sft", "rankings", "prompts", "preferences", "unpaired"]) -> list[Record]:
    """Read the records of a file in any known format, and print how many were left out, by reason.

    Raises ValueError if no record is left.
    """
    return _counted_records(file, to, lambda rejected: converted_records(file, form_of(file), to, rejected=rejected))


def _counted_records(file: Path, to: str, read_them: Callable[[Counter[str]], Iterable[Record]]) -> list[Record]:
    rejected: Counter[str] = Counter()
    records = list(read_them(rejected))
    if left_out := +rejected:
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.most_common())
        say(f"{file}: left out {reasons}")
    if not records:
        raise ValueError(f"{file}: got no {to}, expected at least one record")
    return records


@beartype
def split_held_out(records: Iterable[Record], held_out: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Split records into training and held-out records; records with the same prompt are on the same side.

    Raises ValueError if one side is empty, unless `held_out` is 0.
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
    """Split the rows of `read_prompt_rows` into training and held-out rows, as `split_held_out` does."""
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for row in rows:
        key = json.dumps(row["prompt"].tolist())
        sides[is_held_out(key_digest(key, seed), held_out)].append(row)
    _check_sides(sides, held_out)
    return sides


def _check_sides(sides: tuple[list, list], held_out: float) -> None:
    if not sides[0] or (held_out and not sides[1]):
        raise ValueError(
            f"got {len(sides[0])} records to train on and {len(sides[1])} held out, expected some of each: add data, "
            "or change --held-out (0 holds out none)"
        )


@beartype
def opening(messages: Messages) -> Messages:
    """Return the messages before the assistant's first message."""
    return messages[: next(index for index, message in enumerate(messages) if message["role"] == "assistant")]


@beartype
def fit_to_context(records: list[Record], seq_len: int, model: ChatModel) -> list[Record]:
    """Split conversations between turns into pieces of at most `seq_len` tokens, template included."""
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    marks = -(-len(encode(empty, model.tokenizer, model.template)) // 2)
    pieces = list(
        fit_context(records, seq_len, count_tokens=lambda text: len(model.tokenizer.encode(text)), overhead=marks)
    )
    if not pieces:
        raise ValueError(
            f"got seq_len {seq_len}, which no exchange of {len(records)} conversations fits; expected more: raise it"
        )
    return pieces


@beartype
def examples_of(conversations: Iterable[Record], model: ChatModel) -> list[Example]:
    """Encode conversations, with a weight for each token, and print how many were left out, by reason."""
    rejected: Counter[str] = Counter()
    examples = list(encode_all(conversations, model.tokenizer, model.template, rejected=rejected))
    for reason, number in rejected.items():
        say(f"left out {number} conversations: {reason}")
    if rejected and not examples:
        raise ValueError("got only conversations with tools, expected others: use a model whose template has tools")
    return examples


@beartype
def rankings_of(records: Iterable[Record], model: ChatModel, max_seq_len: int) -> list[Ranking]:
    """Encode rankings within `max_seq_len` tokens; replies that are equal after the cut are left out and counted."""
    rankings = (
        Ranking(_prompt(record["prompt"], model), [_reply(record, text, model) for text in record["responses"]])
        for record in records
    )
    return list(_counted(lambda rejected: fit_rankings(rankings, max_seq_len, rejected=rejected), max_seq_len))


@beartype
def preferences_of(records: Iterable[Record], model: ChatModel, max_seq_len: int) -> list[Preference]:
    """Encode pairs within `max_seq_len` tokens; pairs that are equal after the cut are left out and counted."""
    pairs = [{**record, "responses": [record["chosen"], record["rejected"]]} for record in records]
    return [Preference(pair.prompt, *pair.responses) for pair in rankings_of(pairs, model, max_seq_len)]


@beartype
def unpaired_preferences_of(records: Iterable[Record], model: ChatModel) -> list[UnpairedPreference]:
    """Encode labelled replies."""
    return [
        UnpairedPreference(
            _prompt(record["prompt"], model), _reply(record, record["completion"], model), record["label"]
        )
        for record in records
    ]


@beartype
def read_prompts(file: Path, model: ChatModel) -> list[Tensor]:
    """Read and encode the prompts of a file: of its records, or of its lines. They end where the assistant replies."""
    return [row["prompt"] for row in read_prompt_rows(file, model)]


@beartype
def read_prompt_rows(file: Path, model: ChatModel, *, with_columns: bool = False) -> list[dict[str, Any]]:
    """Read prompts as rows with the encoded "prompt"; rows that are equal in all fields are merged.

    `with_columns` keeps the other fields of records with a prompt or a question, such as the answer.
    """
    unique = {json.dumps(record): record for record in _prompt_records(file, with_columns)}
    if not unique:
        raise ValueError(f"{file}: got no prompt, expected one on each line")
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
        say(f"{file}: left out {with_tools} prompts with tools, which the chat template does not support")
    if not rows:
        raise ValueError(f"{file}: got only prompts with tools, expected others: use a model whose template has tools")
    return rows


@beartype
def read_prompt_messages(file: Path) -> list[Messages]:
    """Read the prompts of a file, of its records or of its lines, as messages; prompts with tools are left out."""
    records = list(_prompt_records(file, with_columns=False))
    kept = [record["prompt"] for record in records if not has_tools(record["prompt"], record.get("tools") or ())]
    if left_out := len(records) - len(kept):
        say(f"{file}: left out {left_out} prompts with tools")
    return [[{"role": turn["role"], "content": turn["content"]} for turn in prompt] for prompt in kept]


def _prompt_records(file: Path, with_columns: bool) -> Iterable[Record]:
    if file.suffix in TEXT_SUFFIXES:
        return ({"prompt": [{"role": "user", "content": x.strip()}]} for x in read_lines(file))
    if with_columns and form_of(file) in ROWS:
        return _counted_records(file, "prompts", lambda rejected: prompt_rows(file, rejected=rejected))
    return read_records_for(file, "prompts")


def _prompt(messages: Messages, model: ChatModel) -> Tensor:
    return encode_prompt(messages, model.tokenizer, model.template)


def _reply(record: Record, text: str, model: ChatModel) -> Tensor:
    return encode_response(record["prompt"], text, model.tokenizer, model.template)


def _counted(fit: Callable[[Counter[str]], Iterator[Item]], max_seq_len: int) -> Iterator[Item]:
    rejected: Counter[str] = Counter()
    yield from fit(rejected)
    if number := sum(rejected.values()):
        say(f"left out {number} pairs of replies that are equal within max_seq_len={max_seq_len}")
