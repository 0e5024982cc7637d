"""The next token of every row of a batch, each by the options of its own request."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf.ops.sampling import Sampling, penalise_repetition, truncate
from palm_rlhf.serving.generation import Generation, TokenLogprob


class SampledToken(NamedTuple):
    """A row's next token, and its log-probability where the request asks for it."""

    token: int
    logprob: TokenLogprob | None


class Sampler:
    """A sampler that draws each token by one uniform number from the row's own generator, so that rows are independent.

    Args:
        allowed: `v` bool, False for ids that are never sampled, which have no part in any distribution; None allows
            all.
    """

    def __init__(self, allowed: Tensor | None = None):
        self.forbidden = None if allowed is None or bool(allowed.all()) else ~allowed

    def __call__(self, logits: Tensor, rows: Sequence[Generation]) -> list[SampledToken | None]:
        """Return the next token of each row; None where the logits are not finite, or no token is allowed.

        Args:
            logits: `b v`, one row for each generation.
        """
        logits = self.masked(logits)
        adjusted = constrain(adjust(logits, rows), rows)
        chosen = choose(adjusted, rows)
        finite = adjusted.amax(dim=-1).isfinite().tolist()
        logprobs = token_logprobs(logits, chosen, rows)
        return [
            SampledToken(token, logprob) if fine else None
            for token, logprob, fine in zip(chosen.tolist(), logprobs, finite, strict=True)
        ]

    def masked(self, logits: Tensor) -> Tensor:
        """Return the logits of the model's own distribution, in float32 or wider: `... v -> ... v`."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.forbidden is None else logits.masked_fill(self.forbidden, -torch.inf)


def adjust(logits: Tensor, rows: Sequence[Generation]) -> Tensor:
    """Return logits with the penalties and the bias of each row: `b v -> b v`.

    The repetition penalty comes first, since it depends on the sign of the model's own logit.
    """
    adjusted = logits
    for index, row in enumerate(rows):
        request = row.request
        if request.repetition_penalty != 1:
            adjusted = logits.clone() if adjusted is logits else adjusted
            seen = torch.zeros_like(logits[index], dtype=torch.bool)
            seen[torch.tensor(row.sequence, device=logits.device)] = True
            adjusted[index] = penalise_repetition(logits[index], seen, request.repetition_penalty)
        changes = dict(request.logit_bias)
        for token, count in row.counts.items():
            penalty = request.presence_penalty + count * request.frequency_penalty
            changes[token] = changes.get(token, 0.0) - penalty
        if changes:
            adjusted = logits.clone() if adjusted is logits else adjusted
            ids, values = (torch.tensor(list(part)) for part in (changes.keys(), changes.values()))
            adjusted[index, ids.to(logits.device)] += values.to(logits)
    return adjusted


def constrain(logits: Tensor, rows: Sequence[Generation]) -> Tensor:
    """Return logits without the tokens that a row's grammar does not allow next: `b v -> b v`."""
    masks = {index: row.constraint.mask() for index, row in enumerate(rows) if row.constraint is not None}
    constrained = logits.clone() if masks else logits
    for index, mask in masks.items():
        constrained[index].masked_fill_(~mask.to(logits.device), -torch.inf)
    return constrained


def truncate_rows(logits: Tensor, options: Sequence[Sampling]) -> Tensor:
    """Apply top-k, top-p and min-p to each row by its own options, in place: `b v -> b v`."""
    for row, sampling in zip(logits, options, strict=True):
        kept = truncate(row, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
        if kept is not row:
            row.copy_(kept)
    return logits


def choose(logits: Tensor, rows: Sequence[Generation]) -> Tensor:
    """Return the likeliest token at temperature 0, else a draw from the distribution: `b v -> b`."""
    chosen = logits.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.request.temperature > 0]
    if not drawn:
        return chosen
    requests = [rows[index].request for index in drawn]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(-1)

    index = torch.tensor(drawn, device=logits.device)
    # shifted before the division: a temperature near 0, which could overflow, is then close to greedy
    scaled = logits[index].double()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / column([request.temperature for request in requests])
    scaled = truncate_rows(scaled, requests)
    mass = scaled.exp().cumsum(dim=-1)
    total = mass[:, -1:]
    # always below the total, since no token lies beyond it
    drawn_mass = column([rows[place].random.random() for place in drawn]) * total
    drawn_mass = torch.minimum(drawn_mass, total.nextafter(torch.zeros_like(total)))
    chosen[index] = torch.searchsorted(mass, drawn_mass, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return chosen


def token_logprobs(logits: Tensor, chosen: Tensor, rows: Sequence[Generation]) -> list[TokenLogprob | None]:
    """Return the log-probability of the next token for each row that asks for it, else None.

    Args:
        logits: `b v`, of the model's own distribution.
        chosen: `b`, the next tokens.
    """
    found: list[TokenLogprob | None] = [None] * len(rows)
    wanted = {index: row.request.logprobs for index, row in enumerate(rows) if row.request.logprobs is not None}
    if not wanted:
        return found
    indices = list(wanted)
    logprobs = with_alternatives(logits[indices], chosen[indices], max(wanted.values()))
    for (index, most), logprob in zip(wanted.items(), logprobs, strict=True):
        found[index] = logprob._replace(alternatives=logprob.alternatives[:most])
    return found


def with_alternatives(logits: Tensor, tokens: Tensor, most: int) -> list[TokenLogprob]:
    """Return the log-probabilities of tokens, each with the likeliest tokens in its place.

    Args:
        logits: `n v`.
        tokens: `n`.
        most: The number of likeliest tokens.
    """
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(-1, tokens.unsqueeze(-1))
    ranks = (logprobs > own).sum(dim=-1) + 1
    # ids that cannot be sampled have minus infinity, and are left out below
    best = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    columns = (tensor.tolist() for tensor in (tokens, own.squeeze(-1), ranks, best.indices, best.values))
    return [
        TokenLogprob(token, logprob, tuple((i, value) for i, value in zip(ids, values) if value > -torch.inf), rank)
        for token, logprob, rank, ids, values in zip(*columns, strict=True)
    ]
