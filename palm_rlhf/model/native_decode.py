"""The next token of each row through all blocks at once, where a kernel in C can do it."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from palm_rlhf.model.block import ParallelBlock, position_tables
from palm_rlhf.model.cache import PromptCache
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.lora import BlockLoRA
from palm_rlhf.ops.cpu.native_decoding import BlockTensors, NativeDecoder, fit, max_rows
from palm_rlhf.ops.cpu.native_library import library

MAX_LOOKED_UP = 4096  # positions whose tables are kept
Step = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


def native_step(palm, tokens: Tensor, cache, adapters: Sequence[BlockLoRA] | None) -> Step | None:
    """What takes embeddings and `step_tables` of `b 1` tokens through the blocks and into the cache: `b 1 e -> b 1 e`.

    None but for few rows on a CPU, with nothing to be learnt, and weights that are whole, not in shards. The cache
    keeps the kernel, with the addresses of all that it reads.
    """
    kind, c, dtype = tokens.device.type, palm.config, palm.dtype
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(kind)
    few = tokens.shape[1] == 1 and len(tokens) <= max_rows(dtype) and kind == "cpu"
    plain = c.flash_attn and not (torch.compiler.is_compiling() or torch.is_grad_enabled())
    plain = plain and not isinstance(cache, PromptCache)  # which has no room to write to
    if not few or not plain or library() is None or _is_special(palm.layers, adapters or ()):
        return None
    keys, values, first, lengths = cache.window()
    blocks = list(map(_tensors, palm.layers, adapters or [None] * c.depth, keys, values))
    scales = {part.scale for block in adapters or () for part in block.children()} or {1.0}
    decoder = cache.kernels.get("decoder")
    if decoder is None or not decoder.reads(blocks, scales):
        if len(scales) > 1 or not fit(blocks, palm.dtype, (len(tokens), c.kv_heads, c.dim_head), dtype):
            return None
        decoder = cache.kernels["decoder"] = NativeDecoder(blocks, c.heads, c.norm_eps, scales.pop())
    return partial(decoder.step, first=first, lengths=lengths) if len(keys[0]) == len(tokens) else None


def _is_special(layers: Sequence[ParallelBlock], adapters: Sequence[BlockLoRA]) -> bool:
    """Whether there are weights in shards, or somebody who wants to see what goes through."""
    parts = [part for block in adapters for part in block.children()]
    weights = [layer.in_proj.weight for layer in layers] + [part.A for part in parts]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (*layers, *parts))
    return hooked or any(type(weight) is not nn.Parameter for weight in weights)


def _tensors(layer: ParallelBlock, lora: BlockLoRA | None, keys: Tensor, values: Tensor) -> BlockTensors:
    norms = (layer.q_norm.weight, layer.k_norm.weight) if layer.config.qk_norm else (None, None)
    weights = (layer.norm.weight, layer.in_proj.weight, layer.attn_out.weight, layer.ff_out.weight)
    parts = () if lora is None else (lora.q, lora.k, lora.v, lora.out)
    return BlockTensors(*weights, *norms, keys, values, *(part.A for part in parts), *(part.B for part in parts))


def step_tables(config: PaLMConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`position_tables` of one token a row, looked up: `b 1 -> b (1|h+hk) 1 d`."""
    size = max(256, 1 << int(positions.max()).bit_length())
    if size > MAX_LOOKED_UP:
        tables = position_tables(config, positions, dtype)
    else:
        tables = (table[positions] for table in _first_tables(config, size, dtype))
    return tuple(table.transpose(1, 2) for table in tables)


@lru_cache(maxsize=8)
def _first_tables(config: PaLMConfig, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = position_tables(config, torch.arange(size, device="cpu").unsqueeze(0), dtype)
    return cos[0], sin[0]
