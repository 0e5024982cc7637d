"""The cache of keys and values: what a forward needs of one, and the two kinds that the library itself makes."""

from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from palm_rlhf.ops.cpu.native_decoding import NativeDecoder

# Keys and values of every layer, `b hk capacity d` each; then, `b` int64 each, the column at which a row begins to
# read, and the column to which its next token is written.
DecodingWindow: TypeAlias = tuple[list[Tensor], list[Tensor], Tensor, Tensor]


@runtime_checkable
class Cache(Protocol):
    """The keys and values of earlier tokens, as a forward of `PaLM` reads and extends them.

    For `i` new tokens a row, a forward asks for `positions` and `key_mask`, calls `append` once a layer, and then
    `advance`. Where a native kernel computes the whole step, it writes to the tensors of `window` instead of `append`.
    """

    kernels: "dict[str, NativeDecoder]"
    """Native kernels made for the tensors of `window`, kept for the next token."""

    def positions(self, num_new: int, device: torch.device) -> Tensor:
        """Return the positions of the next tokens: `b i`, or `1 i` where they are the same in every row."""

    def key_mask(self, num_new: int) -> Tensor | None:
        """Return True for the keys, the new ones included, that are tokens: `b j`, or None where all are."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer, and return all of them: `b hk i d -> b hk j d`, twice."""

    def advance(self, num_new: int) -> None:
        """Count tokens that every layer has appended."""

    def window(self) -> DecodingWindow | None:
        """Return the tensors that a kernel reads, and writes one token a row to; None where it cannot."""


class _LeftPadded:
    """Rows of one length, padded on their left, so that every row ends in the same column.

    Padding is masked and takes no position, so that the numbers of a row do not depend on the rows beside it.
    """

    length: int
    left_padding: Tensor | None  # `b`, the padding before each row; None where there is none

    def positions(self, num_new: int, device: torch.device) -> Tensor:
        """Return the positions of the next tokens: `1 i`, or `b i` with padding, whose own positions are 0."""
        columns = torch.arange(self.length, self.length + num_new, device=device).unsqueeze(0)
        if self.left_padding is None:
            return columns
        return (columns - self.left_padding.unsqueeze(-1)).clamp(min=0)

    def key_mask(self, num_new: int) -> Tensor | None:
        """Return True for the keys, the new ones included, that are tokens: `b j`, or None where all are."""
        if self.left_padding is None:
            return None
        columns = torch.arange(self.length + num_new, device=self.left_padding.device)
        return columns >= self.left_padding.unsqueeze(-1)

    def advance(self, num_new: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += num_new


class KVCache(_LeftPadded):
    """Memory for the keys and values of every layer, filled from the left, by the same number of tokens in every row.

    Args:
        depth: number of layers.
        batch: number of rows.
        kv_heads: heads of keys and values.
        capacity: the most tokens of a row, its padding included.
        dim_head: width of a head.
        left_padding: `b`, the number of padding tokens before each row.
        device: where the tensors lie.
        dtype: of the keys and values.
    """

    def __init__(
        self,
        *,
        depth: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        dim_head: int,
        left_padding: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (batch, kv_heads, capacity, dim_head)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(depth)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(depth)]
        self.capacity, self.length = capacity, 0
        self.kernels: dict[str, NativeDecoder] = {}
        self.left_padding = None
        if left_padding is not None and bool(left_padding.any()):
            self.left_padding = left_padding.to(device, torch.int64).contiguous()

    def window(self) -> DecodingWindow:
        """Return all keys and values, and the columns that each row reads from and writes to."""
        self._require_room(self.length + 1)
        lengths = torch.full((len(self.keys[0]),), self.length, device=self.keys[0].device)
        return self.keys, self.values, torch.zeros_like(lengths) if (p := self.left_padding) is None else p, lengths

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer, and return all of them: `b hk i d -> b hk j d`, twice."""
        stop = self.length + k.shape[2]
        self._require_room(stop)
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, self.length, k.shape[2]).copy_(k)
        values.narrow(2, self.length, k.shape[2]).copy_(v)
        return keys.narrow(2, 0, stop), values.narrow(2, 0, stop)

    def _require_room(self, num_tokens: int) -> None:
        if num_tokens > self.capacity:
            raise ValueError(f"{num_tokens} tokens in a cache with room for {self.capacity}; make it larger")

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows, in the given order (a row may come more than once): rows `b'`, integer."""
        self.keys = [t.index_select(0, rows) for t in self.keys]
        self.values = [t.index_select(0, rows) for t in self.values]
        if self.left_padding is not None:
            self.left_padding = self.left_padding.index_select(0, rows)


class PromptCache(_LeftPadded):
    """Keys and values of prompts that several rows continue, with their gradients.

    First read the prompts, padded on the left. Then call `select` once, and read the tokens that follow in each row.

    Args:
        depth: number of layers.
        left_padding: `b`, the number of padding tokens before each prompt.
    """

    def __init__(self, depth: int, left_padding: Tensor):
        self.prompts: list[tuple[Tensor, Tensor] | None] = [None] * depth  # keys and values of each layer
        self.length = 0
        self.rows: Tensor | None = None
        self.kernels: dict[str, NativeDecoder] = {}
        self.left_padding = left_padding if bool(left_padding.any()) else None

    def window(self) -> None:
        """Return None: the keys and values carry gradients, and have no memory that a kernel could write to."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of the prompts, or return them before those of the rows: `b hk i d -> b hk j d`."""
        prompts = self.prompts[layer]
        if self.rows is None or prompts is None:
            self.prompts[layer] = k, v
            return k, v
        keys, values = (kept.index_select(0, self.rows) for kept in prompts)
        return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)

    def select(self, rows: Tensor) -> None:
        """Choose the prompt that each of the coming rows continues: `b'`, integer."""
        self.rows = rows
        if self.left_padding is not None:
            self.left_padding = self.left_padding.index_select(0, rows)
