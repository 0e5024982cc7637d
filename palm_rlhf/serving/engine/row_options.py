"""The sampling options of the rows of a batch as columns of tensors, and truncation by them, for all rows at once."""

from collections.abc import Sequence
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf.ops.sampling import keep_min_p, keep_top_p
from palm_rlhf.serving.engine.transfer import upload
from palm_rlhf.serving.generation import Request


class Column(NamedTuple):
    """One option of the rows that have it: `values`, `n 1` float64, of the rows `places`, `n`; None is every row."""

    places: Tensor | None
    values: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """Return these rows: `b ... -> n ...`."""
        return rows if self.places is None else rows[self.places]

    def put(self, changed: Tensor, rows: Tensor) -> Tensor:
        """Put other rows in these places, and return all rows: `n ..., b ... -> b ...`."""
        return changed if self.places is None else rows.index_copy_(0, self.places, changed)


class RowOptions:
    """The options of so many requests, in their order; made anew only where the rows of a batch change.

    `top_k`, `top_p` and `min_p` count the rows of a temperature above 0 only, which are drawn. `simple` is whether all
    requests are, see `is_simple`.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device):
        self.requests, self.device = list(requests), device
        drawn = [request for request in requests if request.temperature > 0]
        self.temperature = self._column([request.temperature or None for request in requests])
        self.top_k = self._column([request.top_k for request in drawn])
        self.top_p = self._column([None if request.top_p == 1 else request.top_p for request in drawn])
        self.min_p = self._column([request.min_p or None for request in drawn])
        self.largest_k = max((request.top_k or 0 for request in drawn), default=0)
        self.scored = self._column([request.logprobs for request in requests])
        self.simple = all(map(is_simple, requests))
        self.most_alternatives = max((request.logprobs or 0 for request in requests), default=0)

    def are_of(self, requests: Sequence[Request], device: torch.device) -> bool:
        """Return whether these are the options of the given requests, in their order."""
        same = len(requests) == len(self.requests) and all(map(is_, requests, self.requests))
        return same and device == self.device

    def _column(self, values: Sequence[float | None]) -> Column | None:
        """Return the column of a row's values, without the rows of None; None where no row is left."""
        places = [place for place, value in enumerate(values) if value is not None]
        if not places:
            return None
        column = upload([float(values[place] or 0) for place in places], self.device).unsqueeze(-1)
        return Column(None if len(places) == len(values) else upload(places, self.device), column)


def is_simple(request: Request) -> bool:
    """Return whether a next token depends on nothing but logits: not on the tokens before it, nor on a bias."""
    penalised = request.repetition_penalty != 1 or request.presence_penalty != 0 or request.frequency_penalty != 0
    return not penalised and not request.logit_bias and request.grammar is None and request.logprobs is None


def truncate_rows(logits: Tensor, options: RowOptions) -> Tensor:
    """Apply top-k, top-p and min-p in turn, to each drawn row by its own options: `b v -> b v`."""

    def keep_top_k(rows: Tensor, ks: Tensor) -> Tensor:
        num_tokens = rows.shape[-1]
        largest = rows.topk(min(options.largest_k, num_tokens), dim=-1).values
        floor = largest.gather(-1, ks.long().clamp(max=num_tokens) - 1)
        return rows.masked_fill(rows < floor, -torch.inf)

    for column, keep in ((options.top_k, keep_top_k), (options.top_p, keep_top_p), (options.min_p, keep_min_p)):
        if column is not None:
            logits = column.put(keep(column.of(logits), column.values), logits)
    return logits
