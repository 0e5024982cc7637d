"""The next token of each row through all blocks at once, where a kernel in C can do it."""

from ..ops.decode_native import DTYPES, BlockTensors, NativeDecoder
from ..ops.native import library
from .cache import KVCache

MAX_ROWS = 4  # beyond, products of many rows are faster


def native_decoder(palm, cache: KVCache) -> NativeDecoder | None:
    """The kernel over the blocks of a PaLM and their part of a cache, kept with it; None where it cannot run.

    The weights are on a CPU, whole, and not to be trained (`ParallelBlock.takes_step`). ValueError for a full cache.
    """
    if type(cache) is not KVCache or len(cache.keys[0]) > MAX_ROWS or palm.dtype not in DTYPES or library() is None:
        return None
    if cache.length >= cache.capacity:
        raise ValueError(f"{cache.length + 1} tokens in a cache with room for {cache.capacity}; make it larger")
    if cache.decoder is None or not cache.decoder.reads(palm.layers[0].in_proj.weight, cache.keys[0]):
        blocks = [_tensors(layer, *kept) for layer, *kept in zip(palm.layers, cache.keys, cache.values, strict=True)]
        tensors = [tensor for block in blocks for tensor in block if tensor is not None]
        if any(tensor.dtype != palm.dtype or not tensor.is_contiguous() for tensor in tensors):
            return None
        cache.decoder = NativeDecoder(blocks, palm.config.heads, palm.config.norm_eps)
    return cache.decoder


def _tensors(layer, keys, values) -> BlockTensors:
    norms = (layer.q_norm.weight, layer.k_norm.weight) if layer.config.qk_norm else (None, None)
    weights = (layer.norm.weight, layer.in_proj.weight, layer.attn_out.weight, layer.ff_out.weight)
    return BlockTensors(*weights, *norms, keys, values)
