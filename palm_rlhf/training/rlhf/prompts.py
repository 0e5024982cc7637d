"""The prompts of reinforcement learning, in one of several forms, with columns that rewards can ask for."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.model.files import read_text
from palm_rlhf.model.inputs import check_token_ids

LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines would also split at U+2028, which may be part of a text
PROMPT = "prompt"  # the column of the prompt itself
Prompt = str | Tensor | Mapping[str, Any]


class Prompts(NamedTuple):
    """Prompts as 1-d tensors, and their other columns: a list each, with None for rows without the column."""

    token_ids: list[Tensor]
    columns: dict[str, list[Any]]


@beartype
def read_prompts(
    num_tokens: int,
    prompt_token_ids: Tensor | Sequence[Tensor] | None = None,
    prompt_lengths: Tensor | None = None,
    prompts: Sequence[Prompt] | None = None,
    prompts_path: str | Path | None = None,
    tokenizer: Any = None,
    name: str | None = None,
) -> Prompts:
    """Return the prompts that are given in exactly one of three forms. Raises ValueError for wrong token ids.

    Args:
        num_tokens: size of the vocabulary.
        prompt_token_ids: a list of 1-d tensors, or `b n`, padded on the right.
        prompt_lengths: lengths of the rows of `b n`: `b`.
        prompts: texts, 1-d tensors, or rows: mappings with a text or token ids as "prompt", and other columns.
        prompts_path: a file with a text on each line that is not blank; with a row where its name ends in .jsonl.
        tokenizer: encodes texts.
        name: the argument that messages name; None: the one that is given.
    """
    given = {"prompt_token_ids": prompt_token_ids, "prompts": prompts, "prompts_path": prompts_path}
    names = [key for key, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"got {names or 'no prompts'}, expected exactly one of {list(given)}")
    source = name or names[0]
    if prompt_lengths is not None and not isinstance(prompt_token_ids, Tensor):
        raise ValueError("got prompt_lengths without padded prompt_token_ids: a list of rows has its own lengths")
    if prompts_path is not None:
        prompts = _read_file(Path(prompts_path))
    if isinstance(prompt_token_ids, Tensor):
        prompts = _without_padding(prompt_token_ids, prompt_lengths)
    elif prompt_token_ids is not None:
        prompts = prompt_token_ids
    if not prompts:
        raise ValueError(f"{source} holds no prompt, expected at least one")
    rows = [prompt if isinstance(prompt, Mapping) else {PROMPT: prompt} for prompt in prompts]
    token_ids = [_tokens(row, f"prompt {index}", source, tokenizer) for index, row in enumerate(rows)]
    for index, row in enumerate(token_ids):
        if row.ndim != 1 or len(row) == 0:
            raise ValueError(
                f"prompt {index} has the shape {tuple(row.shape)}, expected at least one token: leave it out"
            )
        check_token_ids(row, num_tokens)
    columns = dict.fromkeys(name for row in rows for name in row if name != PROMPT)
    return Prompts(token_ids, {name: [row.get(name) for row in rows] for name in columns})


def _without_padding(padded: Tensor, lengths: Tensor | None) -> list[Tensor]:
    if padded.ndim != 2:
        raise ValueError(f"prompt_token_ids has {padded.ndim} axes; expected `b n`, or a list of rows")
    widths = [padded.shape[1]] * len(padded)
    numbers = widths if lengths is None else lengths.tolist()
    if len(numbers) != len(padded) or not all(0 <= number <= widths[0] for number in numbers):
        raise ValueError(f"prompt_lengths is {numbers!r:.200}, expected {len(widths)} numbers up to {widths[:1]}")
    return [row[:number] for row, number in zip(padded, numbers, strict=True)]


def _tokens(row: Mapping[str, Any], place: str, source: str, tokenizer: Any) -> Tensor:
    """Return the prompt of a row as token ids."""
    if PROMPT not in row:
        raise ValueError(f"{place} has the keys {list(row)[:8]}, expected {PROMPT!r} among them")
    prompt = row[PROMPT]
    if isinstance(prompt, Tensor):
        return prompt
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"got {source}, which are texts, without a tokenizer: pass one, or prompt_token_ids")
        ids = tokenizer.encode(prompt)
        return torch.tensor(getattr(ids, "ids", ids), dtype=torch.long)  # Hugging Face wraps them
    if isinstance(prompt, Sequence) and all(type(token) is int for token in prompt):
        return torch.tensor(prompt, dtype=torch.long)
    raise ValueError(
        f"{place} is {prompt!r:.100}, expected a text or token ids; messages are made tokens by "
        "palm_rlhf.data.conversation.encode_prompt, or by the command palm-rlhf rlhf"
    )


def _read_file(path: Path) -> Sequence[Prompt]:
    lines = read_lines(path)
    if path.suffix != ".jsonl":
        return lines
    rows = []
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, row {place}: it is no JSON ({error}): mend or delete it") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {place}: got {line[:40]!r}, expected an object with a {PROMPT!r}")
        rows.append(row)
    return rows


@beartype
def read_lines(path: Path) -> list[str]:
    """Return the lines of a file that are not blank. Raises ValueError where it is no text."""
    return [line for line in LINE_END.split(read_text(path)) if line.strip()]


@beartype
def check_room(prompts: Sequence[Tensor], max_seq_len: int | None) -> None:
    """Raise ValueError for a prompt that leaves no room for a response, before a run comes to it."""
    for index, prompt in enumerate(prompts):
        if max_seq_len is not None and len(prompt) >= max_seq_len:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, expected fewer than max_seq_len={max_seq_len}, which counts "
                "prompt and response: raise it, shorten the prompt, or set max_new_tokens alone"
            )
