"""The configs of all trainers, a tiny trainer of each, and the mark of a test that is a field's law.

`@pytest.mark.law("PPOConfig.gamma")` stands above a test that fails where `PPOConfig.gamma` does nothing, and
`@law_of_each_config("betas")` above one that does so for every config with that field, which it gets as `kind`.
"""

import dataclasses

import numpy as np
import pytest
import torch

from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training import (
    LanguageModelTrainer,
    LMConfig,
    PPOConfig,
    Preference,
    PreferenceConfig,
    PreferenceTrainer,
    Ranking,
    RewardConfig,
    RewardModelTrainer,
    RLHFTrainer,
    SupervisedConfig,
    SupervisedTrainer,
    UnpairedPreference,
)
from palm_rlhf.training.weighted_examples import Example
from tests import factories
from tests.factories import evens

SHORT = {"save_every": 1, "log_every": 1, "precision": "float32", "plot": False, "warmup_steps": 2}
STEPS = {**SHORT, "num_steps": 4}
EPOCHS = {**SHORT, "batch_size": 2, "grad_accum": 2, "num_epochs": 2}
ROLLOUTS = {**STEPS, "rollouts_per_step": 8, "minibatch_size": 4, "epochs": 1, "max_new_tokens": 4, "eos_token": 5}
SETTINGS = {  # of runs of 4 steps
    LMConfig: {**STEPS, "batch_size": 2, "seq_len": 8, "eval_context": 4},
    SupervisedConfig: EPOCHS,
    RewardConfig: EPOCHS,
    PreferenceConfig: EPOCHS,
    PPOConfig: ROLLOUTS,
}
CONFIGS = tuple(SETTINGS)


def configs_with(*fields: str) -> list[type]:
    """The configs that have all of the fields."""
    return [kind for kind in CONFIGS if set(fields) <= {field.name for field in dataclasses.fields(kind)}]


def law_of_each_config(*fields: str) -> pytest.MarkDecorator:
    """Runs a test once for each config that has the fields, as the argument `kind`."""
    return pytest.mark.parametrize("kind", configs_with(*fields), ids=lambda kind: kind.__name__)


def palm_of(seed: int = 0, **fields) -> PaLM:
    """A small PaLM with the same weights at every call."""
    return factories.palm_of(seed, **{"depth": 1, **fields})


def rows(count: int, low: int = 3) -> list[torch.Tensor]:
    """Rows of `low` to `low + 2` random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(12, (low + index % 3,), generator=generator) for index in range(count)]


def make(config, folder=None, resume=False, *, palm=None, valid=False):
    """The trainer of a config, on data of its kind, the first half of which validates it where that is wanted."""
    palm = palm_of() if palm is None else palm
    run = {"config": config, "output_dir": folder, "resume": resume}
    prompts, chosen, rejected = rows(24)[:8], rows(24)[8:16], rows(24)[16:]
    triples = list(zip(prompts, chosen, rejected, strict=True))
    if isinstance(config, PPOConfig):
        if config.max_turns != 8 or config.max_turn_tokens is not None:  # which have a meaning where somebody answers
            run["environment"] = lambda messages: None
        if (config.eval_every, config.eval_samples, config.eval_temperature) != (10, 1, None):
            run["eval_prompts"] = prompts
        reward = evens if config.reward_weights is None else {"evens": evens}
        return RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=prompts, **run)
    if isinstance(config, LMConfig):
        trainer, data = LanguageModelTrainer, np.arange(200) % 12
    elif isinstance(config, SupervisedConfig):
        trainer, data = SupervisedTrainer, [Example(p, torch.ones(len(p), dtype=palm.dtype)) for p in prompts]
    elif isinstance(config, RewardConfig):
        trainer, data, palm = RewardModelTrainer, [Ranking(p, (c, r)) for p, c, r in triples], RewardModel(palm)
    elif config.loss == "kto":
        data = [UnpairedPreference(p, c, index % 2 == 0) for index, (p, c, _) in enumerate(triples)]
        trainer = PreferenceTrainer
    else:
        trainer, data = PreferenceTrainer, [Preference(*triple) for triple in triples]
    return trainer(palm, train_data=data, valid_data=data[: len(data) // 2] if valid else None, **run)


def build(kind, folder=None, resume=False, *, palm=None, valid=False, **changes):
    """The trainer of `SETTINGS[kind]` with some of them changed."""
    return make(kind(**{**SETTINGS[kind], **changes}), folder, resume, palm=palm, valid=valid)


def record_tokens(palm, learning=True) -> list[torch.Tensor]:
    """A list that gets the tokens of each forward with gradients, or of each without."""
    seen = []

    def hook(_, args):
        if torch.is_grad_enabled() == learning:
            seen.append(args[0].clone())

    palm.register_forward_pre_hook(hook)
    return seen
