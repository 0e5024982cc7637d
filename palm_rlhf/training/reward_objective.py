"""From the scores of ranked responses to the loss of a reward model."""

import math
from collections.abc import Sequence

import torch
from beartype import beartype
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palm_rlhf.algorithms.preferences import bradley_terry_loss, plackett_luce_loss, ranking_loss
from palm_rlhf.ops.pinned_copy import upload
from palm_rlhf.training.ranked_data import Item, Ranking


@beartype
def loss_denominator(items: Sequence[Item], loss: str) -> float:
    """Return what the loss of a whole optimiser step is divided by: the weight of its items, or of their pairs.

    It is 1 where no item has a weight, so that the loss is 0.
    """
    counts = [item.num_pairs if loss == "bradley_terry" else 1 for item in items]
    weights = [item.weight if isinstance(item, Ranking) else 1.0 for item in items]
    return math.fsum(weight * count for weight, count in zip(weights, counts, strict=True)) or 1.0


@beartype
def ranking_objective(
    scores: Tensor, rankings: Sequence[Ranking], loss: str, *, centering: float | int, denominator: float
) -> tuple[Tensor, Tensor]:
    """Return the share of some rankings in a step's loss, and how many of their pairs are in the right order.

    Args:
        scores: of all responses before normalisation, those to one prompt next to each other: `n`.
        rankings: the rankings of these responses.
        loss: ranking, bradley_terry or plackett_luce.
        centering: weight of the squared sum of a pair's scores.
        denominator: the `loss_denominator` of the whole step.
    """
    rows = scores.split([len(ranking.responses) for ranking in rankings])
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    scores = pad_sequence(rows, batch_first=True)  # b k
    # pairs in the order of itertools.combinations, row by row, as margins have it
    pairs = (mask.unsqueeze(-1) & mask.unsqueeze(-2)).triu(1).nonzero().T
    row, better, worse = upload(pairs, scores.device)
    mask = upload(mask, scores.device)
    chosen, rejected = scores[row, better], scores[row, worse]
    weights = None
    if any(ranking.weight != 1 for ranking in rankings):
        weights = upload(torch.tensor([ranking.weight for ranking in rankings]), scores.device)
    if loss == "ranking":
        total = ranking_loss(scores, mask, centering=centering, weights=weights, denominator=denominator)
    elif loss == "plackett_luce":
        total = plackett_luce_loss(scores, mask, weights=weights, denominator=denominator)
    else:
        margins = torch.tensor([m for ranking in rankings for m in ranking.pair_margins])
        total = bradley_terry_loss(
            chosen,
            rejected,
            margin=upload(margins, scores.device),
            centering=centering,
            weights=None if weights is None else weights[row],
            denominator=denominator,
        )
    return total, (chosen > rejected).sum()
