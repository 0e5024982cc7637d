"""Rows of the length of a context that are filled with examples, so that no computation is spent on padding."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from beartype import beartype

from palm_rlhf.training.epoch_sampler import EpochSampler, require_identity


class _Waiting(NamedTuple):
    """An example that was reached in the order of the epochs, but is in no row yet."""

    place: int
    example: int


class PackedSampler:
    """A sampler that packs examples into rows of `capacity` tokens, with as little padding as their lengths allow.

    Each epoch has a new random order. A row takes the example that has waited longest, and of the next ones in line
    those that fill it best: by dynamic programming over the sums of their lengths (Bellman 1957), which leaves fewer
    tokens empty than first-fit-decreasing. It looks no further ahead than a full row needs: at most `lookahead`
    examples beyond the ones that fill a row by the sum of their lengths. All processes draw the same rows, and take
    their share of them.

    Rows are filled across the ends of epochs: the last step of a run is completed with examples of one more epoch.

    Args:
        lengths: The number of tokens of each example.
        capacity: The number of tokens of a row.
        seed: The seed of the order.
        lookahead: The number of examples to look ahead.
    """

    @beartype
    def __init__(self, lengths: Sequence[int] | np.ndarray, capacity: int, seed: int = 0, *, lookahead: int = 256):
        self.lengths, self.capacity, self.lookahead = [int(length) for length in lengths], capacity, lookahead
        if lookahead < 1:
            raise ValueError(f"got lookahead={lookahead}, expected at least 1 example: raise it")
        for index, length in enumerate(self.lengths):
            if not 0 < length <= capacity:
                raise ValueError(
                    f"got {length} tokens in example {index}, expected 1 to the capacity, "
                    f"{capacity}: split or truncate it"
                )
        self._order = EpochSampler(len(self.lengths), seed)
        self._waiting: list[_Waiting] = []

    @property
    def num_items(self) -> int:
        return len(self.lengths)

    @property
    def num_drawn(self) -> int:
        return self._waiting[0].place if self._waiting else self._order.num_drawn

    @beartype
    def draw(self, count: int) -> list[list[int]]:
        """Return the indices of the examples in each of the next `count` rows."""
        return [self._row() for _ in range(count)]

    def _row(self) -> list[int]:
        # Bit s of reachable[k] is 1 if some of the first k + 1 in line, the first among them, have s tokens together.
        reachable = [1 << self._length(0)]
        full, within = 1 << self.capacity, (2 << self.capacity) - 1
        total, num_spare = self._length(0), 0
        while not reachable[-1] & full and num_spare < self.lookahead:
            length = self._length(len(reachable))
            reachable.append((reachable[-1] | reachable[-1] << length) & within)
            total += length
            num_spare += total > self.capacity

        left = reachable[-1].bit_length() - 1
        taken = [0]
        for place in range(len(reachable) - 1, 0, -1):
            if not reachable[place - 1] >> left & 1:
                taken.append(place)
                left -= self._length(place)
        return [self._waiting.pop(place).example for place in sorted(taken, reverse=True)][::-1]

    def _length(self, place: int) -> int:
        """Return the number of tokens of an example in line; the first is at place 0."""
        while len(self._waiting) <= place:
            self._waiting.append(_Waiting(self._order.num_drawn, *self._order.draw(1)))
        return self.lengths[self._waiting[place].example]

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the sampler, as JSON."""
        return {**self._identity(), "order": self._order.state_dict(), "waiting": [list(one) for one in self._waiting]}

    @beartype
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`; ValueError if it belongs to other data or settings."""
        require_identity(state, self._identity())
        self._order.load_state_dict(state["order"])
        self._waiting = [_Waiting(*one) for one in state["waiting"]]

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(np.array(self.lengths, dtype=np.int64).tobytes()).hexdigest()
        return {"capacity": self.capacity, "lookahead": self.lookahead, "lengths": digest}
