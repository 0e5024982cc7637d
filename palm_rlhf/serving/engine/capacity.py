"""How many replies a machine computes together, where the settings leave it open: as many as its memory holds."""

from typing import NamedTuple

import torch

from palm_rlhf.serving.engine.config import EngineConfig

COLUMN_STEP = 64  # reserved lengths are rounded up to it, so that the block is seldom reshaped
MIN_ROWS, MAX_ROWS = 16, 256  # of a GPU; replies that do not fit wait, and most are shorter than the context
LEAST_SPARE = 2**30  # bytes of a GPU that stay free for a forward, or a tenth of its memory where that is more
SAMPLING_BYTES = 64  # for each logit of a step: logits, and what sampling makes of them in float64


class Capacity(NamedTuple):
    """How much an engine takes on at once; `EngineConfig` explains the numbers."""

    max_batch: int
    cache_memory: int
    prefill_chunk: int


ON_CPU = Capacity(max_batch=16, cache_memory=2**31, prefill_chunk=256)
GPU_CHUNK = 2048  # tokens that a GPU reads in hardly more time than a few


def columns_of(context: int) -> int:
    """Return the columns of the cache for a sequence of `context` tokens."""
    return -(-context // COLUMN_STEP) * COLUMN_STEP


def capacity(
    config: EngineConfig, *, context: int, bytes_per_token: int, num_tokens: int, free_memory: int | None
) -> Capacity:
    """Return the numbers of the settings, and for those left open the numbers of a CPU, or what a GPU's memory holds.

    On a GPU, a reply takes the keys and values of a whole context, and memory to be sampled with. Without a number for
    either, as many replies are computed as fit beside `prefix_memory` and some spare memory, from MIN_ROWS to MAX_ROWS.

    Args:
        context: The most tokens of a prompt with its reply.
        bytes_per_token: The memory of the keys and values of one token.
        num_tokens: The size of the vocabulary.
        free_memory: Bytes of a GPU that are free once the weights are loaded; None for a CPU.
    """
    found = ON_CPU if free_memory is None else _of_gpu(config, context, bytes_per_token, num_tokens, free_memory)
    given = {name: getattr(config, name) for name in Capacity._fields if getattr(config, name) is not None}
    return found._replace(**given)


def _of_gpu(config: EngineConfig, context: int, bytes_per_token: int, num_tokens: int, free_memory: int) -> Capacity:
    room = free_memory - max(LEAST_SPARE, free_memory // 10) - config.prefix_memory
    of_cache, of_sampling = columns_of(context) * bytes_per_token, num_tokens * SAMPLING_BYTES
    if config.cache_memory is None:
        num_rows = room // (of_cache + of_sampling)
    else:
        num_rows = config.cache_memory // of_cache
    max_batch = config.max_batch or min(max(num_rows, MIN_ROWS), MAX_ROWS)
    return Capacity(max_batch, max(min(max_batch * of_cache, room - max_batch * of_sampling), 0), GPU_CHUNK)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a GPU, those that PyTorch keeps for later included; None for a CPU."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
