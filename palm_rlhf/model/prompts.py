"""The prompts of generation: read in any of their forms, laid out as one block, with the tokens that each may get."""

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from palm_rlhf.model.inputs import check_token_ids

if TYPE_CHECKING:
    from palm_rlhf.model.palm import PaLM

Form = Literal["none", "row", "rows", "list"]


class PaddedPrompts(NamedTuple):
    """Prompts as one block of tokens, padded on the left."""

    tokens: Tensor  # b n
    lengths: Tensor  # b
    form: Form  # in which they came: not at all, `n`, `b n`, or a list of 1-d tensors

    @property
    def left_padding(self) -> Tensor:
        """The number of padding tokens before each prompt: `b`."""
        return self.tokens.shape[1] - self.lengths


def read_prompts(
    palm: "PaLM",
    prompt: Tensor | list[Tensor] | None,
    generator: torch.Generator | None,
    allowed_tokens: Tensor | None = None,
) -> PaddedPrompts:
    """Check prompts and lay them out as one block; None is one prompt of a random token among those allowed.

    Raises ValueError for an empty prompt, one of the wrong number of axes, or ids outside the vocabulary.
    """
    device = palm.device
    if prompt is None:
        draw = "cpu" if generator is None else generator.device
        ids = torch.arange(palm.num_tokens) if allowed_tokens is None else allowed_tokens.cpu().nonzero().squeeze(-1)
        first = ids[torch.randint(len(ids), (1, 1), generator=generator, device=draw).cpu()].to(device)
        return PaddedPrompts(first, torch.ones(1, dtype=torch.long, device=device), "none")
    form: Form = "list" if isinstance(prompt, list) else "row" if prompt.ndim == 1 else "rows"
    rows = prompt if isinstance(prompt, list) else list(prompt) if prompt.ndim == 2 else [prompt]
    if any(row.ndim != 1 for row in rows):
        raise ValueError("a prompt has the wrong number of axes; expected `n`, `b n`, or a list of 1-d tensors")
    if not rows or any(len(row) == 0 for row in rows):
        raise ValueError("got an empty prompt; expected at least one token in each row (None starts at a random one)")
    alike = len({(row.dtype, row.device) for row in rows}) == 1
    for ids in [torch.cat(rows)] if alike else rows:  # a GPU is waited for once, not once for each row
        check_token_ids(ids, palm.num_tokens)
    sizes = [len(row) for row in rows]
    tokens = torch.zeros(len(rows), max(sizes), dtype=torch.long, device=rows[0].device)
    for block_row, row in zip(tokens, rows, strict=True):
        block_row[len(block_row) - len(row) :] = row
    tokens, lengths = tokens.to(device), torch.tensor(sizes, device=device)
    return PaddedPrompts(tokens, lengths, form)


def new_token_limits(prompts: PaddedPrompts, seq_len: int | None, max_new_tokens: int | Tensor | None) -> Tensor:
    """Return the most new tokens of each prompt, `b`, from exactly one of two lengths; ValueError where none fits."""
    if max_new_tokens is not None and seq_len is None:
        limits = torch.as_tensor(max_new_tokens, device=prompts.lengths.device)
        if limits.shape not in ((), prompts.lengths.shape) or limits.min() < 1:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; expected at least 1, as one number or for each of the "
                f"{len(prompts.lengths)} prompts"
            )
        return limits.long().expand_as(prompts.lengths)
    if seq_len is None or max_new_tokens is not None:
        raise ValueError(f"got seq_len={seq_len} and max_new_tokens={max_new_tokens}; expected exactly one of them")
    longest = int(prompts.lengths.max())
    if seq_len <= longest:
        raise ValueError(
            f"seq_len={seq_len} counts the prompt, which has {longest} tokens already; "
            "expected more, or max_new_tokens to count new tokens alone"
        )
    return seq_len - prompts.lengths


def response_lengths(tokens: Tensor, limits: Tensor, eos_token: int | None) -> Tensor:
    """Return the number of tokens of each response, its EOS included: `b t -> b`."""
    if eos_token is None:
        return limits
    is_eos = tokens == eos_token
    first = torch.where(is_eos.any(dim=-1), is_eos.int().argmax(dim=-1) + 1, tokens.shape[-1])
    return torch.minimum(first, limits)


def seen_tokens(prompts: PaddedPrompts, num_tokens: int) -> Tensor:
    """Return which tokens of the vocabulary each prompt has: `b v` bool."""
    seen = torch.zeros(len(prompts.tokens), num_tokens, dtype=torch.bool, device=prompts.tokens.device)
    columns = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)
    padding = columns < prompts.left_padding.unsqueeze(-1)
    # padding repeats the last token of the row, which is seen anyway
    return seen.scatter_(-1, torch.where(padding, prompts.tokens[:, -1:], prompts.tokens), True)
