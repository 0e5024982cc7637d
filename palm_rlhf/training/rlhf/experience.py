"""The rows that an update of reinforcement learning learns from."""

import dataclasses

from torch import Tensor

from palm_rlhf.policy.sequences import Sequences


@dataclasses.dataclass(frozen=True)
class Experience:
    """Responses, and the numbers of the rollout that the losses compare with; `b t` each."""

    sequences: Sequences
    action_mask: Tensor  # of the responses that have a score
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
