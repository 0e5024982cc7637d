"""The next token of every row of a batch, each by the options of its own request."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from palm_rlhf.ops.sampling import penalise_repetition
from palm_rlhf.serving.engine.row_options import RowOptions, truncate_rows
from palm_rlhf.serving.engine.transfer import to_lists, upload
from palm_rlhf.serving.generation import Generation, TokenLogprob

NO_TOKEN = -1


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
        self._options: RowOptions | None = None  # of the rows of the last call

    def __call__(self, logits: Tensor, rows: Sequence[Generation]) -> list[SampledToken | None]:
        """Return the next token of each row; None where the logits are not finite, or no token is allowed.

        All numbers come back from the device at once: a GPU is waited for once.

        Args:
            logits: `b v`, one row for each generation.
        """
        options, requests = self.options_of(rows, logits.device), [row.request for row in rows]
        scored, logits = options.scored, self.masked(logits)
        adjusted = constrain(adjust(logits, rows), rows)
        chosen = choose(adjusted, rows, options)
        found = where_finite(adjusted, chosen)
        if scored is None:
            return [None if token == NO_TOKEN else SampledToken(token, None) for token in found.tolist()]
        ranked = rank_tokens(scored.of(logits), scored.of(chosen), options.most_alternatives)
        (tokens,), scores = to_lists([found.double().unsqueeze(0), ranked])
        logprobs = iter(logprobs_of(scores))
        sampled = [
            SampledToken(int(token), None if request.logprobs is None else limited(next(logprobs), request.logprobs))
            for token, request in zip(tokens, requests, strict=True)
        ]
        return [None if one.token == NO_TOKEN else one for one in sampled]

    def draw(self, logits: Tensor, rows: Sequence[Generation]) -> Tensor:
        """Return the next tokens of rows whose options are `simple`, or NO_TOKEN, without waiting for them: `b`."""
        logits = self.masked(logits)
        return where_finite(logits, choose(logits, rows, self.options_of(rows, logits.device)))

    def options_of(self, rows: Sequence[Generation], device: torch.device) -> RowOptions:
        """Return the options of rows, which are made anew only where the rows have changed."""
        requests = [row.request for row in rows]
        if self._options is None or not self._options.are_of(requests, device):
            self._options = RowOptions(requests, device)
        return self._options

    def masked(self, logits: Tensor) -> Tensor:
        """Return the logits of the model's own distribution, in float32 or wider: `... v -> ... v`."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.forbidden is None else logits.masked_fill(self.forbidden, -torch.inf)


def where_finite(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen tokens, and NO_TOKEN where the largest logit is no number: `b v, b -> b`."""
    return torch.where(logits.amax(dim=-1).isfinite(), chosen, NO_TOKEN)


def adjust(logits: Tensor, rows: Sequence[Generation]) -> Tensor:
    """Return logits with the penalties and the bias of each row: `b v -> b v`.

    The repetition penalty comes first, since it depends on the sign of the model's own logit.
    """
    repeated: list[tuple[int, np.ndarray, float]] = []  # a row's place, tokens and their penalty
    changed: list[tuple[int, dict[int, float]]] = []  # a row's place, and what is added to the logits of tokens
    for place, row in enumerate(rows):
        request = row.request
        if request.repetition_penalty != 1:
            repeated.append((place, np.unique(row.sequence), request.repetition_penalty))
        if request.logit_bias or row.counts:
            changes = dict(request.logit_bias)
            for token, count in row.counts.items():
                penalty = request.presence_penalty + count * request.frequency_penalty
                changes[token] = changes.get(token, 0.0) - penalty
            changed.append((place, changes))
    adjusted = logits.clone() if repeated or changed else logits
    if repeated:
        entries = [np.broadcast_arrays(place, tokens, penalty) for place, tokens, penalty in repeated]
        places, penalties = _to_device(entries, logits)
        penalised = penalise_repetition(logits[places], torch.ones_like(penalties, dtype=torch.bool), penalties)
        adjusted[places] = penalised
    if changed:
        entries = [np.broadcast_arrays(place, list(part), list(part.values())) for place, part in changed]
        places, values = _to_device(entries, logits)
        adjusted[places] += values
    return adjusted


def _to_device(entries: Sequence[Sequence[np.ndarray]], logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the places of logits, as rows and tokens, and the number for each, from one copy of all three."""
    table = upload(np.concatenate([np.stack(entry) for entry in entries], axis=-1).astype(np.float64), logits.device)
    rows, tokens = table[:2].long()
    return (rows, tokens), table[2].to(logits)


def constrain(logits: Tensor, rows: Sequence[Generation]) -> Tensor:
    """Return logits without the tokens that a row's grammar does not allow next: `b v -> b v`."""
    masks = {place: row.constraint.mask() for place, row in enumerate(rows) if row.constraint is not None}
    if not masks:
        return logits
    places = upload(list(masks), logits.device)
    allowed = upload(torch.stack(list(masks.values())).numpy(), logits.device)
    return logits.index_copy(0, places, logits[places].masked_fill(~allowed, -torch.inf))


def choose(logits: Tensor, rows: Sequence[Generation], options: RowOptions) -> Tensor:
    """Return the likeliest token at temperature 0, else a draw from the distribution: `b v -> b`."""
    chosen = logits.argmax(dim=-1)
    if options.temperature is None:
        return chosen
    # shifted before the division: a temperature near 0, which could overflow, is then close to greedy
    scaled = options.temperature.of(logits).double()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / options.temperature.values
    mass = truncate_rows(scaled, options).exp().cumsum(dim=-1)
    total = mass[:, -1:]
    # always below the total, since no token lies beyond it
    uniform = upload([row.draw() for row in rows if row.request.temperature > 0], logits.device)
    drawn_mass = torch.minimum(uniform.unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(mass, drawn_mass, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return options.temperature.put(drawn, chosen)


def with_alternatives(logits: Tensor, tokens: Tensor, most: int) -> list[TokenLogprob]:
    """Return the log-probabilities of tokens, `n`, after logits, `n v`, each with the likeliest tokens in its place."""
    return logprobs_of(to_lists([rank_tokens(logits, tokens, most)])[0])


def limited(logprob: TokenLogprob, most: int) -> TokenLogprob:
    """Return a log-probability without the alternatives beyond the first `most`."""
    return logprob._replace(alternatives=logprob.alternatives[:most])


def rank_tokens(logits: Tensor, tokens: Tensor, most: int) -> Tensor:
    """Return a row of numbers for each token: itself, its log-probability, its rank, and the likeliest in its place.

    Args:
        logits: `n v`.
        tokens: `n`.
        most: The number of likeliest tokens.

    Returns:
        `n (3 + 2 most)` float64, which holds all numbers exactly: likeliest tokens first, then their log-probabilities.
    """
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(-1, tokens.unsqueeze(-1))
    ranks = (logprobs > own).sum(dim=-1, keepdim=True) + 1
    best = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    return torch.cat([part.double() for part in (tokens.unsqueeze(-1), own, ranks, best.indices, best.values)], dim=-1)


def logprobs_of(rows: Sequence[Sequence[float]]) -> list[TokenLogprob]:
    """Return the log-probabilities that `rank_tokens` found, from its numbers."""
    found = []
    for token, logprob, rank, *best in rows:
        half = len(best) // 2
        pairs = zip(map(int, best[:half]), best[half:], strict=True)
        # ids that cannot be sampled have minus infinity
        alternatives = tuple((other, value) for other, value in pairs if value > -torch.inf)
        found.append(TokenLogprob(int(token), logprob, alternatives, int(rank)))
    return found
