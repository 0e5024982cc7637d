"""Examples drawn by their indices, epoch by epoch, and dealt out to processes and micro-batches."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from beartype import beartype

Item = TypeVar("Item")


@beartype
def require_identity(state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise ValueError where the state of a sampler has another identity: other data, or another setting."""
    for key, present in identity.items():
        if state.get(key) != present:
            raise ValueError(
                f"the checkpoint's sampler has {key} {state.get(key)}, this run has {present}: "
                f"resume with the data and settings of the run, or start one in another output_dir"
            )


class EpochSampler:
    """A sampler of the indices of `num_items` examples: each once an epoch, in a random order that the seed decides.

    Its only state is `num_drawn`, the number of indices drawn so far.
    """

    @beartype
    def __init__(self, num_items: int, seed: int):
        if num_items < 1:
            raise ValueError(f"num_items is {num_items}, expected at least one example to draw")
        self.num_items, self.seed = num_items, seed
        self.num_drawn = 0
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next index, from 0."""
        return self.num_drawn // self.num_items

    @beartype
    def draw(self, count: int) -> list[int]:
        """Return the next `count` indices, which may cross the end of an epoch; all processes draw the same ones."""
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        epoch, position = divmod(self.num_drawn, self.num_items)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_items)
        self.num_drawn += 1
        return int(self._order[1][position])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the sampler, as JSON."""
        return {**self._identity(), "num_drawn": self.num_drawn}

    @beartype
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ValueError where it belongs to other data or another seed."""
        require_identity(state, self._identity())
        self.num_drawn = state["num_drawn"]

    def _identity(self) -> dict[str, Any]:
        return {"num_items": self.num_items, "seed": self.seed}


@beartype
def micro_batches(items: Sequence[Item], size: int, shard: tuple[int, int] = (0, 1)) -> list[Sequence[Item]]:
    """Return a process's share of a step's items, in batches of at most `size`; `shard=(i, k)` is the i-th of k.

    Where k divides the number of items, as replicas need it, all processes have the same number of batches.
    """
    index, num_shards = shard
    mine = items[index::num_shards]
    return [mine[first : first + size] for first in range(0, len(mine), size)]
