"""The memory that a plan foretells, against what real trainers take on a CPU: every tensor counted while it lives."""

import gc

import pytest
import torch

from palm_rlhf import PaLM
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.planning.live_memory import LiveMemory
from palm_rlhf.planning.memory_plan import plan_memory
from palm_rlhf.planning.plan_settings import PlanSettings
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.trainer import RLHFTrainer
from palm_rlhf.training.supervised import SupervisedTrainer
from palm_rlhf.training.supervised_config import SupervisedConfig
from palm_rlhf.training.weighted_examples import Example

BLOCKS = {
    "parallel": {},
    "serial": {"block": "serial", "norm": "rms", "tie_embeddings": False, "ff_inner_dim": 352},
}
ROWS, TOKENS, NEW = 4, 128, 48


def config_of(block):
    return PaLMConfig(num_tokens=600, dim=128, depth=4, heads=4, dim_head=32, kv_heads=2, z_loss=0.0, **BLOCKS[block])


def palm_of(config, dtype):
    return PaLM.from_config(config).to(getattr(torch, dtype))


def sft_peak(config, dtype, lora_r, checkpointing):
    palm = palm_of(config, dtype)
    examples = [Example(torch.randint(600, (TOKENS,)), torch.ones(TOKENS)) for _ in range(3 * ROWS)]
    settings = SupervisedConfig(
        batch_size=ROWS,
        num_epochs=1,
        lora_r=lora_r,
        gradient_checkpointing=checkpointing,
        precision="float32",
        plot=False,
    )
    trainer = SupervisedTrainer(palm, train_data=examples, config=settings)
    return peak_of_steps(trainer, palm)


def ppo_peak(config, dtype, lora_r, share_base):
    palm = palm_of(config, dtype)
    reward = RewardModel(palm, use_lora=lora_r > 0, lora_r=lora_r or 8, share_base=share_base).eval()
    settings = PPOConfig(
        num_steps=2, rollouts_per_step=ROWS, rollout_batch_size=ROWS, minibatch_size=ROWS, max_new_tokens=NEW, epochs=1,
        actor_lora_r=lora_r, share_base=share_base, plot=False,
    )  # fmt: skip
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=reward,
        critic=reward,
        prompt_token_ids=torch.randint(600, (ROWS, TOKENS - NEW)),
        config=settings,
    )
    return peak_of_steps(trainer, palm, reward, trainer.actor_critic, trainer.reference.palm)


def peak_of_steps(trainer, *models):
    """The bytes at the peak of a trainer's second step, with the weights that were there before the counting."""
    steps = trainer.steps()
    with LiveMemory() as memory:
        for model in models:
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.view(-1)  # an operation, by which the counting sees the tensor
        next(steps)
        gc.collect()
        memory.restart_peak()
        next(steps)
        return memory.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("lora_r, checkpointing", [(0, False), (8, False), (0, True), (8, True)])
def test_fine_tuning_takes_what_the_plan_says(block, dtype, lora_r, checkpointing):
    config = config_of(block)
    settings = PlanSettings(
        lora_r=lora_r, gradient_checkpointing=checkpointing, dtype=dtype, batch_size=ROWS, seq_len=TOKENS
    )
    plan = plan_memory("sft", config, settings)
    assert plan.total == pytest.approx(sft_peak(config, dtype, lora_r, checkpointing), rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("lora_r, share_base", [(0, False), (8, False), (8, True)])
def test_ppo_takes_what_the_plan_says(block, dtype, lora_r, share_base):
    config = config_of(block)
    settings = PlanSettings(
        lora_r=lora_r, share_base=share_base, dtype=dtype, batch_size=ROWS, seq_len=TOKENS, new_tokens=NEW,
        rollout_batch_size=ROWS,
    )  # fmt: skip
    plan = plan_memory("ppo", config, settings)
    assert plan.total == pytest.approx(ppo_peak(config, dtype, lora_r, share_base), rel=0.1)
