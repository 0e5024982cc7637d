"""The inputs of a forward: checks of token ids, and the positions and masks that follow from padding and documents."""

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor


def check_tokens(tokens: Tensor) -> None:
    """Raise ValueError unless tokens are `b n` ids, by shape and type alone: a compiled forward pays nothing."""
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32) or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens is {tokens.dtype} of the shape {tuple(tokens.shape)}; expected ids, torch.int64 or torch.int32, "
            "of the shape `b n` with at least one in a row: of a single text, tokens.unsqueeze(0)"
        )


@beartype
def check_token_ids(tokens: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless every id of an integer tensor of any shape lies in the vocabulary."""
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"token ids are {tokens.dtype}; expected integers, such as torch.int64")
    if tokens.numel():
        low, high = (int(t) for t in tokens.aminmax())
        if low < 0 or high >= num_tokens:
            bad = low if low < 0 else high
            raise ValueError(
                f"token id {bad} is outside the vocabulary; expected 0 to {num_tokens - 1} (num_tokens={num_tokens}): "
                "was the text encoded with this model's tokenizer?"
            )


def default_positions(tokens: Tensor, key_mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """Count the real tokens of each row, anew in every document: `b n -> b n`, or `1 n` without masks."""
    if key_mask is None and document_ids is None:
        return torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    real = torch.ones_like(tokens) if key_mask is None else key_mask.to(tokens.dtype)
    count = real.cumsum(dim=-1)
    if document_ids is not None:
        starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
        count = count - torch.where(starts, count - real, 0).cummax(dim=-1).values
    return (count - 1).clamp(min=0)


def without_right_padding(key_mask: Tensor | None) -> Tensor | None:
    """Return None where a causal model needs no mask, because all padding comes after all real tokens.

    The check costs a synchronisation on an accelerator, and cannot be compiled: there the mask stays.
    """
    if key_mask is None or torch.compiler.is_compiling() or key_mask.device.type != "cpu":
        return key_mask
    return None if bool((key_mask[:, :-1] >= key_mask[:, 1:]).all()) else key_mask
