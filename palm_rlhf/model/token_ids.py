"""Which ids of a model are tokens of a tokenizer, and making room for new ones in a trained model."""

import dataclasses
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.palm import PaLM


@beartype
def known_tokens(tokenizer: Any, num_tokens: int) -> Tensor | None:
    """True for the ids of a model of `num_tokens` tokens that a tokenizer can decode: `v`, or None where all are.

    Vocabularies are often padded to a round number, and some tokenizers have gaps. A tokenizer tells its ids by
    `token_ids`, as ours do, or by `get_vocab()`, as Hugging Face's do; of one that tells nothing, all ids count.
    """
    ids = getattr(tokenizer, "token_ids", None)
    if ids is None and hasattr(tokenizer, "get_vocab"):
        ids = tokenizer.get_vocab().values()
    if ids is None:
        return None
    known = torch.zeros(num_tokens, dtype=torch.bool)
    known[[index for index in ids if index < num_tokens]] = True
    return None if known.all() else known


@torch.no_grad()
@beartype
def resize_token_embeddings(palm: PaLM, num_tokens: int, *, num_known: int | None = None) -> None:
    """Give a model `num_tokens` tokens in place, the new embeddings being the mean of the first `num_known`.

    A new token then is at most as likely as the known ones are on average, so k of them among v take no more than
    log(1 + k/v) nats off what the model gives any text. `num_known` is how many tokens a tokenizer has used so far,
    None for all; of the rows after them nothing is kept. Call this before an optimiser or a trainer holds the weights.
    """
    num_known = palm.num_tokens if num_known is None else num_known
    if not 1 <= num_known <= palm.num_tokens <= num_tokens:
        raise ValueError(
            f"got num_tokens={num_tokens} and num_known={num_known} for a model of {palm.num_tokens} tokens; expected "
            f"1 <= num_known <= {palm.num_tokens} <= num_tokens: tokens can be added, not taken away"
        )
    old = palm.token_emb.weight
    weight = old.new_empty(num_tokens, palm.config.dim)
    weight[:num_known] = old[:num_known]
    weight[num_known:] = old[:num_known].mean(dim=0, dtype=torch.promote_types(old.dtype, torch.float32))
    palm.token_emb = nn.Embedding(num_tokens, palm.config.dim, _weight=weight)
    palm.token_emb.weight.requires_grad_(old.requires_grad)
    palm.config = dataclasses.replace(palm.config, num_tokens=num_tokens)
