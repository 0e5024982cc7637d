"""Trainers: they take token tensors, never text."""

from palm_rlhf.training.language_model import LanguageModelTrainer
from palm_rlhf.training.language_model_config import LMConfig
from palm_rlhf.training.online_preference import OnlinePreferenceTrainer
from palm_rlhf.training.preference import PreferenceTrainer
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.preference_data import Preference, UnpairedPreference
from palm_rlhf.training.ranked_data import Ranking, Rating
from palm_rlhf.training.reward import RewardModelTrainer
from palm_rlhf.training.reward_config import RewardConfig
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.trainer import RLHFTrainer
from palm_rlhf.training.rollout_config import RolloutConfig
from palm_rlhf.training.supervised import SupervisedTrainer
from palm_rlhf.training.supervised_config import SupervisedConfig
from palm_rlhf.training.weighted_examples import Example

__all__ = [
    "Example",
    "LMConfig",
    "LanguageModelTrainer",
    "OnlinePreferenceTrainer",
    "PPOConfig",
    "Preference",
    "PreferenceConfig",
    "PreferenceTrainer",
    "RLHFTrainer",
    "Ranking",
    "Rating",
    "RewardConfig",
    "RewardModelTrainer",
    "RolloutConfig",
    "SupervisedConfig",
    "SupervisedTrainer",
    "UnpairedPreference",
]
