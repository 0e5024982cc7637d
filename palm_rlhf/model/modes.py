"""Modes of a module: evaluation for the length of a block, and dropout switched off for good."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every part of a module into eval mode inside the block, and back into its own mode after it."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def switch_off_dropout(module: Module) -> Module:
    """Set the rate of every dropout in a module to 0, for good, and return the module."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module
