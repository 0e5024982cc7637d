"""The prompts of reinforcement learning, from whichever form they come in."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.model.generate import check_token_ids
from palm_rlhf.model.interop.text_file import read_text

LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines would also cut at U+2028, which is part of a text


@beartype
def read_prompts(
    num_tokens: int,
    prompt_token_ids: Tensor | Sequence[Tensor] | None = None,
    prompt_lengths: Tensor | None = None,
    prompts: Sequence[str] | None = None,
    prompts_path: str | Path | None = None,
    tokenizer: Any = None,
) -> list[Tensor]:
    """Prompts as 1-d tensors, all ids checked against `num_tokens`.

    Exactly one of token ids (a list of 1-d tensors, or `b n` with lengths `b` where rows are padded on the right),
    texts, and the path of a file with a text on each line that is not blank; texts need the tokenizer.
    """
    given = {"prompt_token_ids": prompt_token_ids, "prompts": prompts, "prompts_path": prompts_path}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"got {names or 'no prompts'}, expected exactly one of {list(given)}")
    if prompts_path is not None:
        prompts = read_lines(Path(prompts_path))
    if prompts is not None:
        if tokenizer is None:
            raise ValueError(f"got {names[0]}, which are texts, without a tokenizer: pass one, or prompt_token_ids")
        ids = (tokenizer.encode(text) for text in prompts)
        rows = [torch.tensor(getattr(one, "ids", one), dtype=torch.long) for one in ids]  # Hugging Face wraps them
    elif isinstance(prompt_token_ids, Tensor):
        if prompt_token_ids.ndim != 2:
            raise ValueError(f"prompt_token_ids has {prompt_token_ids.ndim} axes; expected `b n`, or a list of rows")
        widths = [prompt_token_ids.shape[1]] * len(prompt_token_ids)
        lengths = widths if prompt_lengths is None else prompt_lengths.tolist()
        if len(lengths) != len(prompt_token_ids) or not all(0 <= length <= widths[0] for length in lengths):
            raise ValueError(f"prompt_lengths is {lengths!r:.200}, expected {len(widths)} numbers up to {widths[:1]}")
        rows = [row[:length] for row, length in zip(prompt_token_ids, lengths, strict=True)]
    else:
        rows = list(prompt_token_ids)
    if prompt_lengths is not None and not isinstance(prompt_token_ids, Tensor):
        raise ValueError("got prompt_lengths without padded prompt_token_ids: a list of rows has its own lengths")
    if not rows:
        raise ValueError(f"{names[0]} holds no prompt, expected at least one")
    for index, row in enumerate(rows):
        if row.ndim != 1 or len(row) == 0:
            raise ValueError(
                f"prompt {index} has the shape {tuple(row.shape)}, expected at least one token: leave it out"
            )
        check_token_ids(row, num_tokens)
    return rows


@beartype
def read_lines(path: Path) -> list[str]:
    """The lines of a file that are not blank; ValueError where it is no text."""
    return [line for line in LINE_END.split(read_text(path)) if line.strip()]


@beartype
def check_room(prompts: Sequence[Tensor], max_seq_len: int | None) -> None:
    """ValueError for a prompt that leaves no room for a response, before a run comes to it."""
    for index, prompt in enumerate(prompts):
        if max_seq_len is not None and len(prompt) >= max_seq_len:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, expected fewer than max_seq_len={max_seq_len}, which counts "
                "prompt and response: raise it, shorten the prompt, or set max_new_tokens alone"
            )
