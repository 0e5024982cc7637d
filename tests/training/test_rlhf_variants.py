"""The variants of GRPO in the trainer: of what each is made, where its settings count, and refusals."""

import dataclasses

import pytest
import torch

from palm_rlhf import PPOConfig, RLHFTrainer
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.policy.sequences import join
from palm_rlhf.training.rlhf.experience import shape_scores
from palm_rlhf.training.rlhf.variants import VARIANTS
from tests.factories import palm_of

EOS = 5
GRPO = {"algorithm": "grpo", "num_samples": 4}
RLOO = {"algorithm": "rloo", "num_samples": 4}
LENGTHS = [1, 3, 4, 5, 6, 2, 6, 4]  # of responses with room for 6
ENDED = [True, True, True, True, False, True, False, True]
SCORES = [1.0, 2.0, 4.0, -1.0, 3.0, 0.5, 2.0, 6.0]


def make_trainer(**options) -> RLHFTrainer:
    torch.manual_seed(0)
    palm = palm_of(depth=1)
    settings = {"rollouts_per_step": 8, "minibatch_size": 8, "epochs": 1, "max_new_tokens": 6, "eos_token": EOS,
                "plot": False, "kl_coef": 0.0}  # fmt: skip
    return RLHFTrainer(palm=palm, reward_model=lambda prompts, completions: SCORES,
                       prompt_token_ids=[torch.arange(1 + index % 3) for index in range(8)],
                       config=PPOConfig(**{**settings, **options}))  # fmt: skip


def rollout_of(trainer) -> tuple[Rollout, Scores]:
    """Responses of those lengths and scores, and log-probabilities as if the trainer's policy had drawn them."""
    responses = [
        torch.tensor([*[7] * (length - 1), EOS if ended else 7]) for length, ended in zip(LENGTHS, ENDED, strict=True)
    ]
    prompts = [torch.arange(2) if row < 4 else torch.arange(3) for row in range(8)]
    sequences = join(prompts, responses)
    with torch.no_grad():
        logprobs = trainer.actor_critic(sequences, values=False).logprobs
    truncated = torch.tensor([not ended for ended in ENDED])
    return Rollout(sequences, logprobs, truncated), Scores(torch.tensor(SCORES), torch.ones(8, dtype=torch.bool))


@pytest.mark.parametrize("options", [{}, GRPO, RLOO, {**GRPO, "grpo_variant": "dapo"}], ids=str)
def test_truncated_responses_are_left_out_and_count_in_their_groups(options):
    """Baselines are as if they were there; what is whitened is what is left."""
    trainer, masking = make_trainer(**options), make_trainer(mask_truncated=True, **options)
    every = trainer.estimate_advantages(*rollout_of(trainer))
    left = masking.estimate_advantages(*rollout_of(masking))
    assert left.action_mask.sum(dim=-1).tolist() == [
        length if ended else 0 for length, ended in zip(LENGTHS, ENDED, strict=True)
    ]
    if options:
        expected = every.advantages.masked_fill(~left.action_mask, 0.0)
        torch.testing.assert_close(left.advantages, expected)
    else:
        kept = left.advantages[left.action_mask]
        assert float(kept.mean()) == pytest.approx(0, abs=1e-6)
        assert float(kept.std(correction=0)) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(left.returns, every.returns)
    assert masking.update(left)["optimizer_steps"] == 1


@pytest.mark.parametrize(
    "room, rooms", [({"max_new_tokens": 6}, [6] * 8), ({"max_seq_len": 9}, [7] * 4 + [6] * 4)], ids=str
)
def test_long_responses_lose_what_the_buffer_says(room, rooms):
    """Over the last four tokens of the room, which with max_seq_len a longer prompt has less of."""
    trainer = make_trainer(overlong_buffer=4, overlong_penalty=0.8, **{**RLOO, **room})
    rollout, scores = rollout_of(trainer)
    expected = [
        score - 0.8 * min(max(length - (longest - 4), 0) / 4, 1)
        for score, length, longest in zip(SCORES, LENGTHS, rooms, strict=True)
    ]
    torch.testing.assert_close(
        shape_scores(trainer.config, scores, rollout, trainer.score_moments), torch.tensor(expected)
    )
    advantages = trainer.estimate_advantages(rollout, scores).advantages[:, 0]
    others = [sum(expected[row - row % 4 : row - row % 4 + 4]) - own for row, own in enumerate(expected)]
    torch.testing.assert_close(
        advantages, torch.tensor([own - rest / 3 for own, rest in zip(expected, others, strict=True)])
    )


def test_the_penalty_counts_in_full_unless_it_is_said():
    trainer = make_trainer(overlong_buffer=6, **RLOO)
    rollout, scores = rollout_of(trainer)
    assert (
        scores.scores - shape_scores(trainer.config, scores, rollout, trainer.score_moments)
    ).tolist() == pytest.approx([x / 6 for x in LENGTHS])


@pytest.mark.law("PPOConfig.importance_cap")
@pytest.mark.parametrize("options", [{}, {"whiten_advantages": False}, GRPO, RLOO], ids=str)
@pytest.mark.parametrize("cap", [1.1, 2.0, None])
def test_losses_are_weighed_by_what_the_sampler_was_off_by(options, cap):
    """Where it recorded other log-probabilities than the trainer has; returns are what the critic learns as before."""
    given = {} if cap is None else {"importance_cap": cap}
    trainer, plain = (make_trainer(precision="bf16", **more, **options) for more in (given, {}))
    rollout, scores = rollout_of(plain)
    moved = torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(1))
    expected = plain.estimate_advantages(rollout, scores)
    recorded = dataclasses.replace(rollout, logprobs=expected.logprobs - moved)
    got = trainer.estimate_advantages(recorded, scores)
    weights = torch.ones_like(moved) if cap is None else moved.exp().clamp(max=cap)
    mask = expected.action_mask
    assert ((weights < (cap or 2)) & mask).any() and expected.advantages[mask].any()
    torch.testing.assert_close(got.advantages[mask], (expected.advantages * weights)[mask])
    torch.testing.assert_close(got.returns, expected.returns)
    assert torch.equal(got.logprobs, expected.logprobs)


def test_what_the_sampler_was_off_by_is_weighed_only_where_probabilities_are_computed_again():
    """Weights of bfloat16 are, whatever the precision; in float32 the weights would all be 1."""
    trainer = make_trainer(importance_cap=2.0, precision="float32")
    with pytest.raises(ValueError, match=r"importance_cap is 2[.]0, expected None, in float32"):
        next(trainer.steps())
    trainer.palm.bfloat16()
    assert next(trainer.steps())["step"] == 1
    assert next(make_trainer(importance_cap=2.0, precision="bf16").steps())["step"] == 1


def test_the_table_of_variants_is_that_of_the_choices():
    variants = PPOConfig.__dataclass_fields__["grpo_variant"].type.__args__
    algorithms = PPOConfig.__dataclass_fields__["algorithm"].type.__args__
    assert set(VARIANTS) == {*variants, *algorithms}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ("token", "token", 0.2, 0.2, 0.05)),
        (RLOO, ("sequence", "sequence", 0.2, 0.2, 0.05)),
        ({**RLOO, "ratio_level": "token"}, ("token", "token", 0.2, 0.2, 0.05)),
        ({**RLOO, "ratio_level": "geometric"}, ("geometric", "sequence", 0.2, 0.2, 0.05)),
        (GRPO, ("token", "sequence", 0.2, 0.2, 0.05)),
        ({**GRPO, "clip_eps": 0.1}, ("token", "sequence", 0.1, 0.1, 0.05)),
        ({**GRPO, "grpo_variant": "dr_grpo"}, ("token", "constant", 0.2, 0.2, 0.0)),
        ({**GRPO, "grpo_variant": "dapo"}, ("token", "token", 0.2, 0.28, 0.0)),
        ({**GRPO, "grpo_variant": "gspo"}, ("geometric", "sequence", 3e-4, 4e-4, 0.0)),
        ({**GRPO, "grpo_variant": "cispo"}, ("token", "token", 1.0, 4.0, 0.0)),
        (
            {**GRPO, "grpo_variant": "gspo", "ratio_level": "token", "clip_eps": 0.3, "loss_aggregation": "constant"},
            ("token", "constant", 0.3, 4e-4, 0.0),
        ),
    ],
    ids=str,
)
def test_each_algorithm_is_made_of_its_papers_values_and_gives_way(options, expected):
    variant = PPOConfig(**options).variant
    names = ("ratio_level", "loss_aggregation", "clip_eps", "clip_eps_high", "kl_coef")
    assert tuple(getattr(variant, name) for name in names) == expected


NO_END = "where eos_token is None and every response takes all the room there is"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grpo_variant": "gspo"}, "grpo_variant is gspo, expected 'grpo' where the algorithm is not grpo"),
        ({"advantage_scale": "batch"}, "advantage_scale is batch, expected None where the algorithm is not grpo"),
        ({**RLOO, "advantage_scale": "none"}, "advantage_scale is none, expected None where"),
        ({"ratio_level": "sequence"}, "ratio_level is sequence, expected None or 'token' for ppo"),
        ({"overlong_penalty": 0.5}, "overlong_penalty is 0.5, expected 1.0, where overlong_buffer is 0"),
        ({"overlong_buffer": 7}, "overlong_buffer is 7, expected up to the 6 tokens that there is room for"),
        ({"overlong_buffer": 9, "max_seq_len": 8}, "overlong_buffer is 9, expected up to the 8 tokens"),
        ({"importance_cap": 0.0, "precision": "bf16"}, "importance_cap is 0.0, expected None or a number above 0"),
        ({"clip_eps": 0.0}, "clip_eps is 0.0, expected None or a number above 0"),
        ({"eos_token": None, "mask_truncated": True}, f"mask_truncated is True, expected False, {NO_END}"),
        ({"eos_token": None, "overlong_buffer": 2}, f"overlong_buffer is 2, expected 0, {NO_END}"),
    ],
    ids=str,
)
def test_what_would_reach_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        next(make_trainer(**changes).steps())
    assert next(make_trainer(eos_token=None, mask_truncated=False).steps())["step"] == 1
