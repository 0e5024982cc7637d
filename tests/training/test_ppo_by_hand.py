"""examples/ppo_by_hand.py: PPO written out ends with the weights of RLHFTrainer, and a change of either is noticed."""

import copy
import importlib
import re
from dataclasses import replace

import pytest
import torch

from palm_rlhf import PaLM
from palm_rlhf.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PROMPTS = [
    torch.tensor([*text.encode(), TOKENIZER.eos_token]) for text in ("Hi", "How are you?", "No", "And you?", "So")
]
# What each setting is here differs from its default, so that one which reaches only one of the two is seen.
SMALL = {
    "num_steps": 3,
    "rollouts_per_step": 8,
    "minibatch_size": 4,
    "epochs": 3,
    "max_new_tokens": 6,
    "temperature": 0.9,
    "missing_eos_penalty": 0.3,
    "learning_rate": 3e-3,
    "kl_coef": 0.2,
    "kl_target": 0.7,
    "kl_horizon": 50,
    "gamma": 0.97,
    "gae_lambda": 0.8,
    "clip_eps": 0.1,
    "value_clip_eps": 0.05,
    "value_coef": 0.3,
    "grad_clip": 0.2,
    "seed": 7,
}


@pytest.fixture(scope="module")
def example(root):
    """The example as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "examples")
        yield importlib.import_module("ppo_by_hand")


@pytest.fixture(scope="module")
def palm():
    """A model that ends about a third of its responses within six tokens."""
    torch.manual_seed(0)
    palm = PaLM(num_tokens=TOKENIZER.num_tokens, dim=32, depth=2, heads=2, dim_head=8)
    with torch.no_grad():
        palm.token_emb.weight[TOKENIZER.eos_token] += 0.4 * palm.token_emb.weight.std() * torch.randn(32).sign()
    return palm


def vowels(prompts, responses):
    """Reward responses for the vowels in them."""
    return [sum(letter in "aeiou" for letter in text) - 0.1 * len(text) for text in responses]


def weights(palm):
    return torch.cat([parameter.detach().flatten() for parameter in palm.parameters()])


def by_hand(example, palm, **settings):
    palm = copy.deepcopy(palm)
    metrics = list(example.ppo(palm, PROMPTS, vowels, TOKENIZER, example.Settings(**settings)))
    return weights(palm), metrics


def test_both_end_with_the_same_weights_and_report_the_same(example, palm):
    ours, metrics = by_hand(example, palm, **SMALL)
    copied = copy.deepcopy(palm)
    trainer = example.trainer_of(copied, PROMPTS, vowels, TOKENIZER, example.Settings(**SMALL))
    reported = list(trainer.steps())
    assert (ours - weights(palm)).abs().max() > 1e-3  # it moved
    torch.testing.assert_close(ours, weights(copied), rtol=0, atol=1e-6)
    assert len(metrics) == len(reported) == SMALL["num_steps"]
    for line, expected in zip(metrics, reported, strict=True):
        assert line == pytest.approx({name: expected[name] for name in line}, abs=1e-5)
    assert 0 < reported[0]["eos_rate"] < 1 and metrics[-1]["kl_coef"] != SMALL["kl_coef"]


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"num_steps"}))
def test_every_setting_reaches_the_loop(example, palm, name):
    """With another value of a setting the weights are others, so the test above guards each of them."""
    changed = {"rollouts_per_step": 12, "minibatch_size": 8, "epochs": 2, "max_new_tokens": 5, "kl_horizon": 500}
    value = changed.get(name, 0 if name == "seed" else SMALL[name] / 2)
    assert not torch.equal(by_hand(example, palm, **SMALL)[0], by_hand(example, palm, **{**SMALL, name: value})[0])


MUTANTS = {
    "the score counts less": ("token_rewards(shaped,", "token_rewards(shaped * 0.9,"),
    "advantages are not whitened": ("advantages = whiten(advantages, mask)", "pass"),
    "rewards without KL": ("kl_coef=kl_coef)\n\n        # 6", "kl_coef=0.0)\n\n        # 6"),
    "the ratio is to itself": ("old_logprobs[rows, :width],", "now.logprobs.detach(),"),
    "the critic's gradients are not clipped": ("torch.nn.utils.clip_grad_norm_(critic, s.grad_clip)", "pass"),
    "one epoch": ("for epoch in range(s.epochs)", "for epoch in range(1)"),
    "new values": ("                    values[rows, :width],", "                    now.values.detach(),"),
    "the KL weight stays": ("kl_coef = adapt_kl_coef(", "_ = adapt_kl_coef("),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_end_elsewhere(example, palm, root, name):
    source = (root / "examples/ppo_by_hand.py").read_text(encoding="utf-8")
    old, new = MUTANTS[name]
    assert source.count(old) == 1
    mutant = {"__name__": "mutant"}
    exec(compile(source.replace(old, new), "mutant", "exec"), mutant)
    copied = copy.deepcopy(palm)
    list(mutant["ppo"](copied, PROMPTS, vowels, TOKENIZER, example.Settings(**SMALL)))
    assert (weights(copied) - by_hand(example, palm, **SMALL)[0]).abs().max() > 1e-5


def test_the_example_runs_and_prints_the_same_learning_twice(example, capsys, monkeypatch):
    settings = replace(example.Settings(), num_steps=2, rollouts_per_step=8, minibatch_size=8, epochs=1)
    example.main(settings, pretraining_steps=2)
    lines = capsys.readouterr().out.splitlines()
    curves = {
        title: [line.removeprefix(title).strip() for line in lines if line.startswith(title)]
        for title in ("by hand", "RLHFTrainer")
    }
    assert len(curves["by hand"]) == 2 and curves["by hand"] == curves["RLHFTrainer"]
    moved, differ = map(
        float, re.search(r"moved by up to (\S+); RLHFTrainer's differ .* up to (\S+);", lines[-1]).groups()
    )
    assert moved > 1e-4 and differ <= 1e-6
