"""The engine that computes many replies together, a token of each at a time: continuous batching."""

from palm_rlhf.serving.engine.config import EngineConfig
from palm_rlhf.serving.engine.engine import Engine

__all__ = ["Engine", "EngineConfig"]
