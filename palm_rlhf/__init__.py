"""PaLM and RLHF in PyTorch: pretrain, fine-tune, learn a reward, improve by PPO, evaluate, chat and serve."""

from .model.config import PaLMConfig
from .model.palm import PaLM
from .policy.actor_critic import ActorCritic
from .policy.reward import RewardModel
from .training.rlhf import RLHFTrainer
from .training.rlhf_config import PPOConfig

__all__ = ["ActorCritic", "PPOConfig", "PaLM", "PaLMConfig", "RLHFTrainer", "RewardModel", "__version__"]
__version__ = "0.1.0"
