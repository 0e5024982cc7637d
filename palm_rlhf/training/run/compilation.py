"""The blocks of a model compiled by torch.compile for the steps of a run, where that pays.

All blocks of a model are one piece of code, which is compiled once for all of them ("regional compilation"): in a tenth
of the time that a whole model takes. Outside of the steps a block runs as it is: generation has other shapes in every
call, and would be compiled again and again.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from beartype import beartype
from torch import nn
from tqdm import tqdm

from palm_rlhf.model.block import Block

Compile = Literal["auto"] | bool

# Uncompiled, a forward and backward of a block takes at least 4 ms, however small it is, since Python launches its
# operations one by one (measured on an H200: 4.9 ms with 16 x 1024 tokens of width 768). So many take three minutes.
# Compiled they take two thirds of it, and the compilation takes less than the minute that is saved.
MIN_BLOCK_PASSES = 45_000


@beartype
def is_wanted(setting: Compile, device_type: str, num_passes: int) -> bool:
    """Return whether blocks are to be compiled that take so many forwards with gradients in the whole run."""
    if setting == "auto":
        return device_type == "cuda" and num_passes >= MIN_BLOCK_PASSES
    return setting


def why_not(device: torch.device) -> str | None:
    """Return why torch.compile does not work here, or None if it does: compile a small function to see it."""
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: x.sin() * 2)(x).sum().backward()
    except Exception as error:  # of any part of the compiler, of Triton, of a C compiler, or of a driver
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None


class CompiledBlocks:
    """The blocks of a model, which are compiled within `with compiled_blocks():`; on standard error, what that took.

    Args:
        module: has the blocks; none is compiled unless `is_wanted`.
        setting: auto, or whether they are compiled.
        device: where they compute.
        num_forwards: forwards with gradients of the whole run.
        speaks: whether this process writes to standard error.
    """

    @beartype
    def __init__(self, module: nn.Module, setting: Compile, device: torch.device, num_forwards: int, *, speaks: bool):
        blocks = [block for block in module.modules() if isinstance(block, Block)]
        self.blocks = blocks if is_wanted(setting, device.type, len(blocks) * num_forwards) else []
        self.speaks, self.is_new = speaks, True
        if self.blocks and setting == "auto" and (reason := why_not(device)) is not None:
            self._say(f"the model is not compiled: torch.compile fails here, {reason}")
            self.blocks = []
        self.forwards = {type(block): torch.compile(type(block).forward) for block in self.blocks}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Compile the blocks' forwards within, and their backwards.

        The forward alone is replaced, so that hooks, and the gathering of shards, stay outside of the compiled code.
        """
        started = time.perf_counter()
        for block in self.blocks:
            block.__dict__["forward"] = partial(self.forwards[type(block)], block)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.__dict__["forward"]
        if self.blocks and self.is_new:
            self.is_new = False
            seconds = time.perf_counter() - started
            self._say(
                f"the model's {len(self.blocks)} blocks are compiled: the first step took {seconds:.1f} seconds, "
                "the next ones are faster; with compile set to False no time is spent on it"
            )

    def _say(self, text: str) -> None:
        if self.speaks:
            tqdm.write(text, file=sys.stderr)
