"""The engine that computes many replies together, a token of each at a time: continuous batching."""

from palm_rlhf.serving.engine.engine import Engine, EngineConfig

__all__ = ["Engine", "EngineConfig"]
