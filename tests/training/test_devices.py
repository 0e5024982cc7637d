"""Every trainer on the device that it finds: models and data meet there, and a run that was cut off goes on."""

import itertools

import numpy as np
import pytest
import torch

from palm_rlhf import PPOConfig, RewardModel, RLHFTrainer
from palm_rlhf.training import (
    LanguageModelTrainer,
    LMConfig,
    Preference,
    PreferenceConfig,
    PreferenceTrainer,
    RewardConfig,
    RewardModelTrainer,
)
from palm_rlhf.training.ranked_data import Ranking
from palm_rlhf.training.run.random_state import rng_state, set_rng_state
from palm_rlhf.training.supervised import SupervisedTrainer
from palm_rlhf.training.supervised_config import SupervisedConfig
from palm_rlhf.training.weighted_examples import Example
from tests.factories import palm_of

STEPS = 3
SHORT = {
    "log_every": 1,
    "plot": False,
    "compile": False,
    "precision": "float32",
    "learning_rate": 1e-2,
    "save_every": 1,
}
EPOCH = {**SHORT, "batch_size": 2, "grad_accum": 1, "num_epochs": 1, "warmup_steps": 0}
RLHF = {**SHORT, "num_steps": STEPS, "rollouts_per_step": 4, "minibatch_size": 4, "max_new_tokens": 4, "eos_token": 5}
# In the mean over the weights, which move by 1e-2 a step; a GPU's backward may add up in another order each time.
TOLERANCE = {"cpu": 0, "cuda": 1e-4}


def rows(count: int) -> list[torch.Tensor]:
    generator = np.random.default_rng(0)
    return [torch.from_numpy(generator.integers(0, 12, generator.integers(2, 8))) for _ in range(count)]


def language_model(**run):
    config = LMConfig(**SHORT, warmup_steps=0, num_steps=STEPS, batch_size=2, seq_len=8, eval_context=4)
    data = np.random.default_rng(0).integers(0, 12, 200).astype(np.uint8)
    return LanguageModelTrainer(palm_of(num_tokens=256, dropout=0.2), train_data=data, config=config, **run)


def supervised(**run):
    data = [Example(row, torch.ones(len(row))) for row in rows(2 * STEPS)]
    return SupervisedTrainer(palm_of(dropout=0.2), train_data=data, config=SupervisedConfig(**EPOCH), **run)


def preference(**run):
    found = rows(6 * STEPS)
    data = [Preference(*found[first : first + 3]) for first in range(0, len(found), 3)]
    return PreferenceTrainer(palm_of(), train_data=data, config=PreferenceConfig(**EPOCH), **run)


def reward(**run):
    found = rows(8 * STEPS)
    data = [Ranking(found[first], found[first + 1 : first + 4]) for first in range(0, len(found), 4)]
    return RewardModelTrainer(RewardModel(palm_of()), train_data=data, config=RewardConfig(**EPOCH), **run)


def rlhf(config, **run):
    models = {"palm": palm_of(), "reward_model": RewardModel(palm_of(1))}
    return RLHFTrainer(**models, prompt_token_ids=rows(5), config=config, **run)


TRAINERS = {
    "language model": language_model,
    "supervised": supervised,
    "preference": preference,
    "reward": reward,
    "ppo": lambda **run: rlhf(PPOConfig(**RLHF), **run),
    "shared trunk": lambda **run: rlhf(PPOConfig(**RLHF, shared_trunk=True), **run),
    "grpo": lambda **run: rlhf(PPOConfig(**RLHF, algorithm="grpo", num_samples=2), **run),
}


def trained_parameters(trainer) -> list[torch.Tensor]:
    return [parameter.detach() for group in trainer.run.optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_run_that_was_cut_off_goes_on_where_it_computes(kind, device, tmp_path):
    """On a GPU its generator is drawn from too, by dropout and by rollouts."""
    whole = TRAINERS[kind](output_dir=tmp_path / "whole")
    expected = list(whole.steps())
    assert len(expected) == STEPS and {t.device.type for t in trained_parameters(whole)} == {device.type}
    list(itertools.islice(TRAINERS[kind](output_dir=tmp_path / "cut").steps(), 2))
    torch.manual_seed(99)  # the state at the start of the rest does not matter
    rest = TRAINERS[kind](output_dir=tmp_path / "cut", resume=True)
    (last,) = rest.steps()
    pairs = zip(trained_parameters(rest), trained_parameters(whole), strict=True)
    off = float(torch.cat([(got - kept).abs().flatten() for got, kept in pairs]).mean())
    assert last["step"] == STEPS and off <= TOLERANCE[device.type]


def test_the_state_of_the_random_numbers_is_that_of_the_device_too(device):
    torch.manual_seed(3)
    state = rng_state()
    first = torch.rand(4, device=device)
    torch.manual_seed(7)
    torch.rand(5, device=device)
    set_rng_state(state)
    assert torch.equal(torch.rand(4, device=device), first)
