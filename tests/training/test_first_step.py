"""Until the policy moves it is the one that spoke: below float32 too its ratios are 1 to the bit, and its KL is 0."""

import math

import numpy as np
import pytest
import torch

from palm_rlhf import PaLM, PPOConfig, RewardModel, RLHFTrainer
from palm_rlhf.training.preference import PreferenceConfig, PreferenceTrainer
from palm_rlhf.training.preference_data import Preference, UnpairedPreference
from palm_rlhf.training.run.optimizer import computes_below_float32
from tests.factories import SERIAL, palm_of

NUM_TOKENS, EOS = 96, 5
ARITHMETIC = {  # the type of the weights, and the precision of the run
    "autocast": (torch.float32, "bf16"),
    "bfloat16": (torch.bfloat16, "float32"),
    "bfloat16 under autocast": (torch.bfloat16, "bf16"),
}
OTHER_ARITHMETIC = list(ARITHMETIC)[1:]
STILL = {"learning_rate": 1e-30, "weight_decay": 0.0, "plot": False}
RLHF = [
    {},
    {"minibatch_size": 12, "micro_batch_size": None},
    {"actor_lora_r": 2, "critic_lora_r": 2},
    {"shared_trunk": True},
    {"model": SERIAL},
    {"model": SERIAL, "actor_lora_r": 2},
    {"algorithm": "grpo", "num_samples": 4},
    {"algorithm": "grpo", "num_samples": 4, "grpo_variant": "dapo", "kl_coef": 0.1, "kl_penalty": "loss"},
    {"algorithm": "rloo", "num_samples": 4},
    {"temperature": 0.7, "top_k": 20, "entropy_coef": 0.1},
]


def small_palm(dtype: torch.dtype = torch.float32, **options) -> PaLM:
    return palm_of(**{"num_tokens": NUM_TOKENS, "dim": 64, "dim_head": 32, **options}).to(dtype)


def ragged_prompts(count: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(NUM_TOKENS, (1 + 7 * index % 40,), generator=generator) for index in range(count)]


def first_metrics(palm: PaLM, **options) -> dict:
    """Of a step of two optimiser steps of several micro-batches each, which leave the weights where they are."""
    sizes = {"rollouts_per_step": 12, "minibatch_size": 6, "micro_batch_size": 4, "epochs": 1, "max_new_tokens": 24}
    lengths = {"reward_model": lambda prompts, completions: [float(len(row) % 5) for row in completions]}
    trainer = RLHFTrainer(
        palm=palm,
        **{**lengths, **{name: options.pop(name) for name in ("reward_model", "critic") if name in options}},
        prompt_token_ids=ragged_prompts(),
        config=PPOConfig(**{**sizes, "eos_token": EOS, **STILL, **options}),
    )
    trainer.actor_critic.train()
    return next(trainer.steps())


@pytest.mark.parametrize(
    "options, arithmetic",
    [
        *((options, "autocast") for options in RLHF),
        *((o, name) for o in ({}, {"model": SERIAL}) for name in OTHER_ARITHMETIC),
    ],
    ids=str,
)
def test_the_ratios_of_the_first_epoch_are_exactly_1_and_the_kl_is_exactly_0(options, arithmetic, kernels):
    """In each of its minibatches, however they are batched, with prompts and responses of many lengths."""
    dtype, precision = ARITHMETIC[arithmetic]
    options = dict(options)
    palm = small_palm(dtype, **options.pop("model", {}))
    metrics = first_metrics(palm, **{"precision": precision, **options})
    assert metrics["optimizer_steps"] == 12 // options.get("minibatch_size", 6)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] == 0 and metrics.get("kl", 0) == 0 and metrics.get("kl_loss", 0) == 0


@pytest.mark.parametrize(
    "model",
    [
        {"gradient_checkpointing": True},
        {"dim_head": 24, "kv_heads": 2},
        {"num_tokens": 4096},  # whose logits come in chunks
        {"dim": 800, "depth": 1, "ff_mult": 1, "num_tokens": 3200},  # whose logits do so in the reference alone
    ],
    ids=str,
)
def test_so_they_are_of_other_models(model, monkeypatch):
    monkeypatch.setattr("palm_rlhf.ops.logprobs.CHUNK", 1 << 16)
    metrics = first_metrics(small_palm(**model), precision="bf16")
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["kl"] == 0


def test_so_they_are_with_a_critic_from_a_reward_model_and_where_pytorch_is_told_to_round():
    reward = RewardModel(small_palm())
    metrics = first_metrics(small_palm(), reward_model=reward, critic=reward, precision="bf16")
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["value_clip_fraction"] == 0
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        metrics = first_metrics(small_palm(), precision="float32")
    finally:
        torch.set_float32_matmul_precision(before)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["kl"] == 0


def test_products_are_below_float32_by_autocast_by_their_type_or_as_pytorch_is_told(monkeypatch):
    cpu = torch.device("cpu")
    assert computes_below_float32("bf16", torch.float32, cpu)
    assert computes_below_float32("float32", torch.bfloat16, cpu) and computes_below_float32("float32", torch.half, cpu)
    assert not computes_below_float32("float32", torch.float32, cpu)
    assert not computes_below_float32("float32", torch.float64, cpu)
    monkeypatch.setattr("palm_rlhf.training.run.optimizer.computes_bfloat16", lambda device: device.type == "cuda")
    assert computes_below_float32("auto", torch.float32, torch.device("cuda"))
    assert not computes_below_float32("auto", torch.float32, cpu)


def responses(count: int, seed: int = 0) -> list[list[torch.Tensor]]:
    """Prompts with two responses, of all lengths."""
    generator = np.random.default_rng(seed)
    return [
        [torch.from_numpy(generator.integers(0, NUM_TOKENS, generator.integers(1, 30))) for _ in range(3)]
        for _ in range(count)
    ]


def preferences(count: int, paired: bool, seed: int = 0) -> list:
    if paired:
        return [Preference(*rows) for rows in responses(count, seed)]
    return [UnpairedPreference(*rows[:2], index % 2 == 0) for index, rows in enumerate(responses(count, seed))]


FIRST_LOSSES = {"sigmoid": math.log(2), "ipo": 1 / (2 * 0.25) ** 2, "kto": 0.5}  # of a policy that is its reference
NO_DIFFERENCE = ["reward_margin", "chosen_rewards", "rejected_rewards", "z_ref"]


@pytest.mark.parametrize(
    "loss, reference, arithmetic",
    [
        *((loss, reference, "autocast") for loss in FIRST_LOSSES for reference in ("itself", "base", "copy")),
        *(("sigmoid", "itself", name) for name in OTHER_ARITHMETIC),
    ],
)
def test_the_first_rewards_of_preferences_are_exactly_0(loss, reference, arithmetic, kernels):
    """In every step of the first epoch; so DPO's first loss is ln 2, IPO's 1 / (2 beta)^2, and KTO's a half."""
    dtype, precision = ARITHMETIC[arithmetic]
    paired, settings = loss != "kto", {"warmup_steps": 0, "num_epochs": 1, **STILL}
    trainer = PreferenceTrainer(
        small_palm(dtype),
        train_data=preferences(20, paired),
        valid_data=preferences(5, paired, seed=1),
        reference=small_palm(dtype) if reference == "copy" else None,
        config=PreferenceConfig(
            loss=loss, beta=0.25, batch_size=4, grad_accum=2, precision=precision,
            lora_r=2 if reference == "base" else 0, **settings,
        ),
    )  # fmt: skip
    first, second, over_the_end = trainer.steps()
    for metrics in (first, second, trainer.evaluate()):
        assert metrics["loss"] == pytest.approx(FIRST_LOSSES[loss], rel=1e-6)
        assert [metrics[name] for name in NO_DIFFERENCE if name in metrics] == [0.0] * (3 if paired else 4)
    # the last step takes four items for the second time, among others than before
    assert over_the_end["loss"] == pytest.approx(FIRST_LOSSES[loss], rel=1e-2)
