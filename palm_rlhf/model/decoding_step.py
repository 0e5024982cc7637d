"""One decoding step of static tensors: from the last token of every row to logits, without a look at their numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from palm_rlhf.model.block import position_tables
from palm_rlhf.model.lora import BlockLoRA
from palm_rlhf.model.static_cache import StaticCache

if TYPE_CHECKING:
    from palm_rlhf.model.palm import PaLM


class RotaryLookup:
    """The `position_tables` of all positions up to a limit, computed once: a step looks its own up."""

    def __init__(self, palm: "PaLM", num_positions: int):
        positions = torch.arange(num_positions, device=palm.device).unsqueeze(0)
        dtype = torch.promote_types(palm.dtype, torch.float32)
        self.tables = [table[0] for table in position_tables(palm.config, positions, dtype)]  # n (1|h+hk) d each

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for `rotary_split`: `b 1 -> b 1 (1|h+hk) d`, twice."""
        cos, sin = (table.index_select(0, positions.flatten()).unsqueeze(1) for table in self.tables)
        return cos, sin


def static_logits(
    palm: "PaLM",
    tokens: Tensor,
    cache: StaticCache,
    lookup: RotaryLookup,
    adapters: Sequence[BlockLoRA] | None = None,
) -> Tensor:
    """Read one token a row into the cache and return the logits after it: `b -> b v`.

    The same numbers as `palm(tokens.unsqueeze(1), cache=cache)`, from fewer operations. With tokens and cache at fixed
    addresses, `StepGraphs` can capture it:

        def step():
            logits.copy_(static_logits(palm, tokens, cache, lookup))

        graphs.run((len(tokens), cache.capacity, addresses(palm)), step)

    Args:
        tokens: `b` int64, within the vocabulary; a row that is not in use may hold any token.
        cache: the keys and values of `b` rows. Set `lengths` and `first`, at their addresses, before a step; a step
            adds 1 to every entry of `lengths`.
        lookup: for at least as many positions as the cache has columns.
        adapters: of a LoRA scope, one for each block; see `adapters_of`.
    """
    x = palm.token_emb(tokens.unsqueeze(-1))
    x = palm.through_blocks(x, lookup(cache.positions()), cache.key_mask(), None, cache, adapters)
    cache.advance()
    return palm.to_logits(palm.norm(x)[:, 0])
