"""The next token of each row through all blocks at once, where a kernel in C can do it."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from ..ops.decode_native import DTYPES, BlockTensors, NativeDecoder
from ..ops.native import library
from .block import position_tables
from .config import PaLMConfig

MAX_ROWS = 64  # beyond, one product after the other is as fast
MAX_LOOKED_UP = 4096  # positions whose tables are kept


def native_step(palm, tokens: Tensor, cache) -> Callable[[Tensor, tuple[Tensor, Tensor]], Tensor] | None:
    """What takes embeddings and `step_tables` of `b 1` tokens through the blocks and into the cache: `b 1 e -> b 1 e`.

    None but for few rows on a CPU, with nothing to be learnt, and weights that are whole, not in shards. The cache
    keeps the kernel, with the addresses of all that it reads.
    """
    kind, c = tokens.device.type, palm.config
    few = tokens.shape[1] == 1 and len(tokens) <= MAX_ROWS and kind == "cpu" and palm.dtype in DTYPES and c.flash_attn
    plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(kind))
    if not few or not plain or library() is None or any(map(_is_special, palm.layers)):
        return None
    keys, values, first, lengths = cache.window()
    blocks = [_tensors(layer, *kept) for layer, *kept in zip(palm.layers, keys, values, strict=True)]
    decoder = cache.kernels.get("decoder")
    if decoder is None or not decoder.reads(blocks):
        shapes = {(*t.shape[:2], t.shape[3]) for t in (*keys, *values)}
        dense = all(t.dtype == palm.dtype and t.is_contiguous() for block in blocks for t in block if t is not None)
        if not dense or shapes != {(len(tokens), c.kv_heads, c.dim_head)}:
            return None
        decoder = cache.kernels["decoder"] = NativeDecoder(blocks, c.heads, c.norm_eps)
    return partial(decoder.step, first=first, lengths=lengths) if len(keys[0]) == len(tokens) else None


def _is_special(layer) -> bool:
    """Whether a block has weights in shards, or somebody who wants to see what goes through."""
    return type(layer.in_proj.weight) is not nn.Parameter or bool(layer._forward_hooks or layer._forward_pre_hooks)


def _tensors(layer, keys: Tensor, values: Tensor) -> BlockTensors:
    norms = (layer.q_norm.weight, layer.k_norm.weight) if layer.config.qk_norm else (None, None)
    weights = (layer.norm.weight, layer.in_proj.weight, layer.attn_out.weight, layer.ff_out.weight)
    return BlockTensors(*weights, *norms, keys, values)


def step_tables(config: PaLMConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`position_tables` of one token a row, looked up: `b 1 -> b (1|h+hk) 1 d`."""
    size = max(256, 1 << int(positions.max()).bit_length())
    if size > MAX_LOOKED_UP:
        tables = position_tables(config, positions, dtype)
    else:
        tables = (table[positions] for table in _first_tables(config, size, dtype))
    cos, sin = (table.transpose(1, 2) for table in tables)
    return cos, sin


@lru_cache(maxsize=8)
def _first_tables(config: PaLMConfig, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = position_tables(config, torch.arange(size, device="cpu").unsqueeze(0), dtype)
    return cos[0], sin[0]
