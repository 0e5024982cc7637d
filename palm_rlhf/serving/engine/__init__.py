"""The engine that generates many replies together, one token of each per step: continuous batching."""

from palm_rlhf.serving.engine.config import EngineConfig
from palm_rlhf.serving.engine.engine import Engine

__all__ = ["Engine", "EngineConfig"]
