"""Checks of the models that reinforcement learning is given, and of how the critic is made from them."""

from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.shared_base import have_one_base
from palm_rlhf.policy.reward_model import RewardModel


def check_model(name: str, model: PaLM | RewardModel, num_tokens: int) -> None:
    """Raise ValueError if a model cannot be used with, or as, a policy of `num_tokens` tokens."""
    palm = model.palm if isinstance(model, RewardModel) else model
    if not palm.config.causal:
        raise ValueError(f"the {name} has causal=False, so each token sees the tokens after it; expected causal=True")
    check_vocabulary(name, model, num_tokens)
    if palm is model and palm.finetune_modules:
        raise ValueError(
            f"the {name} has the LoRA scopes {sorted(palm.finetune_modules)}; expected none: merge them by "
            "merge_finetune_params, or take them away by remove_finetune_params"
        )


def check_vocabulary(name: str, model: PaLM | RewardModel, num_tokens: int) -> None:
    """Raise ValueError if the model's vocabulary is not the policy's, which has `num_tokens` tokens."""
    palm = model.palm if isinstance(model, RewardModel) else model
    if palm.num_tokens != num_tokens:
        raise ValueError(f"the {name} has num_tokens={palm.num_tokens}; expected {num_tokens} as the policy has")


def check_options(critic: PaLM | RewardModel | None, *, value: str, critic_lora_r: int) -> None:
    """Raise ValueError if the options of an actor-critic exclude each other."""
    if value not in ("separate", "shared", "none") or (critic is not None and value != "separate"):
        raise ValueError(
            f"got value={value!r} and a critic of type {type(critic).__name__}; "
            "expected 'separate', or without a critic to start from 'shared' or 'none'"
        )
    if critic_lora_r and (value != "separate" or isinstance(critic, RewardModel)):
        raise ValueError(
            f"got critic_lora_r={critic_lora_r} with value={value!r} and a critic of type {type(critic).__name__}; "
            "expected 0, or a separate critic that starts from a PaLM"
        )


def check_shared_base(
    palm: PaLM, critic: PaLM | RewardModel | None, *, value: str, actor_lora_r: int, critic_lora_r: int
) -> None:
    """Raise ValueError if the critic cannot hold the policy's base, or the policy would train it."""
    if value != "separate":
        raise ValueError(f"got share_base=True with value={value!r}, which has no critic to share with; expected False")
    if not actor_lora_r:
        raise ValueError("got share_base=True with actor_lora_r=0, expected 1 or more: training the base changes all")
    if critic is None and not critic_lora_r:
        raise ValueError(
            "got share_base=True without adapters for the critic, expected critic_lora_r of 1 or more, or a critic "
            "that is a reward model over the policy's base"
        )
    if critic is not None and not (isinstance(critic, RewardModel) and have_one_base(critic.palm, palm)):
        raise ValueError(
            f"got share_base=True and a critic of type {type(critic).__name__} with a base of its own, expected None, "
            "or a reward model over the policy's base: RewardModel(palm, use_lora=True, share_base=True)"
        )
