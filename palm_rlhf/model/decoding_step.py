"""One decoding step of static tensors: from the last token of every row to logits, without a look at their numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from palm_rlhf.model.block import Block, position_tables
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


class CastMatrices:
    """A model's matrices in the type of autocast, at fixed addresses, so that no step casts them again.

    They are rounded as autocast rounds them. Embeddings and norms are read from the model itself, in its own type.
    """

    def __init__(self, palm: "PaLM"):
        dtype = torch.get_autocast_dtype(palm.device.type)
        self.names = [name for name, _ in palm.layers[0].named_parameters() if "norm" not in name]
        layers = cast("Sequence[Block]", palm.layers)
        sources = [dict(layer.named_parameters())[name] for layer in layers for name in self.names]
        self.sources = [source.detach() for source in (*sources, palm.output_weight)]
        self.copies = [torch.empty_like(source, dtype=dtype) for source in self.sources]

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the output layer: `v e`."""
        return self.copies[-1]

    def of_block(self, layer: int) -> dict[str, Tensor]:
        """Return the matrices of a block, and biases if it has some, by their names in it."""
        start = len(self.names) * layer
        return dict(zip(self.names, self.copies[start : start + len(self.names)], strict=True))

    def refresh(self) -> None:
        """Cast the weights again, which may have changed in place."""
        torch._foreach_copy_(self.copies, self.sources)

    @staticmethod
    def are_needed(palm: "PaLM") -> bool:
        """Return whether autocast would cast the weights of a model in each step."""
        return palm.dtype == torch.float32 != palm.cache_dtype


def static_logits(
    palm: "PaLM",
    tokens: Tensor,
    cache: StaticCache,
    lookup: RotaryLookup,
    adapters: Sequence[BlockLoRA] | None = None,
    matrices: CastMatrices | None = None,
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
        matrices: the weights as autocast casts them; None lets autocast cast them in every step.
    """
    x, tables, mask = palm.token_emb(tokens.unsqueeze(-1)), lookup(cache.positions()), cache.key_mask()
    if matrices is None:
        x = palm.through_blocks(x, tables, mask, None, cache, adapters)
    else:
        for i, layer in enumerate(palm.layers):
            lora = None if adapters is None else adapters[i]
            x = functional_call(layer, matrices.of_block(i), (x, tables, mask, None, cache, i, lora))
    cache.advance()
    embeds = palm.norm(x)[:, 0]
    if matrices is None:
        return palm.to_logits(embeds)
    return F.linear(embeds, matrices.output_weight) * palm.config.output_scale
