"""A step that a GPU computes while Python looks at the tokens of the step before."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palm_rlhf.serving.engine.transfer import upload
from palm_rlhf.serving.generation import Generation


class LaunchedStep:
    """The next tokens of some rows, which are on their way: a GPU may not have computed them yet.

    Args:
        rows: The sequences, in the order of the tokens.
        tokens: `b` int64, on the device.
    """

    def __init__(self, rows: Sequence[Generation], tokens: Tensor):
        self.rows: list[Generation | None] = list(rows)  # None: the sequence has left meanwhile
        self.tokens = tokens
        self._copy, self._copied = tokens, None
        if tokens.is_cuda:  # copied now: later, the copy would wait for the next step
            self._copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._copy.copy_(tokens, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tokens.device))

    def has(self, rows: Sequence[Generation]) -> bool:
        """Return whether the step computes a token for each of these sequences."""
        return set(map(id, rows)) <= set(map(id, self.rows))

    def tokens_of(self, rows: Sequence[Generation]) -> Tensor:
        """Return the tokens of sequences of this step, in their order, on the device: `b`."""
        if rows == self.rows:
            return self.tokens
        places = {id(row): place for place, row in enumerate(self.rows)}
        return self.tokens[upload([places[id(row)] for row in rows], self.tokens.device)]

    def drop(self, generation: Generation) -> None:
        """Forget the token of a sequence that leaves; one that comes back draws the same token again."""
        if generation in self.rows:
            self.rows[self.rows.index(generation)] = None
            generation.redraw()

    def wait(self) -> list[tuple[Generation, int]]:
        """Wait for the tokens, and return those of the sequences that are still there."""
        if self._copied is not None:
            self._copied.synchronize()
        return [(row, token) for row, token in zip(self.rows, self._copy.tolist(), strict=True) if row is not None]
