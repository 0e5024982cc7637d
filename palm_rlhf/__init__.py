"""PaLM and RLHF in PyTorch: pretrain, fine-tune, learn a reward, improve by PPO, evaluate, chat and serve."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palm_rlhf.model.config import PaLMConfig
    from palm_rlhf.model.palm import PaLM
    from palm_rlhf.policy.actor_critic import ActorCritic
    from palm_rlhf.policy.reward_model import RewardModel
    from palm_rlhf.training.rlhf.config import PPOConfig
    from palm_rlhf.training.rlhf.trainer import RLHFTrainer

__all__ = ["ActorCritic", "PPOConfig", "PaLM", "PaLMConfig", "RLHFTrainer", "RewardModel", "__version__"]
__version__ = "0.1.0"

# Each public name is imported when it is first used, so that `import palm_rlhf` does not load all of torch.
_MODULES = {
    "ActorCritic": "policy.actor_critic",
    "PPOConfig": "training.rlhf.config",
    "PaLM": "model.palm",
    "PaLMConfig": "model.config",
    "RLHFTrainer": "training.rlhf.trainer",
    "RewardModel": "policy.reward_model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
