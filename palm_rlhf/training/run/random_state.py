"""The states of the random generators of a process: Python's, NumPy's and PyTorch's."""

import base64
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from beartype import beartype
from torch import Tensor


@beartype
def rng_state() -> dict[str, Any]:
    """Return the states of this process's random generators as JSON."""
    version, internal, gauss_next = random.getstate()
    numpy_state = cast(tuple[str, Any, int, int, float], np.random.get_state())
    name, keys, position, has_gauss, cached = numpy_state
    state = {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


@beartype
def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back into the states that `rng_state` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the random generators as they were, whatever the block draws."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
