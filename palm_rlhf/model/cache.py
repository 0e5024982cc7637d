"""Keys and values of the tokens already read."""

import torch
from torch import Tensor


class KVCache:
    """Room for the keys and values of every layer, filled from the left, the same number of tokens in every row.

    Rows of different lengths are padded on their left: `left_padding` (`b`) counts each row's pads, which are masked
    and take no position, so that a row's numbers do not depend on its neighbours.
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
        self.kernels = {}  # that read it, made by whoever uses them
        self.left_padding = None
        if left_padding is not None and bool(left_padding.any()):
            self.left_padding = left_padding.to(device, torch.int64).contiguous()

    def positions(self, num_new: int, device: torch.device) -> Tensor:
        """Positions of the next tokens: `1 i`, or `b i` with padding (whose own positions are 0)."""
        columns = torch.arange(self.length, self.length + num_new, device=device).unsqueeze(0)
        if self.left_padding is None:
            return columns
        return (columns - self.left_padding.unsqueeze(-1)).clamp(min=0)

    def key_mask(self, num_new: int) -> Tensor | None:
        """Which of the keys, the new ones included, are tokens: `b j`, or None where all are."""
        if self.left_padding is None:
            return None
        columns = torch.arange(self.length + num_new, device=self.left_padding.device)
        return columns >= self.left_padding.unsqueeze(-1)

    def window(self) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """What each row's next token reads: keys, values, and the columns from the first up to its own, `b`, `b`."""
        if self.length >= self.capacity:
            raise ValueError(f"{self.length + 1} tokens in a cache with room for {self.capacity}; make it larger")
        lengths = torch.full((len(self.keys[0]),), self.length, device=self.keys[0].device)
        return self.keys, self.values, torch.zeros_like(lengths) if (p := self.left_padding) is None else p, lengths

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, and return all of them: `b hk i d -> b hk j d`, twice."""
        stop = self.length + k.shape[2]
        if stop > self.capacity:
            raise ValueError(f"{stop} tokens in a cache with room for {self.capacity}; make it larger")
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, self.length, k.shape[2]).copy_(k)
        values.narrow(2, self.length, k.shape[2]).copy_(v)
        return keys.narrow(2, 0, stop), values.narrow(2, 0, stop)

    def advance(self, num_new: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += num_new

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows, in the given order (a row may come more than once): rows `b'`, integer."""
        self.keys = [t.index_select(0, rows) for t in self.keys]
        self.values = [t.index_select(0, rows) for t in self.values]
        if self.left_padding is not None:
            self.left_padding = self.left_padding.index_select(0, rows)


class PromptCache(KVCache):
    """Keys and values of prompts that several rows each go on from, with their gradients.

    The prompts are read first, padded on the left; then, once after `select`, what follows them in each row.
    """

    def __init__(self, depth: int, left_padding: Tensor):
        self.keys: list[Tensor | None] = [None] * depth
        self.values: list[Tensor | None] = [None] * depth
        self.length, self.rows = 0, None
        self.left_padding = left_padding if bool(left_padding.any()) else None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what a layer makes of the prompts, or put it before what it makes of rows: `b hk i d -> b hk j d`."""
        if self.rows is None:
            self.keys[layer], self.values[layer] = k, v
            return k, v
        before = (kept[layer].index_select(0, self.rows) for kept in (self.keys, self.values))
        return tuple(torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))

    def select(self, rows: Tensor) -> None:
        """Say which prompt each of the rows to come goes on from: `b'`, integer."""
        self.rows = rows
        if self.left_padding is not None:
            self.left_padding = self.left_padding.index_select(0, rows)
