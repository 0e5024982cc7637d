"""The rules of PPOConfig: a setting that is out of range, or that has no effect, is refused by its name."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from palm_rlhf.model.lora import checked_targets
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.shared_base import have_one_base
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rewards import Reward

if TYPE_CHECKING:
    from palm_rlhf.training.rlhf.config import PPOConfig

CRITIC_FIELDS = ("critic_learning_rate", "value_clip_eps", "value_coef", "gamma", "gae_lambda", "whiten_advantages",
                 "critic_lora_r")  # fmt: skip


def check_config(config: "PPOConfig") -> None:
    """Raise ValueError for a field that is out of range, or has no effect."""
    config.expect_adamw()
    config.check_sampling()
    config.expect_positive("num_steps", "rollouts_per_step", "num_samples", "rollout_batch_size", "minibatch_size",
                           "epochs", "kl_horizon", "overlong_penalty", "sample_every", "samples_kept", "max_turns",
                           "eval_every", "eval_samples")  # fmt: skip
    config.expect_not_negative("value_coef", "entropy_coef", "missing_eos_penalty", "overlong_buffer", "actor_lora_r",
                               "critic_lora_r")  # fmt: skip
    config.expect_positive_or_none("max_new_tokens", "max_seq_len", "micro_batch_size", "critic_learning_rate",
                                   "score_clip", "clip_eps", "clip_eps_high", "value_clip_eps", "early_stop_kl",
                                   "kl_target", "max_turn_tokens", "reward_timeout", "importance_cap")  # fmt: skip
    config.expect("actor_lora_r", config.actor_lora_r > 0 or not config.share_base,
                  "1 or more with share_base, since whoever trains the base changes all models over it")  # fmt: skip
    config.expect("eos_token", config.eos_token is None or config.eos_token >= 0, "None or the id of a token")
    config.expect_share("gamma", "gae_lambda")
    config.expect("kl_coef", config.kl_coef is None or config.kl_coef >= 0, "None or 0 or more")
    temperature = config.eval_temperature
    config.expect("eval_temperature", temperature is None or temperature >= 0, "None or 0 or more")
    if temperature == 0:
        config.expect("eval_samples", config.eval_samples == 1, "1 where eval_temperature is 0: all would be the same")
    checked_targets(config.lora_targets)
    if not config.actor_lora_r and not config.critic_lora_r:
        config.expect_default("without adapters (actor_lora_r, critic_lora_r)", "lora_targets")
    weights = (config.reward_weights or {}).values()
    config.expect("reward_weights", all(math.isfinite(weight) for weight in weights), "finite numbers")
    if config.max_seq_len is None:
        config.expect("max_new_tokens", config.max_new_tokens is not None, "a number where max_seq_len is None")
    if config.algorithm != "ppo":
        config.expect("num_samples", config.num_samples > 1, f"at least 2, for {config.algorithm} compares responses")
        config.expect("shared_trunk", not config.shared_trunk, f"False, for {config.algorithm} has no critic")
        config.expect_default(f"for {config.algorithm} has no critic", *CRITIC_FIELDS)
    config.expect("rollouts_per_step", config.rollouts_per_step % config.num_samples == 0,
                  f"a multiple of num_samples, {config.num_samples}")  # fmt: skip
    if config.kl_target is not None:
        config.expect("kl_target", config.initial_kl_coef > 0, "None where kl_coef is 0, which nothing can steer")
        config.expect("kl_horizon", config.kl_horizon > config.rollouts_per_step / 5,
                      f"more than a fifth of rollouts_per_step, {config.rollouts_per_step}")  # fmt: skip
    else:
        config.expect_default("where kl_target is None", "kl_horizon")
    if not config.kl_in_loss:
        config.expect_default("where the KL is in the reward, or give kl_penalty='loss'", "kl_estimator")
    _check_variant(config)


def _check_variant(config: "PPOConfig") -> None:
    """Raise ValueError for a setting of an algorithm where it has no effect."""
    if config.algorithm != "grpo":
        config.expect("grpo_variant", config.grpo_variant == "grpo", "'grpo' where the algorithm is not grpo")
        config.expect("advantage_scale", config.advantage_scale is None, "None where the algorithm is not grpo")
    config.expect("max_redraws", (config.max_redraws or 0) >= 0, "None or 0 or more")
    if config.algorithm == "ppo":
        config.expect("ratio_level", config.ratio_level in (None, "token"),
                      "None or 'token' for ppo, whose advantages differ from token to token")  # fmt: skip
        config.expect("max_redraws", not config.max_redraws, "None or 0 for ppo, which compares no responses")
    if not config.overlong_buffer:
        config.expect_default("where overlong_buffer is 0", "overlong_penalty")
    room = config.response_room(0)
    config.expect("overlong_buffer", config.overlong_buffer <= room, f"up to the {room} tokens that there is room for")


def check_sharing(config: "PPOConfig", palm: PaLM, rewards: Iterable[Reward], reference: PaLM | None) -> None:
    """Raise ValueError for models that cannot hold one base, or would change when the policy is trained."""
    models = [reward.palm for reward in rewards if isinstance(reward, RewardModel)]
    over_base = [model for model in models if have_one_base(model, palm)]
    if over_base and not config.actor_lora_r:
        raise ValueError(
            "got a reward model over the policy's base and actor_lora_r=0, expected 1 or more: training the base would "
            "change the reward model too"
        )
    if not config.share_base:
        return
    if len(over_base) < len(models):
        raise ValueError(
            "got share_base=True and a reward model with a base of its own, expected one over the policy's base: "
            "RewardModel(palm, use_lora=True, share_base=True), or RewardModel.from_pretrained(folder, base=palm)"
        )
    if reference is not None:
        raise ValueError("got share_base=True and a reference, expected None: the policy's base is the reference")
    if not models and (config.algorithm != "ppo" or config.shared_trunk):
        raise ValueError("got share_base=True without a critic or a reward model to share with, expected False")


def check_environment(config: "PPOConfig", environment: Any) -> None:
    """Raise ValueError for settings of conversations where there is no environment."""
    if environment is None:
        config.expect_default("where there is no environment to talk with", "max_turns", "max_turn_tokens")


def check_first_step(config: "PPOConfig", *, below_float32: bool) -> None:
    """Raise ValueError for settings that can change until the first step, and have no effect in it.

    They need an EOS token, or correct recorded log-probabilities where the update uses the recorded ones.
    """
    if config.eos_token is None:
        why = "where eos_token is None and every response takes all the room there is"
        config.expect_default(why, "missing_eos_penalty", "overlong_buffer", "mask_truncated")
    if not below_float32:
        why = "in float32, where the probabilities recorded in sampling are those that are trained on"
        config.expect_default(why, "importance_cap")
