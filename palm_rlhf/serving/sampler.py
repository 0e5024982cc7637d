"""The next token of every row of a batch, each by its own request."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf.ops.sampling import keep_top_p
from palm_rlhf.serving.generation import Generation, TokenLogprob


class Sampled(NamedTuple):
    """A row's next token, and its log-probability where the request asks for it."""

    token: int
    logprob: TokenLogprob | None


class Sampler:
    """Draws tokens by one uniform number of each row's own generator, so that no row's sample depends on the others.

    `allowed`: `v` bool, False for ids that are never sampled; they have no part of any distribution.
    """

    def __init__(self, allowed: Tensor | None = None):
        self.forbidden = None if allowed is None or bool(allowed.all()) else ~allowed

    def __call__(self, logits: Tensor, rows: Sequence[Generation]) -> list[Sampled | None]:
        """logits: `b v`, one row for each generation; None where the model gave no number, or no token is allowed."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.forbidden is not None:
            logits = logits.masked_fill(self.forbidden, -torch.inf)
        adjusted = constrain(adjust(logits, rows), rows)
        chosen = choose(adjusted, rows)
        finite = adjusted.amax(dim=-1).isfinite().tolist()
        logprobs = token_logprobs(logits, chosen, rows)
        return [
            Sampled(token, logprob) if fine else None
            for token, logprob, fine in zip(chosen.tolist(), logprobs, finite, strict=True)
        ]


def adjust(logits: Tensor, rows: Sequence[Generation]) -> Tensor:
    """Logits with the bias and the penalties of the rows that ask for them: `b v -> b v`."""
    adjusted = logits
    for index, row in enumerate(rows):
        request = row.request
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
    """Logits without the tokens that the grammar of a row does not allow next: `b v -> b v`."""
    masks = {index: row.constraint.mask() for index, row in enumerate(rows) if row.constraint is not None}
    constrained = logits.clone() if masks else logits
    for index, mask in masks.items():
        constrained[index].masked_fill_(~mask.to(logits.device), -torch.inf)
    return constrained


def choose(logits: Tensor, rows: Sequence[Generation]) -> Tensor:
    """The likeliest token where the temperature is 0, else a draw from the distribution: `b v -> b`."""
    chosen = logits.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.request.temperature > 0]
    if not drawn:
        return chosen
    requests = [rows[index].request for index in drawn]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(-1)

    index = torch.tensor(drawn, device=logits.device)
    # shifted before they are divided: a temperature near 0 is then near greedy, where it would overflow
    scaled = logits[index].double()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / column([request.temperature for request in requests])
    if cut := [place for place, request in enumerate(requests) if request.top_p < 1]:
        scaled[cut] = keep_top_p(scaled[cut], column([requests[place].top_p for place in cut]))
    mass = scaled.exp().cumsum(dim=-1)
    total = mass[:, -1:]
    # never the total itself, which no token reaches beyond
    drawn_mass = column([rows[place].random.random() for place in drawn]) * total
    drawn_mass = torch.minimum(drawn_mass, total.nextafter(torch.zeros_like(total)))
    chosen[index] = torch.searchsorted(mass, drawn_mass, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return chosen


def token_logprobs(logits: Tensor, chosen: Tensor, rows: Sequence[Generation]) -> list[TokenLogprob | None]:
    """What each row that asks for it is told of its token: logits `b v`, chosen `b`."""
    found: list[TokenLogprob | None] = [None] * len(rows)
    asking = [index for index, row in enumerate(rows) if row.request.logprobs is not None]
    if not asking:
        return found
    logprobs = logits[asking].log_softmax(dim=-1)
    own = logprobs.gather(-1, chosen[asking].unsqueeze(-1)).squeeze(-1).tolist()
    # never an id that cannot be sampled: there are at least as many others as anyone may ask for
    most = min(max(rows[index].request.logprobs for index in asking), logits.shape[-1])
    best = logprobs.topk(most, dim=-1)
    for place, index in enumerate(asking):
        top = zip(best.indices[place].tolist(), best.values[place].tolist())
        kept = [(token, value) for token, value in top if value > -torch.inf][: rows[index].request.logprobs]
        found[index] = TokenLogprob(int(chosen[index]), own[place], tuple(kept))
    return found
