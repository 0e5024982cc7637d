"""The only place where tokens and logits are shifted against each other."""

from functools import reduce

import torch
from torch import Tensor


def next_token_pairs(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What a language model reads and what it is to say: `b n -> b (n-1)`, twice."""
    return tokens[:, :-1], tokens[:, 1:]


def target_mask(
    *, loss_mask: Tensor | None = None, key_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor | None:
    """Which of the next tokens count: those in the loss mask that follow a real token of their own document.

    all: `b n` -> `b (n-1)`, or None where all count
    """
    masks = []
    if loss_mask is not None:
        masks.append(loss_mask[:, 1:])
    if key_mask is not None:  # what comes out at a pad predicts nothing
        masks.append(key_mask[:, :-1] & key_mask[:, 1:])
    if document_ids is not None:
        masks.append(document_ids[:, :-1] == document_ids[:, 1:])
    return reduce(torch.logical_and, masks) if masks else None


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of each token under the logits that stand at its own place.

    logits: `... v`, tokens: `...` -> `...`, float32 or wider
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def distribution_entropy(logits: Tensor, *, needs_grad: bool = False) -> Tensor:
    """The entropy in nats of the distribution of logits, some of them -inf; with a gradient only where asked.

    logits: `... v` -> `...`
    """
    with torch.set_grad_enabled(needs_grad and torch.is_grad_enabled()):
        logprobs = logits.log_softmax(dim=-1)
        logprobs = logprobs.masked_fill(logprobs == -torch.inf, 0.0)  # 0 log 0 is 0, and its gradient must not be NaN
        return -(logprobs.exp() * logprobs).sum(dim=-1)
