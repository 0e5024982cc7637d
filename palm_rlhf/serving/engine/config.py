"""The settings of an engine: how much it computes at once, and for how long."""

from dataclasses import dataclass

from beartype import beartype


@beartype
@dataclass(frozen=True)
class EngineConfig:
    """How much an engine takes on at once.

    Args:
        context: The most tokens of a prompt with its reply; None is the model's `max_seq_len`.
        max_batch: The most replies that are computed together; None is 16 on a CPU, and what a GPU's memory holds.
        queue: The most replies that may wait beyond them.
        prefill_chunk: The most tokens of prompts that are read in one step, between two tokens of the running replies;
            None is 256 on a CPU, 2048 on a GPU.
        cache_memory: Bytes for the keys and values of running replies. Where they are short, the replies that came last
            wait again, and go on when there is room. None is 2 GiB on a CPU, and on a GPU what
            `max_batch` replies need.
        prefix_memory: Bytes for the keys and values of ended sequences, for prompts that begin as they did.
        timeout: Seconds for each reply, its time in the queue included.
        stall_timeout: Seconds without progress, while there is work to do, after which the engine counts as stalled.
            Progress is a token, a part of a prompt, or the end of a reply.
    """

    context: int | None = None
    max_batch: int | None = None
    queue: int = 64
    prefill_chunk: int | None = None
    cache_memory: int | None = None
    prefix_memory: int = 2**28
    timeout: float | int = 600.0
    stall_timeout: float | int = 120.0

    def __post_init__(self):
        for name, least in (("context", 2), ("max_batch", 1), ("queue", 0), ("prefill_chunk", 1), ("prefix_memory", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"got {name}={value}, expected at least {least}")
        for name in ("timeout", "stall_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"got {name}={getattr(self, name)}, expected seconds above 0")
