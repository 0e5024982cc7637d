"""The token ids of a model that its tokenizer knows, and new token ids for a trained model."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.shared_base import require_sole_base


@beartype
def known_tokens(tokenizer: Any, num_tokens: int) -> Tensor | None:
    """Return which of the `num_tokens` ids of a model its tokenizer can decode: `v`, bool, or None if it can all.

    Vocabularies are often padded to a round number, and some tokenizers have gaps. The ids are `token_ids` of our
    tokenizers and `get_vocab()` of those of Hugging Face; for a tokenizer with neither, all ids count as known.
    """
    ids = getattr(tokenizer, "token_ids", None)
    if ids is None and hasattr(tokenizer, "get_vocab"):
        ids = tokenizer.get_vocab().values()
    if ids is None:
        return None
    known = torch.zeros(num_tokens, dtype=torch.bool)
    known[[index for index in ids if index < num_tokens]] = True
    return None if known.all() else known


@beartype
def require_room(num_ids: int, num_tokens: int, folder: Path) -> None:
    """Raise ValueError if the tokenizer in the folder of a model has more ids, `num_ids`, than the model has tokens."""
    if num_ids > num_tokens:
        raise ValueError(
            f"the tokenizer in {folder} has {num_ids} tokens, and the model {num_tokens}; expected at most as many: "
            "are they of different models? Else give the model room by resize_token_embeddings"
        )


@torch.no_grad()
@beartype
def resize_token_embeddings(palm: PaLM, num_tokens: int, *, num_known: int | None = None) -> None:
    """Resize the vocabulary of a model to `num_tokens`, in place.

    The embedding of a new token is the mean of the known ones. So a new token is at most as likely as the known tokens
    are on average, and k new tokens beside v known ones lower the log-probability of any token by at most log(1 + k/v)
    nats. Call this before an optimiser or a trainer holds the weights.

    Args:
        palm: the model, which is changed.
        num_tokens: the new size of the vocabulary.
        num_known: how many tokens the tokenizer has used so far; None for all. The rows after them are replaced.
    """
    num_known = palm.num_tokens if num_known is None else num_known
    if not 1 <= num_known <= palm.num_tokens <= num_tokens:
        raise ValueError(
            f"got num_tokens={num_tokens} and num_known={num_known} for a model of {palm.num_tokens} tokens; expected "
            f"1 <= num_known <= {palm.num_tokens} <= num_tokens: tokens can be added, not taken away"
        )
    require_sole_base(palm, "resize_token_embeddings")
    embeddings = _with_mean_rows(palm.token_emb.weight, num_tokens, num_known)
    palm.token_emb = nn.Embedding(num_tokens, palm.config.dim, _weight=embeddings)
    palm.token_emb.weight.requires_grad_(embeddings.requires_grad)
    if not palm.config.tie_embeddings:
        weight = _with_mean_rows(palm.lm_head.weight, num_tokens, num_known)
        palm.lm_head = nn.Linear(palm.config.dim, num_tokens, bias=False, device="meta")
        palm.lm_head.weight = weight
    palm.config = dataclasses.replace(palm.config, num_tokens=num_tokens)


def _with_mean_rows(old: Tensor, num_rows: int, num_known: int) -> nn.Parameter:
    """Return a matrix of `num_rows` rows: the known ones, and after them their mean."""
    rows = old.new_empty(num_rows, old.shape[1])
    rows[:num_known] = old[:num_known]
    rows[num_known:] = old[:num_known].mean(dim=0, dtype=torch.promote_types(old.dtype, torch.float32))
    return nn.Parameter(rows, requires_grad=old.requires_grad)
