"""Making room for new tokens in a trained model."""

import dataclasses

import torch
from beartype import beartype
from torch import nn

from .palm import PaLM


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
