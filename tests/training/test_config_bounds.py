"""The range of each number in each config: its ends are accepted, and what lies just beyond them is refused by name."""

import dataclasses
import re

import pytest

from palm_rlhf.training import LMConfig, PPOConfig, PreferenceConfig, RewardConfig, SupervisedConfig
from palm_rlhf.training.rollout_config import RolloutConfig

CONFIGS = (LMConfig, SupervisedConfig, RewardConfig, PreferenceConfig, RolloutConfig, PPOConfig)
TINY = 1e-9
COUNT = ([1], [0, -1])
POSITIVE = ([TINY, 1.0], [0.0, -TINY])
NOT_NEGATIVE = ([0.0, TINY], [-TINY])
SHARE = ([0.0, 1.0], [-TINY, 1 + TINY])
BOUNDS = {
    **dict.fromkeys(["save_every", "keep_checkpoints", "log_every", "batch_size", "grad_accum", "num_steps",
                     "num_epochs", "eval_every", "eval_tokens", "eval_batch_size", "sample_every", "samples_kept",
                     "rollouts_per_step", "rollout_batch_size", "minibatch_size", "micro_batch_size", "epochs",
                     "max_new_tokens", "top_k", "max_turns", "max_turn_tokens", "eval_samples"], COUNT),
    **dict.fromkeys(["learning_rate", "critic_learning_rate", "eps", "temperature", "max_seconds", "beta", "simpo_beta",
                     "desirable_weight", "undesirable_weight", "clip_eps", "clip_eps_high", "value_clip_eps",
                     "early_stop_kl", "kl_target", "score_clip", "reward_timeout", "importance_cap", "lora_alpha",
                     "overlong_penalty"], POSITIVE),
    **dict.fromkeys(["grad_clip", "weight_decay", "centering", "nll_coef", "simpo_gamma", "value_coef", "entropy_coef",
                     "missing_eos_penalty", "kl_coef", "eval_temperature"], NOT_NEGATIVE),
    **dict.fromkeys(["seed", "warmup_steps", "lora_r", "actor_lora_r", "critic_lora_r", "eos_token",
                     "max_redraws", "overlong_buffer"], ([0, 1], [-1])),
    **dict.fromkeys(["gamma", "gae_lambda", "min_lr_ratio"], SHARE),
    "top_p": ([TINY, 1.0], [0.0, 1 + TINY]),
    "ema_decay": ([0.0, 1 - TINY], [-TINY, 1.0]),
    "label_smoothing": ([0.0, 0.5 - TINY], [-TINY, 0.5]),
    "betas": ([(0.0, 0.0), (1 - TINY, 1 - TINY)], [(-TINY, 0.9), (0.9, -TINY), (1.0, 0.9), (0.9, 1.0)]),
    "seq_len": ([128], [0]),
    "eval_context": ([0, 256], [-1, 257]),  # up to seq_len
    "max_seq_len": ([2], [1, 0]),
    "num_samples": ([2], [1, 0]),
    "kl_horizon": ([13], [12, 0]),  # more than a fifth of the 64 rollouts of a step
}  # fmt: skip
OF_PPO = {"max_seq_len": COUNT, "num_samples": COUNT}
WITH = {  # what a field needs beside it to reach anything
    "lora_alpha": {"lora_r": 1},
    "simpo_beta": {"loss": "simpo"},
    "simpo_gamma": {"loss": "simpo"},
    "desirable_weight": {"loss": "kto"},
    "undesirable_weight": {"loss": "kto"},
    "kl_horizon": {"kl_target": 1.0},
    "overlong_penalty": {"overlong_buffer": 1},
    "importance_cap": {"precision": "bf16"},
    "max_redraws": {"algorithm": "grpo", "num_samples": 2},
}
CASES = [
    (kind, field.name, value, accepted)
    for kind in CONFIGS
    for field in dataclasses.fields(kind)
    for bounds in [{**BOUNDS, **(OF_PPO if kind is PPOConfig else {})}.get(field.name, ([], []))]
    for values, accepted in zip(bounds, (True, False), strict=True)
    for value in values
]


def test_every_number_has_its_range():
    numbers = {
        (kind.__name__, field.name)
        for kind in CONFIGS
        for field in dataclasses.fields(kind)
        if {"int", "float", int, float} & {*re.findall(r"\w+", str(field.type)), field.type}
    }
    named = {(kind.__name__, name) for kind, name, _, _ in CASES}
    weights = {("RolloutConfig", "reward_weights"), ("PPOConfig", "reward_weights")}
    assert numbers - named == weights, "give each number its range in BOUNDS"


@pytest.mark.parametrize("kind, name, value, accepted", CASES, ids=lambda part: getattr(part, "__name__", str(part)))
def test_the_ends_of_a_range(kind, name, value, accepted):
    given = {**WITH.get(name, {}), name: value}
    if accepted:
        assert getattr(kind(**given), name) == value
    else:
        with pytest.raises(ValueError, match=rf"\.{name} is {re.escape(str(value))}, expected"):
            kind(**given)
