"""Training windows drawn from token arrays, in an order whose state is a few counters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.training.epoch_sampler import require_identity

Tokens = np.ndarray | Tensor  # 1-d, any integer dtype, memory-mapped or not


class Window(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of one source; all but the first are targets."""

    source: int
    start: int
    stop: int

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted in the window."""
        return self.stop - self.start - 1


@beartype
def token_arrays(data: Tokens | Sequence[Tokens], num_tokens: int, name: str, min_length: int = 2) -> list[np.ndarray]:
    """Return the sources of `data` as 1-d integer arrays, without copying them. Raises ValueError for wrong token ids.

    An array whose dtype cannot hold an id out of range, as bytes for a byte-level model, is not scanned.
    """
    sources = [data] if isinstance(data, Tokens) else list(data)
    if not sources:
        raise ValueError(f"{name} is empty: got no arrays, expected at least one 1-d array of token ids")
    arrays = [source.detach().cpu().numpy() if isinstance(source, Tensor) else source for source in sources]
    for index, array in enumerate(arrays):
        label = f"{name}[{index}]" if len(arrays) > 1 else name
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"{label} is {array.dtype} of shape {tuple(array.shape)}, expected a 1-d array of integer token ids"
            )
        if len(array) < min_length:
            raise ValueError(f"{label} has {len(array)} tokens, expected at least {min_length}: leave the source out")
        _check_ids(array, num_tokens, label)
    return arrays


def _check_ids(array: np.ndarray, num_tokens: int, label: str, chunk: int = 1 << 22) -> None:
    limits = np.iinfo(array.dtype)
    if limits.min == 0 and limits.max < num_tokens:
        return
    for start in range(0, len(array), chunk):
        part = array[start : start + chunk]
        if int(part.min()) < 0 or int(part.max()) >= num_tokens:
            at = int(np.flatnonzero((part < 0) | (part >= num_tokens))[0])
            raise ValueError(
                f"{label} has the token id {int(part[at])} at position {start + at}, expected 0 to {num_tokens - 1}: "
                f"build the model with a num_tokens that covers the tokenizer, or tokenize the data again"
            )


class WindowSampler:
    """A sampler of windows of up to `seq_len` targets, in a random order that the seed decides.

    Each epoch of a source cuts it at a random offset into windows that do not overlap, and goes through them in random
    order, so every token but the source's first is a target exactly once an epoch. The next window always comes from
    the source that is furthest behind its share, by `weights` or else by length.
    """

    @beartype
    def __init__(
        self, arrays: Sequence[np.ndarray], seq_len: int, seed: int, weights: Sequence[float | int] | None = None
    ):
        self.arrays, self.seq_len, self.seed = list(arrays), seq_len, seed
        weights = [len(array) for array in arrays] if weights is None else list(weights)
        if len(weights) != len(arrays) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights is {weights}, expected {len(arrays)} positive numbers, one for each array")
        self.shares = np.array(weights, dtype=np.float64) / sum(weights)
        self.drawn = np.zeros(len(arrays), dtype=np.int64)
        self.epochs = [0] * len(arrays)
        self.positions = [0] * len(arrays)
        self._orders: dict[int, tuple[int, int, np.ndarray]] = {}

    @beartype
    def draw(self, count: int) -> list[Window]:
        """Return the next `count` windows; all processes draw the same ones, and read their own part."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Window:
        due = self.shares * (self.drawn.sum() + 1) - self.drawn
        source = int(due.argmax())
        offset, order = self._order(source)
        piece = int(order[self.positions[source]])
        last = len(self.arrays[source]) - 1
        start = max(offset + (piece - 1) * self.seq_len, 0)
        stop = min(offset + piece * self.seq_len, last) + 1
        self.drawn[source] += 1
        self.positions[source] += 1
        if self.positions[source] == len(order):
            self.epochs[source], self.positions[source] = self.epochs[source] + 1, 0
        return Window(source, start, stop)

    def _order(self, source: int) -> tuple[int, np.ndarray]:
        """Return the end of the first window, and the order of the windows, in the source's present epoch."""
        epoch = self.epochs[source]
        if self._orders.get(source, (-1,))[0] != epoch:
            last = len(self.arrays[source]) - 1
            generator = np.random.default_rng([self.seed, source, epoch])
            offset = last if last <= self.seq_len else int(generator.integers(1, self.seq_len + 1))
            num_windows = 1 + -(-(last - offset) // self.seq_len)
            self._orders[source] = (epoch, offset, generator.permutation(num_windows))
        return self._orders[source][1:]

    @beartype
    def read(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor | None]:
        """Return the windows' tokens `b n` (int64), and their mask `b n`, which is None without padding."""
        return read_windows(self.arrays, windows, self.seq_len + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the sampler, as JSON: a few numbers for each source."""
        return {
            **self._identity(),
            "drawn": self.drawn.tolist(),
            "epochs": list(self.epochs),
            "positions": list(self.positions),
        }

    @beartype
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ValueError where it belongs to other data or another setting."""
        require_identity(state, self._identity())
        self.drawn = np.array(state["drawn"], dtype=np.int64)
        self.epochs, self.positions = list(state["epochs"]), list(state["positions"])
        self._orders.clear()

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "seq_len": self.seq_len, "lengths": [len(array) for array in self.arrays]}


@beartype
def read_windows(arrays: Sequence[np.ndarray], windows: Sequence[Window], width: int) -> tuple[Tensor, Tensor | None]:
    """Return windows as a batch `b width`, padded with zeros on the right, and its mask, None without padding."""
    tokens = np.zeros((len(windows), width), dtype=np.int64)
    for row, (source, start, stop) in zip(tokens, windows, strict=True):
        row[: stop - start] = arrays[source][start:stop]
    mask = np.arange(width) < np.array([[stop - start] for _, start, stop in windows])
    return torch.from_numpy(tokens), None if mask.all() else torch.from_numpy(mask)
