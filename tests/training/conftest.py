"""Tiny models and data for the trainers' tests."""

import gc

import numpy as np
import pytest

from palm_rlhf.model.palm import PaLM
from palm_rlhf.training.language_model_config import LMConfig
from tests.factories import palm_of


@pytest.fixture
def palms_alive():
    """`palms_alive()` is the number of models in memory that were made since the test began."""

    def count() -> int:
        gc.collect()
        return sum(type(thing) is PaLM for thing in gc.get_objects())

    gc.freeze()  # all else that is in memory, which would take seconds to go through
    yield count
    gc.unfreeze()


@pytest.fixture
def tiny_palm():
    """`tiny_palm(dropout=0.1)` is a byte-level PaLM with the same weights at every call."""

    def build(**fields) -> PaLM:
        return palm_of(**{"num_tokens": 256, "dim": 32, "dim_head": 16, **fields})

    return build


@pytest.fixture
def tiny_config():
    """`tiny_config(num_steps=10)` is a short run in float32."""

    def build(**fields) -> LMConfig:
        short = {"batch_size": 4, "seq_len": 16, "eval_context": 8, "num_steps": 4, "warmup_steps": 2, "log_every": 1}
        return LMConfig(**{**short, "precision": "float32", "plot": False, **fields})

    return build


@pytest.fixture
def text() -> np.ndarray:
    """Bytes with something to learn: a walk through the letters."""
    steps = np.random.default_rng(0).integers(1, 4, 3000)
    return (97 + np.cumsum(steps) % 26).astype(np.uint8)
