"""The rows that an update of reinforcement learning learns from."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.policy.sequences import Sequences


@dataclasses.dataclass(frozen=True)
class Experience:
    """Responses, and the numbers of the rollout that the losses compare with; `b t` each."""

    sequences: Sequences
    action_mask: Tensor  # of the responses that the losses are of
    logprobs: Tensor
    ref_logprobs: Tensor  # where there is no reference, the policy's own
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> "Experience":
        """Some of the rows, without the columns that only the others need."""
        sequences = self.sequences.select(rows)
        width = int(sequences.response_lengths.max())
        _, *rest = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Experience(sequences, *(part[rows, :width] for part in rest))


def in_batches(function: Callable[[Sequences], tuple], sequences: Sequences, size: int) -> list[Tensor | None]:
    """`function` of up to `size` rows of like length at a time: `b t`, 0 where only longer responses of others reach.

    `function` returns a tuple of tensors, or of None in the place of one.
    """
    width = int(sequences.response_lengths.max())
    order = sequences.lengths.argsort(stable=True)
    parts = [function(sequences.select(rows)) for rows in order.split(size)]
    return [
        None
        if pieces[0] is None
        else torch.cat([F.pad(piece, (0, width - piece.shape[1])) for piece in pieces])[order.argsort()]
        for pieces in zip(*parts)
    ]
