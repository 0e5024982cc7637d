"""The RLHF trainer's advantages, gradients and metrics beside their definition, with every option at work at once.

The definition, of another value of an option, must be another one: then an option that reaches nothing, or reaches
what it should not, fails the comparison.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from palm_rlhf import PPOConfig, RLHFTrainer

from .rlhf_definition import counts, credit, critic_says, policy_says, shape, step_loss
from .trainers import palm_of

EOS, SCORES = 5, [1.0, -0.5, 3.0, 0.5, 2.0, 2.0, -4.0, 0.5]  # of eight responses; two to a prompt score the same
BASE = {"temperature": 0.8, "clip_eps": 0.15, "clip_eps_high": 0.25, "entropy_coef": 0.05, "kl_coef": 0.3,
        "score_clip": 1.2, "scale_scores": True, "missing_eos_penalty": 0.4}  # fmt: skip
PPO = {**BASE, "value_clip_eps": 0.1, "value_coef": 0.7, "gamma": 0.9, "gae_lambda": 0.7}
GROUPS = {**BASE, "num_samples": 2}
CASES = {
    "ppo": PPO,
    "ppo, its KL in the loss": {**PPO, "kl_penalty": "loss", "kl_estimator": "k2", "value_clip_eps": None},
    "ppo, adapters": {**PPO, "actor_lora_r": 2, "critic_lora_r": 3, "whiten_advantages": False},
    "ppo, shared trunk": {**PPO, "shared_trunk": True, "top_k": 5, "clip_eps_high": None},
    "grpo": {**GROUPS, "algorithm": "grpo", "top_p": 0.8},
    "grpo, its KL in the reward": {**GROUPS, "algorithm": "grpo", "kl_penalty": "reward", "num_samples": 4},
    "dr_grpo": {**GROUPS, "algorithm": "grpo", "grpo_variant": "dr_grpo", "top_k": 6, "top_p": 0.7},
    "dapo": {**GROUPS, "algorithm": "grpo", "grpo_variant": "dapo", "clip_eps_high": None, "kl_estimator": "k2"},
    "rloo": {**GROUPS, "algorithm": "rloo", "num_samples": 4},
    "rloo of tokens": {**GROUPS, "algorithm": "rloo", "ratio_level": "token"},
    "gspo": {**GROUPS, "algorithm": "grpo", "grpo_variant": "gspo", "clip_eps": 0.01, "clip_eps_high": 0.02},
    "cispo": {**GROUPS, "algorithm": "grpo", "grpo_variant": "cispo", "clip_eps": None, "clip_eps_high": 0.03},
    "dapo that leaves out": {
        **GROUPS,
        "algorithm": "grpo",
        "grpo_variant": "dapo",
        "missing_eos_penalty": 0.0,
        "mask_truncated": True,
        "advantage_scale": "batch",
    },
    "grpo of responses": {
        **GROUPS,
        "algorithm": "grpo",
        "ratio_level": "sequence",
        "loss_aggregation": "constant",
        "overlong_buffer": 4,
        "overlong_penalty": 0.7,
        "advantage_scale": "none",
        "max_redraws": 3,
    },
    "ppo that leaves out": {
        **PPO,
        "mask_truncated": True,
        "loss_aggregation": "sequence",
        "clip_eps": 0.04,
        "clip_eps_high": 0.04,
    },
    "rloo, its KL in the loss": {**GROUPS, "algorithm": "rloo", "kl_penalty": "loss"},
}


def make_trainer(**options) -> RLHFTrainer:
    settings = {"rollouts_per_step": 8, "minibatch_size": 8, "epochs": 1, "max_new_tokens": 6, "eos_token": EOS,
                "grad_clip": 0.0, "plot": False, "learning_rate": 1e-3}  # fmt: skip
    palm = palm_of().double()
    return RLHFTrainer(
        palm=palm,
        reward_model=lambda prompts, completions: SCORES,
        prompt_token_ids=[torch.arange(1 + index % 3) + index for index in range(8)],
        reference=None if options.get("actor_lora_r") else palm_of(1).double(),
        config=PPOConfig(**{**settings, **options}),
    )


@torch.no_grad()
def stir(trainer, size: float) -> None:
    """Move all that is trained, so that adapters and values are not 0 and ratios not 1."""
    for parameter in trainer.actor_critic.actor_parameters() + trainer.actor_critic.critic_parameters():
        parameter.add_(size * torch.randn_like(parameter))


@pytest.fixture(scope="module", params=CASES)
def step(request):
    """One step of the trainer on responses of a policy that has moved since, and what the definition needs of it."""
    torch.manual_seed(0)
    trainer = make_trainer(**CASES[request.param])
    ac, c = trainer.actor_critic, trainer.config
    stir(trainer, 0.2)
    rollout = trainer.collect()
    s = rollout.sequences
    pairs = [
        (row[:prompt], row[prompt : prompt + response])
        for row, prompt, response in zip(s.tokens, s.prompt_lengths.tolist(), s.response_lengths.tolist(), strict=True)
    ]
    with torch.no_grad():
        old = [[float(said.logprob) for said in policy_says(c, trainer.palm, *pair, ac.actor_scope)] for pair in pairs]
        ref = [[float(said.logprob) for said in policy_says(c, trainer.reference.palm, *pair)] for pair in pairs]
        has_values = c.algorithm == "ppo"
        old_values = [list(map(float, critic_says(ac, *pair))) if has_values else [] for pair in pairs]
    experience = trainer.estimate_advantages(rollout, trainer.score(rollout))
    stir(trainer, 0.3 if c.actor_lora_r else 0.05)
    trainer.run.base_rates = [0.0 for _ in trainer.run.base_rates]
    metrics = trainer.update(experience)
    return SimpleNamespace(
        trainer=trainer, pairs=pairs, truncated=rollout.truncated.tolist(), recorded=rollout.logprobs,
        old=old, ref=ref, old_values=old_values, experience=experience, metrics=metrics,
        gradients={name: p.grad.clone() for name, p in ac.named_parameters() if p.grad is not None},
    )  # fmt: skip


def in_rows(step, tensor):
    return [row[: len(response)].tolist() for row, (_, response) in zip(tensor, step.pairs, strict=True)]


def close(got: list[list[float]], expected: list[list[float]]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, abs=2e-7)  # scores are float32


def told_of(step, c) -> tuple[list[float], list[bool]]:
    """The scores that are learnt from, and which rows count."""
    lengths = [len(response) for _, response in step.pairs]
    return shape(c, SCORES, step.truncated, lengths), counts(c, SCORES, step.truncated)


def check_credit(step, c) -> None:
    expected = credit(c, *told_of(step, c), step.old, step.ref, step.old_values)
    counted = step.experience.action_mask.any(dim=-1).tolist()
    assert counted == expected.counted
    rows = [index for index, counts in enumerate(counted) if counts]
    for name in ("advantages", "returns"):
        got = in_rows(step, getattr(step.experience, name))
        close([got[row] for row in rows], [getattr(expected, name)[row] for row in rows])


def check_update(step, c) -> None:
    ac = step.trainer.actor_critic
    told = credit(c, *told_of(step, c), step.old, step.ref, step.old_values)
    said = [policy_says(c, ac.palm, *pair, ac.actor_scope) for pair in step.pairs]
    values = [critic_says(ac, *pair) if c.algorithm == "ppo" else [] for pair in step.pairs]
    loss, metrics = step_loss(c, told, step.old, said, step.ref, step.old_values, values)
    names, parameters = zip(*((name, p) for name, p in ac.named_parameters() if name in step.gradients), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
    for name, gradient in step.gradients.items():
        if expected[name] is None:
            assert not gradient.any(), name
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6, msg=name)
    assert {name: step.metrics[name] for name in metrics} == pytest.approx(metrics, abs=1e-6)
    norms = {"grad_norm": [], "critic_grad_norm": []}
    for name, gradient in expected.items():
        if gradient is not None:
            norms["grad_norm" if name.startswith("palm.") else "critic_grad_norm"].append(gradient.square().sum())
    for name, squares in norms.items():
        if squares:
            assert step.metrics[name] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-4)


def test_the_rollout_shows_what_the_options_are_about(step):
    """Lengths differ, some responses end, ratios pass the bounds, and values theirs where there are any."""
    lengths = [len(response) for _, response in step.pairs]
    assert len(set(lengths)) > 1 and 0 < sum(step.truncated) < 8
    assert 0 < step.metrics["clip_fraction"] < 1
    if step.trainer.config.algorithm == "ppo" and step.trainer.config.value_clip_eps:
        assert 0 < step.metrics["value_clip_fraction"] < 1


def test_the_recorded_log_probabilities_are_those_of_the_definition(step):
    close(in_rows(step, step.recorded), step.old)


@pytest.mark.law("PPOConfig.algorithm", "PPOConfig.grpo_variant", "PPOConfig.gamma", "PPOConfig.gae_lambda")
@pytest.mark.law("PPOConfig.whiten_advantages", "PPOConfig.scale_scores", "PPOConfig.score_clip")
@pytest.mark.law("PPOConfig.overlong_buffer", "PPOConfig.overlong_penalty", "PPOConfig.mask_truncated")
@pytest.mark.law("PPOConfig.advantage_scale")
@pytest.mark.law("PPOConfig.missing_eos_penalty", "PPOConfig.kl_coef", "PPOConfig.kl_penalty", "PPOConfig.num_samples")
def test_advantages_and_returns_are_those_of_the_definition(step):
    check_credit(step, step.trainer.config)


@pytest.mark.law("PPOConfig.clip_eps", "PPOConfig.clip_eps_high", "PPOConfig.value_clip_eps", "PPOConfig.value_coef")
@pytest.mark.law("PPOConfig.entropy_coef", "PPOConfig.kl_estimator", "PPOConfig.temperature")
@pytest.mark.law("PPOConfig.ratio_level", "PPOConfig.loss_aggregation")
@pytest.mark.law("PPOConfig.top_k", "PPOConfig.top_p")
def test_gradients_and_metrics_are_those_of_the_definition(step):
    check_update(step, step.trainer.config)


OTHERS = {
    "ppo": [
        *(
            {"temperature": 1.0},
            {"clip_eps": 0.2},
            {"clip_eps_high": None},
            {"value_clip_eps": 0.2},
            {"value_coef": 0.1},
        ),
        *({"entropy_coef": 0.0}, {"entropy_coef": -0.05}, {"gamma": 1.0}, {"gae_lambda": 0.95}, {"kl_coef": 0.05}),
        *({"whiten_advantages": False}, {"scale_scores": False}, {"score_clip": None}, {"missing_eos_penalty": 0.0}),
        {"kl_penalty": "loss"},
    ],
    "ppo, its KL in the loss": [
        {"kl_penalty": None},
        {"kl_estimator": "k3"},
        {"value_clip_eps": 0.1},
        {"kl_coef": -0.3},
    ],
    "ppo, shared trunk": [{"top_k": None}, {"top_k": 4}],
    "grpo": [
        *({"algorithm": "rloo"}, {"grpo_variant": "dr_grpo"}, {"grpo_variant": "dapo"}, {"kl_penalty": "reward"}),
        *({"num_samples": 4}, {"top_p": None}, {"top_p": 0.6}, {"entropy_coef": 0.0}),
    ],
    "grpo, its KL in the reward": [{"kl_penalty": None}, {"algorithm": "rloo"}],
    "dr_grpo": [{"grpo_variant": "grpo"}, {"grpo_variant": "dapo"}, {"max_new_tokens": 7}],
    "dapo": [{"grpo_variant": "grpo"}, {"kl_estimator": "k3"}, {"clip_eps_high": 0.15}],
    "rloo": [{"ratio_level": "token"}, {"ratio_level": "geometric"}, {"algorithm": "grpo"}, {"num_samples": 2}],
    "rloo of tokens": [{"ratio_level": "sequence"}, {"loss_aggregation": "sequence"}, {"kl_penalty": "loss"}],
    "gspo": [
        *({"ratio_level": "sequence"}, {"ratio_level": "token"}, {"loss_aggregation": "token"}),
        *({"grpo_variant": "grpo"}, {"grpo_variant": "cispo"}, {"clip_eps": None}, {"clip_eps_high": None}),
    ],
    "cispo": [
        *({"grpo_variant": "gspo"}, {"grpo_variant": "dapo"}, {"loss_aggregation": "sequence"}),
        *({"ratio_level": "geometric"}, {"clip_eps": 0.03}, {"clip_eps_high": None}),
    ],
    "dapo that leaves out": [
        *({"mask_truncated": False}, {"missing_eos_penalty": 0.4}, {"overlong_buffer": 4}),
        *({"advantage_scale": None}, {"advantage_scale": "none"}, {"grpo_variant": "grpo"}),
    ],
    "grpo of responses": [
        *({"ratio_level": None}, {"ratio_level": "geometric"}, {"loss_aggregation": None}, {"max_redraws": None}),
        *({"overlong_buffer": 0}, {"overlong_buffer": 6}, {"overlong_penalty": 1.0}, {"mask_truncated": True}),
    ],
    "ppo that leaves out": [{"mask_truncated": False}, {"loss_aggregation": None}, {"loss_aggregation": "constant"}],
    "rloo, its KL in the loss": [{"kl_penalty": "reward"}],
}


@pytest.mark.parametrize(
    "step, changed",
    [(case, change) for case, changes in OTHERS.items() for change in changes],
    indirect=["step"],
    ids=str,
)
def test_the_definition_of_another_value_is_another_one(step, changed):
    other = SimpleNamespace(**{**dataclasses.asdict(step.trainer.config), **changed})
    with pytest.raises(AssertionError):
        check_credit(step, other)
        check_update(step, other)


@pytest.mark.law("PPOConfig.shared_trunk", "PPOConfig.actor_lora_r", "PPOConfig.critic_lora_r")
def test_policy_and_critic_are_trained_in_the_parts_asked_for():
    """All of both; their adapters, of a rank each, and the value head; or one trunk, and the value head."""

    def trained(**options):
        trainer = make_trainer(**options)
        names = {id(p): name for name, p in trainer.actor_critic.named_parameters()}
        groups = trainer.run.optimizer.param_groups
        return trainer.actor_critic, {names[id(p)] for group in groups for p in group["params"]}

    head = {"value_head.weight", "value_head.bias"}
    both, names = trained()
    assert names == {name for name, _ in both.named_parameters()} > head
    assert {name.partition(".")[0] for name in names} == {"palm", "critic", "value_head"}
    low, names = trained(actor_lora_r=2, critic_lora_r=3)
    ranks = {"palm.finetune_modules.actor": 2, "critic.finetune_modules.critic": 3}
    assert {name[: name.rindex(".0.")] for name in names - head} == set(ranks)
    for scope, rank in ranks.items():
        assert {
            low.get_parameter(name).shape[1] for name in names if name.startswith(scope) and name.endswith(".A")
        } == {rank}
    _, names = trained(shared_trunk=True)
    assert names - head == {f"palm.{name}" for name, _ in palm_of().named_parameters()} and names > head
