"""PaLM and RLHF in PyTorch: pretrain, fine-tune, learn a reward, improve by PPO, evaluate, chat and serve."""

from .model.config import PaLMConfig
from .model.palm import PaLM

__all__ = ["PaLM", "PaLMConfig", "__version__"]
__version__ = "0.1.0"
