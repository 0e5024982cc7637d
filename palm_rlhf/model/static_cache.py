"""A cache of fixed memory, for decoding steps whose shapes and addresses never change, as a CUDA graph needs it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from palm_rlhf.model.cache import KVCache
    from palm_rlhf.ops.cpu.native_decoding import NativeDecoder

COLUMN_BLOCK = 256  # the least number of columns that a step reads; 8 blocks to the next power of two above 2048


def round_columns(num_columns: int) -> int:
    """Return the columns that a step reads to see at least `num_columns`: few sizes, so that there are few graphs."""
    block = max(COLUMN_BLOCK, (1 << (num_columns - 1).bit_length()) // 8)
    return -(-num_columns // block) * block


def round_rows(num_rows: int) -> int:
    """Return the rows of the step that computes `num_rows`: 1, 2, 4, or a multiple of 8."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


class StaticCache:
    """Keys and values at fixed addresses, to which a forward adds one token a row, each row at its own length.

    A step reads all columns of the cache and masks those that a row has not reached, or that are padding. So neither a
    shape nor an address depends on the tokens, and no step reads a number back from the device. `view` makes the cache
    of fewer rows and columns in the same memory: a step need not read the memory that no row has reached.

    A row writes its next token to the column `lengths`, which must be below the number of columns.

    Args:
        depth: number of layers.
        batch: number of rows.
        kv_heads: heads of keys and values.
        capacity: number of columns: the most tokens of a row, its padding included.
        dim_head: width of a head.
        device: where the tensors lie.
        dtype: of the keys and values.
    """

    keys: list[Tensor]  # `b hk capacity d` of each layer
    values: list[Tensor]
    lengths: Tensor  # `b` int64, the column of each row's next token
    first: Tensor  # `b` int64, the column of each row's first token, after its padding
    columns: Tensor  # `capacity` int64, the number of each column

    def __init__(
        self,
        *,
        depth: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        dim_head: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (batch, kv_heads, capacity, dim_head)
        # zeros: masked columns are read too, and no mask hides the NaN that new memory may hold
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(depth)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(depth)]
        self.lengths, self.first = (torch.zeros(batch, device=device, dtype=torch.int64) for _ in range(2))
        self.columns = torch.arange(capacity, device=device)
        self.kernels: dict[str, NativeDecoder] = {}

    @property
    def batch(self) -> int:
        """The number of rows."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """The number of columns."""
        return len(self.columns)

    @classmethod
    def around(
        cls, keys: list[Tensor], values: list[Tensor], lengths: Tensor, first: Tensor, columns: Tensor
    ) -> "StaticCache":
        """Return a cache in memory that is there already: the attributes of the same names."""
        cache = object.__new__(cls)
        cache.keys, cache.values, cache.kernels = keys, values, {}
        cache.lengths, cache.first, cache.columns = lengths, first, columns
        return cache

    def view(self, batch: int, capacity: int) -> "StaticCache":
        """Return the cache of the first rows and columns, in the same memory."""
        keys, values = ([t[:batch, :, :capacity] for t in kept] for kept in (self.keys, self.values))
        return StaticCache.around(keys, values, self.lengths[:batch], self.first[:batch], self.columns[:capacity])

    def fill(self, prompts: "KVCache", copies: int = 1) -> None:
        """Begin anew with the keys and values of prompts, each in `copies` neighbouring rows; other rows are empty.

        Rows beyond those of the prompts read nothing but the tokens that are added to them.
        """
        length, rows = prompts.length, len(prompts.keys[0]) * copies
        for kept, read in ((self.keys, prompts.keys), (self.values, prompts.values)):
            for target, source in zip(kept, read, strict=True):
                target.zero_()  # also what an earlier use left, which may be NaN
                by_prompt = target[:rows, :, :length].unflatten(0, (-1, copies))
                by_prompt.copy_(source[:, :, :length].unsqueeze(1))
        self.lengths.fill_(length)
        self.first.fill_(length)
        padding = 0 if prompts.left_padding is None else prompts.left_padding.repeat_interleave(copies)
        self.first[:rows] = padding

    def select(self, rows: Tensor) -> None:
        """Move the given rows to the front, in the given order: rows `b'`, integer, on the device of the cache."""
        for kept in (*self.keys, *self.values, self.lengths, self.first):
            kept[: len(rows)] = kept.index_select(0, rows)

    def positions(self, num_new: int = 1, device: torch.device | None = None) -> Tensor:
        """Return the positions of the next tokens: `b 1`."""
        return (self.lengths - self.first).unsqueeze(-1)

    def key_mask(self, num_new: int = 1) -> Tensor:
        """Return True for the columns from a row's first token to its next one: `b capacity`."""
        return (self.columns >= self.first.unsqueeze(-1)) & (self.columns <= self.lengths.unsqueeze(-1))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer, and return those of all columns: `b hk 1 d -> b hk capacity d`."""
        if k.shape[2] != 1:
            raise ValueError(f"got {k.shape[2]} tokens a row, expected 1: read prompts into a KVCache, then use `fill`")
        keys, values = self.keys[layer], self.values[layer]
        column = self.lengths.view(-1, 1, 1, 1).expand(k.shape)
        keys.scatter_(2, column, k.to(keys.dtype))
        values.scatter_(2, column, v.to(values.dtype))
        return keys, values

    def advance(self, num_new: int = 1) -> None:
        """Go on to the next column in every row."""
        self.lengths += 1

    def window(self) -> None:
        """Return None: the columns are masked by PyTorch's operations and the kernels of a GPU alone."""
