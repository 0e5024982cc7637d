"""Trainers: they take token tensors, never text."""

from palm_rlhf.training.config import LMConfig
from palm_rlhf.training.language_model import LanguageModelTrainer

__all__ = ["LMConfig", "LanguageModelTrainer"]
