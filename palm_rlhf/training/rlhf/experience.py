"""The rows that an update of reinforcement learning learns from."""

import dataclasses
from collections.abc import Callable, Sequence

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
    first_order: Tensor | None = None  # b: the rows as the first epoch takes them; None: in any order

    def order(self, epoch: int) -> Tensor:
        """The rows in the order in which an epoch, counted from 0, takes them: `b`."""
        return torch.randperm(len(self.sequences)) if epoch or self.first_order is None else self.first_order

    def select(self, rows: Tensor) -> "Experience":
        """Some of the rows, without the columns that only the others need."""
        sequences = self.sequences.select(rows)
        width = int(sequences.response_lengths.max())
        names = {field.name for field in dataclasses.fields(self)} - {"sequences", "first_order"}
        return Experience(sequences, **{name: getattr(self, name)[rows, :width] for name in names})


def first_forwards(order: Tensor, minibatch_size: int, size: int) -> list[Tensor]:
    """The rows of each forward of an epoch that takes them in this order, up to `size` of a minibatch at once."""
    return [rows for minibatch in order.split(minibatch_size) for rows in minibatch.split(size)]


def by_length(sequences: Sequences, size: int) -> list[Tensor]:
    """Rows of like length together, up to `size` of them, so that few pads are read."""
    return list(sequences.lengths.argsort(stable=True).split(size))


def in_batches(
    function: Callable[[Sequences], tuple], sequences: Sequences, batches: Sequence[Tensor]
) -> list[Tensor | None]:
    """`function` of the rows of one batch at a time: `b t`, 0 where only longer responses of others reach.

    Each row is in one of the batches. `function` returns a tuple of tensors, or of None in the place of one.
    """
    width, places = int(sequences.response_lengths.max()), torch.cat(list(batches)).argsort()
    parts = [function(sequences.select(rows)) for rows in batches]
    return [
        None
        if pieces[0] is None
        else torch.cat([F.pad(piece, (0, width - piece.shape[1])) for piece in pieces])[places]
        for pieces in zip(*parts)
    ]
