"""One decoding step through all blocks at once, where a native kernel can compute it."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn

from palm_rlhf.model.block import Block, SerialBlock, position_tables
from palm_rlhf.model.cache import Cache
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.lora import BlockLoRA
from palm_rlhf.ops.cpu import native_decoding
from palm_rlhf.ops.cpu.native_decoding import BlockTensors, NativeDecoder
from palm_rlhf.ops.devices import why_not_native

if TYPE_CHECKING:
    from palm_rlhf.model.palm import PaLM

MAX_LOOKED_UP = 4096  # positions whose tables are kept
DecodingStep: TypeAlias = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


def native_step(
    palm: "PaLM", tokens: Tensor, cache: Cache, adapters: Sequence[BlockLoRA] | None
) -> DecodingStep | None:
    """Return a function that takes `b 1` tokens through the blocks, or None where the native kernel cannot.

    The function maps embeddings and `step_tables` to embeddings, `b 1 e -> b 1 e`, and writes keys and values to the
    cache. The kernel is for few rows on a CPU, without gradients, and for weights that are not sharded. The cache keeps
    the kernel, which holds the addresses of all tensors that it reads.
    """
    kind, c, dtype = tokens.device.type, palm.config, palm.dtype
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(kind)
    few = tokens.shape[1] == 1 and native_decoding.is_faster(len(tokens), dtype) and kind == "cpu"
    plain = c.flash_attn and not (torch.compiler.is_compiling() or torch.is_grad_enabled())
    layers = cast("Sequence[Block]", palm.layers)
    if not few or not plain or why_not_native() is not None or _is_special(layers, adapters or ()):
        return None
    window = cache.window()
    if window is None:
        return None
    keys, values, first, lengths = window
    of_blocks: Sequence[BlockLoRA | None] = adapters or [None] * c.depth
    blocks = list(map(_tensors, layers, of_blocks, keys, values))
    scales = {part.scale for block in adapters or () for part in block.parts} or {1.0}
    decoder = cache.kernels.get("decoder")
    if decoder is None or not decoder.reads(blocks, scales):
        shape = (len(tokens), c.kv_heads, c.dim_head)
        if len(scales) > 1 or native_decoding.why_not(blocks, palm.dtype, shape, dtype) is not None:
            return None
        factor = scales.pop()
        decoder = cache.kernels["decoder"] = NativeDecoder(blocks, c.heads, c.norm_eps, factor, rms=c.norm == "rms")
    if len(keys[0]) != len(tokens):
        return None
    factors = adapters[0].parts[0].rank_factors if adapters else None
    return partial(decoder.step, first=first, lengths=lengths, rank_factors=factors)


def _is_special(layers: Sequence[Block], adapters: Sequence[BlockLoRA]) -> bool:
    """Return whether weights are no plain tensors, or a hook waits for a block, which the kernel does not call.

    Such weights are sharded, or hold their numbers in fewer bits.
    """
    parts = [part for block in adapters for part in block.parts]
    weights = [getattr(layer, name).weight for layer in layers for name in layer.matrices()]
    weights += [part.A for part in parts]
    # torch has no public way to ask a module for its hooks, and passing them by would be silent
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (*layers, *parts))
    return hooked or any(type(weight) is not nn.Parameter for weight in weights)


def _tensors(layer: Block, lora: BlockLoRA | None, keys: Tensor, values: Tensor) -> BlockTensors:
    q_norm, k_norm = (layer.q_norm.weight, layer.k_norm.weight) if layer.config.qk_norm else (None, None)
    ff_norm, ff_proj = (layer.ff_norm.weight, layer.ff_proj.weight) if isinstance(layer, SerialBlock) else (None, None)
    weights = (layer.norm.weight, layer.in_proj.weight, layer.attn_out.weight, layer.ff_out.weight, q_norm, k_norm)
    plain = BlockTensors(*weights, keys, values, layer.in_proj.bias, ff_norm, ff_proj)
    if lora is None:
        return plain
    parts = dict(zip(lora.targets, lora.parts, strict=True))
    down, up = (
        {f"{name}_{side}": getattr(part, matrix) for name, part in parts.items()}
        for side, matrix in (("down", "A"), ("up", "B"))
    )
    return plain._replace(**down, **up)


def step_tables(config: PaLMConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the `position_tables` of one token a row, from tables that are kept: `b 1 -> b (1|h+hk) 1 d`."""
    size = max(256, 1 << int(positions.max()).bit_length())
    if size > MAX_LOOKED_UP:
        cos, sin = position_tables(config, positions, dtype)
    else:
        cos, sin = (table[positions] for table in _first_tables(config, size, dtype))
    return cos.transpose(1, 2), sin.transpose(1, 2)


@lru_cache(maxsize=8)
def _first_tables(config: PaLMConfig, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = position_tables(config, torch.arange(size, device="cpu").unsqueeze(0), dtype)
    return cos[0], sin[0]
