"""Steps of the RLHF trainer beside TRL's GRPO and RLOO trainers, from the same weights and responses.

TRL's trainer draws and scores the responses; ours takes the same ones through `estimate_advantages`, or makes a step of
them with `update`. DAPO leaves out groups of equal scores in ours alone: groups here differ. The KL and the clip have
the same numbers on both sides, for the defaults differ.
"""

import dataclasses

import pytest
import torch

from palm_rlhf import PPOConfig, RLHFTrainer
from palm_rlhf.model.interop.cohere import to_cohere_tensors
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.policy.sequences import join, response_logprobs
from tests.factories import wandering_palm

SAMPLES, LONGEST, KL_COEF = 4, 6, 0.3
SCORES = [1.0, -2.0, 0.5, 3.0, 10.0, 12.0, 9.5, 10.5]
PROMPTS = [(2, 3)] * SAMPLES + [(4, 5, 6)] * SAMPLES
TRL = {  # the trainer, and its settings
    "grpo": ("GRPO", {"loss_type": "grpo", "use_bias_correction_kl": False}),
    "dr_grpo": ("GRPO", {"loss_type": "dr_grpo", "scale_rewards": "none", "use_bias_correction_kl": False}),
    "dapo": ("GRPO", {"loss_type": "dapo", "epsilon_high": 0.28, "use_bias_correction_kl": False}),
    "entropy": ("GRPO", {"loss_type": "grpo", "entropy_coef": 0.1, "use_bias_correction_kl": False}),
    "rloo": ("RLOO", {}),
    "gspo": (
        "GRPO",
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.05,
            "epsilon_high": 0.08,
            "use_bias_correction_kl": False,
        },
    ),
    "cispo": ("GRPO", {"loss_type": "cispo", "epsilon_high": 1.5, "use_bias_correction_kl": False}),
    "batch": ("GRPO", {"loss_type": "grpo", "scale_rewards": "batch", "use_bias_correction_kl": False}),
}
ALGORITHMS = {
    "grpo": {"algorithm": "grpo"},
    "dr_grpo": {"algorithm": "grpo", "grpo_variant": "dr_grpo"},
    "dapo": {"algorithm": "grpo", "grpo_variant": "dapo"},
    "entropy": {"algorithm": "grpo", "entropy_coef": 0.1},
    "rloo": {"algorithm": "rloo"},
    "gspo": {"algorithm": "grpo", "grpo_variant": "gspo", "clip_eps": 0.05, "clip_eps_high": 0.08},
    "cispo": {"algorithm": "grpo", "grpo_variant": "cispo", "clip_eps_high": 0.5},
    "batch": {"algorithm": "grpo", "advantage_scale": "batch"},
}


def our_trainer(**options):
    """A trainer of policy 0 with reference 1, every step one minibatch in micro-batches of three rows."""
    settings = {
        "rollouts_per_step": len(PROMPTS),
        "num_samples": SAMPLES,
        "minibatch_size": len(PROMPTS),
        "micro_batch_size": 3,
        "epochs": 1,
        "max_new_tokens": LONGEST,
        "eos_token": 1,
        "kl_coef": KL_COEF,
        "plot": False,
    }
    return RLHFTrainer(
        palm=wandering_palm(0),
        reward_model=lambda prompts, completions: SCORES,
        prompt_token_ids=[torch.tensor(prompt) for prompt in PROMPTS[::SAMPLES]],
        reference=wandering_palm(1),
        config=PPOConfig(**{**settings, **options}),
    )


@pytest.fixture(scope="module")
def rollout_of(trl_trainer, tmp_path_factory):
    """`rollout_of("dapo")` is TRL's trainer of policy 0 with reference 1, and one rollout of it."""

    def build(algorithm):
        kind, settings = TRL[algorithm]
        folder, reference = tmp_path_factory.mktemp("cohere"), wandering_palm(1)
        wandering_palm(0).save_pretrained(folder, format="cohere")
        trainer = trl_trainer(
            kind,
            folder,
            reward_funcs=lambda completions, **_: SCORES,
            num_generations=SAMPLES,
            per_device_train_batch_size=len(PROMPTS),
            max_completion_length=LONGEST,
            beta=KL_COEF,
            **settings,
        )
        weights = to_cohere_tensors(reference.config, reference.state_dict())
        trainer.ref_model.load_state_dict(weights, strict=False)  # without the output layer, which is tied
        torch.manual_seed(0)
        return trainer, trainer._generate_and_score_completions(
            [{"prompt": " ".join(map(str, prompt))} for prompt in PROMPTS]
        )

    return build


@torch.no_grad()
def our_rollout(trainer, theirs):
    """TRL's responses, as if our policy had drawn them."""
    lengths = theirs["completion_mask"].sum(dim=-1).tolist()
    assert min(lengths) < max(lengths)
    responses = [ids[:length] for ids, length in zip(theirs["completion_ids"], lengths, strict=True)]
    sequences = join([torch.tensor(prompt) for prompt in PROMPTS], responses)
    truncated = torch.tensor([int(response[-1]) != 1 for response in responses])
    return Rollout(sequences, response_logprobs(trainer.palm, sequences).logprobs, truncated)


def our_experience(trainer, theirs):
    scores = Scores(torch.tensor(SCORES), torch.ones(len(SCORES), dtype=torch.bool))
    return trainer.estimate_advantages(our_rollout(trainer, theirs), scores)


@pytest.fixture(scope="module", params=ALGORITHMS)
def rollout(request, rollout_of):
    """The algorithm, and TRL's rollout."""
    return request.param, rollout_of(request.param)[1]


def check_advantages(rollout, **changed):
    name, theirs = rollout
    got = our_experience(our_trainer(**{**ALGORITHMS[name], **changed}), theirs)
    expected = theirs["advantages"].unsqueeze(-1) * theirs["completion_mask"]
    torch.testing.assert_close(got.advantages, expected, rtol=3e-4, atol=2e-5)  # TRL adds 1e-4 to deviations


def test_advantages_of_the_trainer_are_those_of_trl(rollout):
    check_advantages(rollout)


@pytest.mark.parametrize(
    ("rollout", "changed"),
    [
        ("rloo", {"algorithm": "grpo", "kl_penalty": "reward", "grpo_variant": "dr_grpo"}),
        ("rloo", {"kl_coef": 0.2}),
        ("rloo", {"kl_penalty": "loss"}),
        ("grpo", {"algorithm": "rloo", "kl_penalty": "loss"}),
        ("grpo", {"kl_penalty": "reward"}),
        ("grpo", {"grpo_variant": "dr_grpo"}),
        ("dr_grpo", {"grpo_variant": "grpo"}),
        ("dapo", {"grpo_variant": "dr_grpo"}),
        ("batch", {"advantage_scale": "group"}),
        ("batch", {"advantage_scale": "none"}),
        ("grpo", {"advantage_scale": "batch"}),
    ],
    indirect=["rollout"],
)
def test_advantages_of_the_trainer_see_another_option(rollout, changed):
    with pytest.raises(AssertionError):
        check_advantages(rollout, **changed)


@pytest.fixture(scope="module", params=["grpo", "dr_grpo", "dapo", "entropy", "rloo", "gspo", "cispo", "batch"])
def moved(request, rollout_of):
    """The variant, TRL's numbers of a step on responses of a policy that has moved since, and how far it has."""
    trainer, theirs = rollout_of(request.param)
    scale = 0.1 if request.param == "rloo" else 0.4  # it adds up over a response there
    noise = scale * torch.randn(theirs["completion_ids"].shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logprobs, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([theirs["prompt_ids"], theirs["completion_ids"]], dim=1),
            torch.cat([theirs["prompt_mask"], theirs["completion_mask"]], dim=1),
            theirs["completion_ids"].shape[1],
        )
    theirs["old_per_token_logps"] = logprobs + noise
    theirs["old_logps"] = ((logprobs + noise) * theirs["completion_mask"]).sum(dim=-1)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, theirs)
    loss.backward()
    norms = [weight.grad.norm() for weight in trainer.model.parameters()]
    metrics = trainer._metrics["train"]
    numbers = {
        "loss": loss.item(),
        "grad_norm": torch.stack(norms).norm().item(),
        "kl": metrics["kl"][-1] if "kl" in metrics else None,
        "clip_fraction": metrics["cispo_clip_ratio" if request.param == "cispo" else "clip_ratio/region_mean"][-1],
        "entropy": metrics["entropy"][-1],
    }
    return request.param, theirs, noise, numbers


def check_step(moved, **changed):
    name, theirs, noise, numbers = moved
    trainer = our_trainer(**{**ALGORITHMS[name], **changed})
    experience = our_experience(trainer, theirs)
    experience = dataclasses.replace(
        experience,
        logprobs=experience.logprobs + noise,
        advantages=theirs["advantages"].unsqueeze(-1) * experience.action_mask,
    )
    metrics = trainer.update(experience)
    loss = metrics["policy_loss"] + KL_COEF * metrics.get("kl_loss", 0.0)
    assert abs(numbers["loss"]) > 1e-3 and 0 < numbers["clip_fraction"] < 1
    expected = pytest.approx(numbers["loss"], rel=1e-4)
    assert loss - trainer.config.entropy_coef * metrics["entropy"] == expected
    assert metrics["grad_norm"] == pytest.approx(numbers["grad_norm"], rel=1e-4)
    assert metrics["entropy"] == pytest.approx(numbers["entropy"], rel=1e-4)
    if name not in ("rloo", "gspo", "cispo"):  # where TRL counts responses, or good ones alone; ours all tokens
        assert metrics["clip_fraction"] == pytest.approx(numbers["clip_fraction"], rel=1e-4)
    if name == "dapo":  # the others' is divided as their loss is
        assert metrics["kl_loss"] == pytest.approx(numbers["kl"], rel=1e-4)


def test_a_step_of_the_trainer_is_that_of_trl(moved):
    check_step(moved)


@pytest.mark.parametrize(
    ("moved", "changed"),
    [
        ("grpo", {"grpo_variant": "dr_grpo"}),
        ("grpo", {"clip_eps": 0.1}),
        ("grpo", {"kl_coef": 0.2}),
        ("grpo", {"kl_estimator": "k2"}),
        ("grpo", {"temperature": 0.9}),
        ("grpo", {"entropy_coef": 0.1}),
        ("entropy", {"entropy_coef": 0.0}),
        ("grpo", {"clip_eps_high": 0.28}),
        ("dr_grpo", {"max_new_tokens": LONGEST + 1}),
        ("dr_grpo", {"grpo_variant": "grpo"}),
        ("dapo", {"clip_eps_high": 0.2}),
        ("rloo", {"ratio_level": "token"}),
        ("rloo", {"clip_eps": 0.1}),
        ("dapo", {"grpo_variant": "grpo", "clip_eps_high": 0.28}),
        ("gspo", {"ratio_level": "token"}),
        ("gspo", {"ratio_level": "sequence"}),
        ("gspo", {"clip_eps_high": 0.05}),
        ("gspo", {"grpo_variant": "cispo", "ratio_level": "geometric", "loss_aggregation": "sequence"}),
        ("cispo", {"grpo_variant": "dapo", "clip_eps": 1.0}),
        ("cispo", {"clip_eps_high": 1.5}),
        ("cispo", {"loss_aggregation": "sequence"}),
    ],
    indirect=["moved"],
)
def test_a_step_of_the_trainer_sees_another_option(moved, changed):
    with pytest.raises(AssertionError):
        check_step(moved, **changed)
