"""The steps of every trainer's optimiser, beside AdamW and the schedule written out by hand in float64."""

import math

import pytest
import torch

from palm_rlhf.training import LMConfig, OnlinePreferenceTrainer, PPOConfig, PreferenceConfig, RolloutConfig

from .trainers import build, configs_with, law_of_each_config, palm_of, rows

# Peak rates, then what multiplies them in four steps: two of warm-up, and a cosine from 1 to 0.2.
RATE, CRITIC_RATE = 3e-3, 7e-3
FACTORS = [warmup * (0.6 + 0.4 * math.cos(math.pi * step / 4)) for step, warmup in enumerate((0.5, 1, 1, 1))]
BETAS, EPS, DECAY = (0.7, 0.8), 1e-3, 0.3
SETTINGS = {"learning_rate": RATE, "warmup_steps": 2, "min_lr_ratio": 0.2, "betas": BETAS, "eps": EPS,
            "weight_decay": DECAY}  # fmt: skip


def record_steps(trainer) -> list[dict]:
    """A list that gets the weights before and after each step of the optimiser, and its gradients, by name."""
    steps, optimizer = [], trainer.run.optimizer.optimizer
    named = {name: p for name, p in trainer.run.module.named_parameters() if p.requires_grad}

    def copies(part=lambda p: p):
        return {name: part(p).detach().clone() for name, p in named.items() if part(p) is not None}

    optimizer.register_step_pre_hook(
        lambda *_: steps.append({"before": copies(), "gradients": copies(lambda p: p.grad)})
    )
    optimizer.register_step_post_hook(lambda *_: steps[-1].update(after=copies()))
    return steps


def check_adamw(steps: list[dict], rates: list[float], critic_rates: list[float], betas=BETAS) -> None:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), with decay on matrices alone."""
    first, second = {}, {}
    assert len(steps) == len(rates)
    for count, (step, rate, critic_rate) in enumerate(zip(steps, rates, critic_rates), start=1):
        assert step["gradients"]
        for name, gradient in step["gradients"].items():
            own_rate = critic_rate if name.startswith(("critic.", "value_head.")) else rate
            m = first[name] = betas[0] * first.get(name, 0.0) + (1 - betas[0]) * gradient
            v = second[name] = betas[1] * second.get(name, 0.0) + (1 - betas[1]) * gradient**2
            m, v = m / (1 - betas[0] ** count), v / (1 - betas[1] ** count)
            decay = DECAY if gradient.ndim > 1 else 0.0
            expected = step["before"][name] * (1 - own_rate * decay) - own_rate * m / (v.sqrt() + EPS)
            atol = 1e-9 if gradient.dtype == torch.float64 else 5e-7
            torch.testing.assert_close(step["after"][name], expected, rtol=0, atol=atol, msg=f"{name}, step {count}")


def palm_for(kind):
    """In float64, but for the trainer that takes float32 alone."""
    return palm_of() if kind is PreferenceConfig else palm_of().double()


def steps_of(kind, **changes) -> list[dict]:
    more = {"critic_learning_rate": CRITIC_RATE} if kind is PPOConfig else {}
    trainer = build(kind, palm=palm_for(kind), **{**SETTINGS, **more, **changes})
    steps = record_steps(trainer)
    list(trainer.steps())
    return steps


@law_of_each_config("learning_rate", "warmup_steps", "min_lr_ratio", "betas", "eps", "weight_decay")
@pytest.mark.law("PPOConfig.critic_learning_rate")
def test_every_step_is_adamws_at_the_rate_of_the_schedule(kind):
    at_each = 2 if kind is PPOConfig else 1  # two minibatches in a step
    rates, critic_rates = (
        [rate * factor for factor in FACTORS for _ in range(at_each)] for rate in (RATE, CRITIC_RATE)
    )
    steps = steps_of(kind)
    check_adamw(steps, rates, critic_rates)
    with pytest.raises(AssertionError):
        check_adamw(steps, rates, critic_rates, betas=(0.9, 0.999))


def test_the_steps_on_the_policys_own_responses_are_at_the_rate_of_the_schedule_too():
    settings = {**SETTINGS, "batch_size": 2, "grad_accum": 2, "num_epochs": 2, "precision": "float32", "plot": False}
    trainer = OnlinePreferenceTrainer(
        palm_of(),
        reward_model=lambda prompts, completions: [float(row.mul(torch.arange(1, 5)).sum()) for row in completions],
        prompt_token_ids=rows(8),
        config=PreferenceConfig(**settings),
        rollouts=RolloutConfig(max_new_tokens=4),
    )
    steps = record_steps(trainer)
    list(trainer.steps())
    rates = [RATE * factor for factor in FACTORS]
    check_adamw(steps, rates, rates)


def test_the_critic_has_the_rate_of_the_policy_unless_it_is_given_its_own():
    rates = [RATE * factor for factor in FACTORS for _ in range(2)]
    check_adamw(steps_of(PPOConfig, critic_learning_rate=None), rates, rates)


@law_of_each_config("grad_clip")
def test_gradients_longer_than_grad_clip_are_scaled_down_to_it(kind):
    """Those of policy and critic each by themselves; 0 is no limit."""

    def first_gradients(grad_clip):
        trainer = build(kind, palm=palm_for(kind), grad_clip=grad_clip)
        steps = record_steps(trainer)
        metrics = next(trainer.steps())
        return steps[0]["gradients"], metrics

    (free, metrics), (clipped, _) = first_gradients(0.0), first_gradients(1e-3)
    groups = {"grad_norm": [], "critic_grad_norm": []}
    for name in free:
        groups["critic_grad_norm" if name.startswith(("critic.", "value_head.")) else "grad_norm"].append(name)
    for metric, names in groups.items():
        if names:
            norm = math.sqrt(sum(float(free[name].square().sum()) for name in names))
            assert norm > 2e-3
            for name in names:
                torch.testing.assert_close(clipped[name], free[name] * 1e-3 / norm, rtol=1e-2, atol=1e-9)
            if kind is not PPOConfig:  # whose norms are means over the minibatches of a step
                assert metrics[metric] == pytest.approx(norm, rel=1e-5)


@pytest.mark.law("LMConfig.optimizer")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_first_update_of_a_matrix_tells_muon_from_adamw(optimizer):
    """AdamW's is the rate in every entry; Muon's has singular values of about one size, where it has any."""
    settings = {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_steps": 0, "eps": 1e-12}
    trainer = build(LMConfig, palm=palm_of().double(), optimizer=optimizer, **settings)
    weight = trainer.palm.layers[0].attn_out.weight
    before = weight.detach().clone()
    next(trainer.steps())
    moved = weight.detach() - before
    entries, singular = moved.abs(), torch.linalg.svdvals(moved)[: len(moved) // 2]
    if optimizer == "adamw":
        torch.testing.assert_close(entries, torch.full_like(entries, 1e-3), rtol=1e-4, atol=0)
    else:
        assert float(singular.min() / singular.max()) > 0.5 and float(entries.min() / entries.max()) < 0.5


def test_every_config_has_the_optimisers_fields():
    assert configs_with(*SETTINGS, "grad_clip") == configs_with()
