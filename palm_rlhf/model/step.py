"""The next token of each row through all blocks at once, where a kernel in C can do it."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from ..ops.decode_native import DTYPES, BlockTensors, NativeDecoder
from ..ops.native import has_amx, library
from .block import ParallelBlock, position_tables
from .config import PaLMConfig
from .lora import BlockLoRA

MAX_ROWS = 64  # beyond, one product after the other is as fast
MAX_ROWS_WITH_AMX = 8  # of bfloat16
MAX_LOOKED_UP = 4096  # positions whose tables are kept


def native_step(
    palm, tokens: Tensor, cache, adapters: Sequence[BlockLoRA] | None = None
) -> Callable[[Tensor, tuple[Tensor, Tensor]], Tensor] | None:
    """What takes embeddings and `step_tables` of `b 1` tokens through the blocks and into the cache: `b 1 e -> b 1 e`.

    None but for few rows on a CPU, with nothing to be learnt, and weights that are whole, not in shards. The cache
    keeps the kernel, with the addresses of all that it reads.
    """
    kind, c, dtype = tokens.device.type, palm.config, palm.dtype
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(kind)
    few = tokens.shape[1] == 1 and len(tokens) <= _max_rows(dtype) and kind == "cpu" and dtype in DTYPES
    plain = c.flash_attn and not (torch.compiler.is_compiling() or torch.is_grad_enabled())
    if not few or not plain or library() is None or _is_special(palm.layers, adapters or ()):
        return None
    keys, values, first, lengths = cache.window()
    of_layers = zip(palm.layers, adapters or [None] * c.depth, keys, values, strict=True)
    blocks = [_tensors(*of_layer) for of_layer in of_layers]
    scale = 1.0 if adapters is None else adapters[0].q.scale
    decoder = cache.kernels.get("decoder")
    if decoder is None or not decoder.reads(blocks, scale):
        if not _is_uniform(blocks, adapters or (), palm.dtype, dtype, (len(tokens), c.kv_heads, c.dim_head)):
            return None
        decoder = NativeDecoder(blocks, heads=c.heads, eps=c.norm_eps, adapter_scale=scale)
        cache.kernels["decoder"] = decoder
    return partial(decoder.step, first=first, lengths=lengths) if len(keys[0]) == len(tokens) else None


def _max_rows(dtype: torch.dtype) -> int:
    return MAX_ROWS_WITH_AMX if dtype == torch.bfloat16 and has_amx() else MAX_ROWS


def _is_special(layers: Sequence[ParallelBlock], adapters: Sequence[BlockLoRA]) -> bool:
    """Whether there are weights in shards, or somebody who wants to see what goes through."""
    parts = [part for block in adapters for part in block.children()]
    weights = [layer.in_proj.weight for layer in layers] + [part.A for part in parts]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (*layers, *parts))
    return hooked or any(type(weight) is not nn.Parameter for weight in weights)


def _is_uniform(
    blocks: list[BlockTensors],
    adapters: Sequence[BlockLoRA],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    cache_shape: tuple[int, int, int],
) -> bool:
    """Whether all are of the types, sizes and memory order that the kernel counts on."""
    caches = [t for block in blocks for t in (block.keys, block.values)]
    weights = [t for block in blocks for t in block._replace(keys=None, values=None) if t is not None]
    parts = [part for block in adapters for part in block.children()]
    return (
        all(t.is_contiguous() for t in (*weights, *caches))
        and {t.dtype for t in weights} == {dtype}
        and {(*t.shape[:2], t.shape[3], t.dtype) for t in caches} == {(*cache_shape, cache_dtype)}
        and len({(part.r, part.scale) for part in parts}) <= 1
    )


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
    cos, sin = (table.transpose(1, 2) for table in tables)
    return cos, sin


@lru_cache(maxsize=8)
def _first_tables(config: PaLMConfig, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = position_tables(config, torch.arange(size, device="cpu").unsqueeze(0), dtype)
    return cos[0], sin[0]
