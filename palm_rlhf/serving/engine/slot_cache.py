"""Keys and values of many sequences of different lengths, in one block of memory that stays within a budget."""

from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from palm_rlhf.model.cache import DecodingWindow
from palm_rlhf.model.palm import PaLM

if TYPE_CHECKING:
    from palm_rlhf.ops.cpu.native_decoding import NativeDecoder
    from palm_rlhf.serving.engine.static_step import StaticStep


class SlotCache:
    """A row for each sequence, each filled from its left, in one block `rows hk columns d` for each layer.

    The block grows with what is reserved, and never beyond `max_tokens` = rows x columns. A row holds old numbers
    beyond its length, which attention masks. `row` and `rows` return views that a PaLM takes as its cache.

    `static_step` is the step of a GPU on these blocks, if there is one; a resize drops it.
    """

    def __init__(self, palm: PaLM, *, max_tokens: int, max_rows: int):
        config = palm.config
        self.depth, self.kv_heads, self.dim_head = config.depth, config.kv_heads, config.dim_head
        self.device, self.dtype = palm.device, palm.dtype
        self.max_tokens, self.max_rows = max_tokens, max_rows
        self.kernels: dict[str, NativeDecoder] = {}
        self.static_step: StaticStep | None = None
        self.clear()

    @staticmethod
    def bytes_per_token(palm: PaLM) -> int:
        """Return the memory of the keys and values of one token in all layers, in bytes."""
        config = palm.config
        return 2 * config.depth * config.kv_heads * config.dim_head * palm.dtype.itemsize

    def clear(self) -> None:
        """Forget all sequences, and free the memory."""
        self._drop_steps()
        self.num_rows = self.num_columns = 0
        self.keys, self.values = ([self._block(0, 0) for _ in range(self.depth)] for _ in range(2))

    def _drop_steps(self) -> None:
        """Forget the native kernels and the static step, which hold the old blocks."""
        if self.static_step is not None and self.device.type == "cuda":
            with suppress(RuntimeError):  # an error of the GPU was raised where it happened
                torch.cuda.synchronize(self.device)  # a graph may still run
        self.kernels.clear()
        self.static_step = None

    def _block(self, rows: int, columns: int) -> Tensor:
        # zeros, since new memory may hold NaN, which no mask would hide
        return torch.zeros(rows, self.kv_heads, columns, self.dim_head, device=self.device, dtype=self.dtype)

    def reserve(self, rows: int, columns: int, used: list[int]) -> bool:
        """Make room for `rows` of `columns`; return False, and change nothing, where the budget forbids it.

        Raises MemoryError, and changes nothing, where the machine has less memory than the budget.

        Args:
            used: The lengths of the rows in use, whose contents stay as far as there are columns for them.
        """
        if rows <= self.num_rows and columns <= self.num_columns:
            return True
        more = min(max(rows, 2 * self.num_rows), self.max_rows) if rows > self.num_rows else self.num_rows
        roomy = more, max(columns, self.num_columns)
        shapes = roomy, (rows, max(columns, self.num_columns)), (rows, columns)
        within = list(dict.fromkeys(shape for shape in shapes if shape[0] * shape[1] <= self.max_tokens))
        for shape in within:
            try:
                self._resize(shape, len(used), max(used, default=0))
                return True
            except (MemoryError, RuntimeError) as error:
                self._resize((self.num_rows, self.num_columns), len(used), max(used, default=0))
                if shape == within[-1]:
                    raise MemoryError(
                        f"there is no memory for the keys and values of {rows} sequences of {columns} tokens"
                    ) from error
        return False

    def _resize(self, shape: tuple[int, int], num_used: int, longest: int) -> None:
        self._drop_steps()
        for blocks in (self.keys, self.values):
            for layer, old in enumerate(blocks):  # one layer at a time: there are never two caches
                if (old.shape[0], old.shape[2]) != shape:
                    blocks[layer], kept = self._block(*shape), min(longest, old.shape[2], shape[1])
                    blocks[layer][:num_used, :, :kept] = old[:num_used, :, :kept]
        self.num_rows, self.num_columns = shape

    def wipe(self, row: int) -> None:
        """Set a row to zero: it may hold NaN, which no mask would hide."""
        for block in (*self.keys, *self.values):
            block[row] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of one row to another."""
        for block in (*self.keys, *self.values):
            block[target, :, :length] = block[source, :, :length]

    def read(self, row: int, start: int, stop: int) -> Tensor:
        """Return a copy of some tokens of a row: `layers-and-kinds hk n d`."""
        return torch.stack([block[row, :, start:stop] for block in (*self.keys, *self.values)])

    def write(self, row: int, contents: Tensor) -> None:
        """Put contents that `read` returned at the beginning of a row."""
        for block, part in zip((*self.keys, *self.values), contents, strict=True):
            block[row, :, : part.shape[1]] = part

    def views(self, rows: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Return the keys and the values of some rows, by layer."""
        return [block[rows] for block in self.keys], [block[rows] for block in self.values]

    def row(self, row: int, length: int, count: int = 1) -> "AlignedRows":
        """Return the cache of a row, or of `count` rows of one length from it on, for any number of new tokens."""
        return AlignedRows(self, row, length, count)

    def rows(self, lengths: list[int]) -> "AlignedRows | RaggedRows":
        """Return the cache of the first rows, which have these lengths, for one new token each."""
        return AlignedRows(self, 0, lengths[0]) if len(lengths) == 1 else RaggedRows(self, lengths)


class AlignedRows:
    """Neighbouring rows of one length, as the `Cache` of a forward over `b i` tokens."""

    def __init__(self, slots: SlotCache, row: int, length: int, count: int = 1):
        self.slots, self.index, self.length, self.kernels = slots, slice(row, row + count), length, slots.kernels

    def window(self) -> DecodingWindow:
        """Return the keys and values of these rows, and the columns that each row reads from and writes to."""
        count, like = self.index.stop - self.index.start, self.slots.device
        first, lengths = torch.tensor([[0] * count, [self.length] * count], device=like)
        return *self.slots.views(self.index), first, lengths

    def key_mask(self, num_new: int) -> None:
        """Return None, since every key is a token."""

    def positions(self, num_new: int, device: torch.device) -> Tensor:
        """Return the positions of the next tokens: `1 i`."""
        return torch.arange(self.length, self.length + num_new, device=device).unsqueeze(0)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer, and return all of them: `b hk i d -> b hk j d`, twice."""
        stop = self.length + k.shape[2]
        keys, values = self.slots.keys[layer][self.index], self.slots.values[layer][self.index]
        keys[:, :, self.length : stop] = k
        values[:, :, self.length : stop] = v
        return keys[:, :, :stop], values[:, :, :stop]

    def advance(self, num_new: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += num_new


class RaggedRows:
    """The first rows, each at its own length, as the `Cache` of a forward over `b 1` tokens."""

    def __init__(self, slots: SlotCache, lengths: list[int]):
        self.slots, self.longest, self.kernels = slots, max(lengths), slots.kernels
        self.lengths = torch.tensor(lengths, device=slots.device)
        self.index = torch.arange(len(lengths), device=slots.device)
        self.ragged = min(lengths) < self.longest

    def window(self) -> DecodingWindow:
        """Return the keys and values of these rows, and the columns that each row reads from and writes to."""
        return *self.slots.views(slice(len(self.lengths))), torch.zeros_like(self.lengths), self.lengths

    def key_mask(self, num_new: int) -> Tensor | None:
        """Return True for the keys, the new ones included, that are tokens: `b j`, or None where all are."""
        if not self.ragged:
            return None
        columns = torch.arange(self.longest + num_new, device=self.lengths.device)
        return columns <= self.lengths.unsqueeze(-1)

    def positions(self, num_new: int, device: torch.device) -> Tensor:
        """Return the positions of the next tokens: `b 1`."""
        return self.lengths.unsqueeze(-1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer, and return those of all columns: `b hk 1 d -> b hk j d`, twice."""
        keys, values = self.slots.keys[layer], self.slots.values[layer]
        keys[self.index, :, self.lengths] = k.squeeze(2)
        values[self.index, :, self.lengths] = v.squeeze(2)
        window = slice(len(self.lengths)), slice(None), slice(self.longest + 1)
        return keys[window], values[window]

    def advance(self, num_new: int) -> None:
        """Do nothing: each step makes new rows from the lengths of its sequences."""
