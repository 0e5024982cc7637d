"""From logits to the distribution that is sampled from."""

import torch
from torch import Tensor

from palm_rlhf.ops.nucleus import nucleus_cut, top_k_cut


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by the penalty, multiply negative ones (Keskar et al. 2019, section 4.1).

    logits: `b v`, seen: `b v` bool -> `b v`
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Leave the k largest logits, and those equal to the k-th (Fan et al. 2018): `... v -> ... v`."""
    return torch.where(top_k_cut(logits, k).keeps(logits), logits, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Leave the smallest set of tokens that holds at least p of the mass (Holtzman et al. 2019, section 3.1).

    It has one token at least; of equally likely tokens, those with the smaller ids come first.

    logits: `... v` -> `... v`
    """
    return torch.where(nucleus_cut(logits, p).keeps(logits), logits, -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Leave tokens of at least p times the probability of the likeliest (Nguyen et al. 2024): `... v -> ... v`."""
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < p * probs.amax(dim=-1, keepdim=True), -torch.inf)


def truncated_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    allowed_tokens: Tensor | None = None,
    always: Tensor | None = None,
) -> Tensor:
    """Logits of the distribution sampled from: temperature, then top-k, top-p and min-p in turn; -inf is left out.

    Temperature 0 is greedy: all mass on the first largest logit. `allowed_tokens` is False for tokens that have no part
    in the distribution, such as the padding of a vocabulary; `always` are tokens that truncation does not leave out.

    logits: `... v`, allowed_tokens: `v` bool, always: `...` -> `... v`, float32 or wider
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if allowed_tokens is not None:
        logits = logits.masked_fill(~allowed_tokens.to(logits.device), -torch.inf)
    if temperature == 0:
        certain = torch.full_like(logits, -torch.inf)
        return certain.scatter_(-1, logits.argmax(dim=-1, keepdim=True), 0.0)
    if temperature != 1.0:
        logits = logits / temperature
    kept = logits
    if top_k is not None:
        kept = keep_top_k(kept, top_k)
    if top_p is not None and top_p < 1.0:
        kept = keep_top_p(kept, top_p)
    if min_p is not None and min_p > 0.0:
        kept = keep_min_p(kept, min_p)
    if always is not None and kept is not logits:
        always = always.unsqueeze(-1)
        kept = kept.scatter(-1, always, logits.gather(-1, always))
    return kept


def sampling_logprobs(
    logits: Tensor, *, repetition_penalty: float = 1.0, seen: Tensor | None = None, **truncation
) -> Tensor:
    """Log-probabilities of the distribution sampled from: the penalty, then what `truncated_logits` leaves.

    logits: `b v`, seen: `b v` bool -> `b v`, float32 or wider
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if repetition_penalty != 1.0:
        logits = penalise_repetition(logits, seen, repetition_penalty)
    return truncated_logits(logits, **truncation).log_softmax(dim=-1)


def sample(logprobs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token a row, by the race of exponential clocks (Gumbel's trick): `b v -> b`."""
    if logprobs.device.type == "meta":
        return logprobs.argmax(dim=-1)
    clocks = torch.empty_like(logprobs).exponential_(generator=generator)
    return (logprobs.exp() / clocks).argmax(dim=-1)
