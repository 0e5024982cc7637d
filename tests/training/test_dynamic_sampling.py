"""Dynamic sampling: groups whose scores are all equal give their places to the next prompts, up to a bound."""

import itertools
import json

import numpy as np
import pytest
import torch

from palm_rlhf import PPOConfig, RLHFTrainer
from palm_rlhf.policy.sequences import response_logprobs
from palm_rlhf.training.rlhf.experience import shape_scores
from tests.factories import palm_of

EOS, NUM_PROMPTS, GROUPS = 5, 12, 4
EQUAL = {0, 2, 3, 5, 6, 7, 9, 10, 11}  # the first tokens of the prompts whose responses all score the same
SETTINGS = {"algorithm": "grpo", "num_samples": 2, "rollouts_per_step": 2 * GROUPS, "minibatch_size": 2 * GROUPS,
            "max_new_tokens": 6, "eos_token": EOS, "epochs": 1, "learning_rate": 1e-2, "plot": False}  # fmt: skip


def by_prompt(prompts, completions) -> list[float]:
    """3 for each response to some prompts, 0 and 1 in turn to the others."""
    return [3.0 if int(prompt[0]) in EQUAL else float(row % 2) for row, prompt in enumerate(prompts)]


def make_trainer(folder=None, resume=False, reward=by_prompt, **options) -> RLHFTrainer:
    torch.manual_seed(0)
    palm = palm_of()
    prompts = [torch.tensor([first, *[1] * (8 if first in EQUAL else first % 2)]) for first in range(NUM_PROMPTS)]
    return RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=prompts, output_dir=folder, resume=resume,
                       config=PPOConfig(**{**SETTINGS, **options}))  # fmt: skip


def by_hand(max_redraws: int, seed: int = 0) -> tuple[list[int], int, int]:
    """The prompts of the first step, how many were replaced, and how many were drawn."""
    orders = (np.random.default_rng([seed, epoch]).permutation(NUM_PROMPTS).tolist() for epoch in itertools.count())
    order = itertools.chain.from_iterable(orders)
    places, num_redrawn = [next(order) for _ in range(GROUPS)], 0
    for _ in range(max_redraws):
        for place in [place for place, prompt in enumerate(places) if prompt in EQUAL]:
            places[place] = next(order)
            num_redrawn += 1
    return places, num_redrawn, GROUPS + num_redrawn


def first_tokens(rollout) -> list[int]:
    return rollout.sequences.tokens[:, 0].tolist()


@pytest.mark.law("PPOConfig.max_redraws")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_redraws", [0, 1, 2, 9])
def test_equal_groups_give_their_places_to_the_next_prompts(max_redraws, seed):
    trainer = make_trainer(max_redraws=max_redraws, seed=seed)
    sampled = trainer.sample()
    places, num_redrawn, num_drawn = by_hand(max_redraws, seed)
    assert first_tokens(sampled.rollout) == [prompt for prompt in places for _ in range(2)]
    assert trainer.sampler.num_drawn == num_drawn
    left = sum(prompt in EQUAL for prompt in places)
    expected = {"redrawn_groups": num_redrawn, "equal_groups": left} if max_redraws else {}
    assert sampled.metrics == expected
    assert sampled.scores.scores.tolist() == [s for p in places for s in ((3.0, 3.0) if p in EQUAL else (0.0, 1.0))]
    replaced = len(sampled.all_scores.scores) - 2 * GROUPS
    assert replaced == 2 * num_redrawn and sampled.all_scores.scores.eq(3).sum() == 2 * (num_redrawn + left)


def test_the_cases_by_hand_are_of_every_kind():
    """Some places are filled by the second redraw alone, and some only in the next epoch."""
    kinds = [(by_hand(1, seed)[1], by_hand(2, seed)[1], by_hand(9, seed)[2]) for seed in range(4)]
    assert any(once < twice for once, twice, _ in kinds) and any(drawn > NUM_PROMPTS for *_, drawn in kinds)


def test_what_was_recorded_of_a_response_goes_with_it():
    """In mixed lengths of prompts and responses: log-probabilities, ends and widths are those of the rows' tokens."""
    for seed in range(3):
        trainer = make_trainer(max_redraws=9, seed=seed)
        widest = trainer.collect().sequences.tokens.shape[1]
        trainer = make_trainer(max_redraws=9, seed=seed)
        rollout, sequences = (sampled := trainer.sample()).rollout, sampled.rollout.sequences
        with torch.no_grad():
            again = response_logprobs(trainer.palm, sequences).logprobs
        assert rollout.logprobs.shape == sequences.action_mask.shape
        torch.testing.assert_close(rollout.logprobs[sequences.action_mask], again[sequences.action_mask])
        assert not rollout.logprobs[~sequences.action_mask].any()
        last = sequences.actions[torch.arange(2 * GROUPS), sequences.response_lengths - 1]
        assert torch.equal(rollout.truncated, last != EOS)
        assert sequences.tokens.shape[1] == int(sequences.lengths.max()) < widest
        trainer.estimate_advantages(rollout, sampled.scores)


def test_columns_and_named_rewards_go_with_their_responses():
    """The columns of a prompt that was drawn again are its own, and so is what each reward says by its name."""

    def answers(prompts, completions, answer) -> list[float]:
        return [float(number) for number in answer]

    torch.manual_seed(0)
    palm = palm_of()
    rows = [{"prompt": str(first), "answer": 100 + first} for first in range(NUM_PROMPTS)]
    trainer = RLHFTrainer(
        palm=palm,
        reward_model={"by prompt": lambda prompts, completions: by_prompt([[p] for p in prompts], completions),
                      "answers": answers},
        prompts=rows,
        tokenizer=Digits(),
        config=PPOConfig(**{**SETTINGS, "max_redraws": 2, "reward_weights": {"answers": 1e-9}}),
    )  # fmt: skip
    rollout, scores, all_scores, metrics = trainer.sample()
    firsts = first_tokens(rollout)
    assert firsts == [prompt for prompt in by_hand(2)[0] for _ in range(2)]
    assert rollout.columns["answer"] == [100 + first for first in firsts]
    assert scores.by_name["answers"].scores.tolist() == [100.0 + first for first in firsts]
    assert len(all_scores.by_name["answers"].scores) == 2 * (GROUPS + metrics["redrawn_groups"]) > 2 * GROUPS


class Digits:
    """A tokenizer of numbers."""

    def encode(self, text):
        return [int(text)]

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_the_bound_ends_it_and_what_is_left_is_not_learnt():
    trainer = make_trainer(reward=lambda prompts, completions: [1.0] * len(prompts), max_redraws=3)
    before = {name: weight.clone() for name, weight in trainer.palm.state_dict().items()}
    metrics = next(trainer.steps())
    assert (metrics["redrawn_groups"], metrics["equal_groups"]) == (3 * GROUPS, GROUPS)
    assert trainer.sampler.num_drawn == 4 * GROUPS and metrics["optimizer_steps"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.palm.state_dict().items())


def test_groups_that_are_left_do_not_dilute_the_others():
    """By GRPO's mean over responses, which without dynamic sampling counts them."""
    losses = {}
    for max_redraws in (0, 1):
        trainer = make_trainer(max_redraws=max_redraws, seed=3, kl_coef=0.0)
        rollout, scores, *_ = trainer.sample()
        experience = trainer.estimate_advantages(rollout, scores)
        left = sum(first in EQUAL for first in first_tokens(rollout))
        assert left == 2 * sum(prompt in EQUAL for prompt in by_hand(max_redraws, 3)[0]) > 0
        losses[max_redraws] = experience.action_mask.any(dim=-1).sum()
        assert losses[max_redraws] == (2 * GROUPS - left if max_redraws else 2 * GROUPS)


def test_the_score_of_a_step_is_of_all_that_was_drawn():
    """Of the groups that are kept alone it would be 0.5, however good the policy is."""
    metrics = next(make_trainer(max_redraws=9).steps())
    _, num_redrawn, num_drawn = by_hand(9)
    assert num_redrawn > 0 and metrics["equal_groups"] == 0
    assert metrics["score"] == pytest.approx((3.0 * num_redrawn + 0.5 * GROUPS) / num_drawn)


def test_responses_without_a_score_are_no_reason_to_keep_a_group():
    """One valid score of two differs from none; None for a whole group neither."""

    def reward(prompts, completions):
        kinds = {0: [None, None], 1: [1.0, None], 2: [0.0, 1.0]}
        return [kinds[int(prompt[0]) % 3][row % 2] for row, prompt in enumerate(prompts)]

    sampled = make_trainer(reward=reward, max_redraws=20).sample()
    assert {first % 3 for first in first_tokens(sampled.rollout)} == {2}
    assert sampled.scores.valid.all() and not sampled.all_scores.valid.all()


def test_equal_is_by_the_reward_and_not_by_penalties():
    """Responses of several lengths, whose penalties differ, are all as right as each other."""
    options = {"overlong_buffer": 6, "missing_eos_penalty": 0.5, "max_redraws": 2}
    trainer = make_trainer(reward=lambda prompts, completions: [1.0] * len(prompts), **options)
    rollout, scores, _, metrics = trainer.sample()
    shaped = shape_scores(trainer.config, scores, rollout, trainer.score_moments).view(GROUPS, 2)
    assert (shaped[:, 0] != shaped[:, 1]).any()
    assert metrics == {"redrawn_groups": 2 * GROUPS, "equal_groups": GROUPS}
    assert not trainer.estimate_advantages(rollout, scores).action_mask.any()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 0),
        ({"grpo_variant": "dr_grpo"}, 0),
        ({"grpo_variant": "gspo"}, 0),
        ({"grpo_variant": "cispo"}, 0),
        ({"grpo_variant": "dapo"}, 9),
        ({"grpo_variant": "dapo", "max_redraws": 0}, 0),
        ({"grpo_variant": "gspo", "max_redraws": 2}, 2),
        ({"algorithm": "rloo", "max_redraws": 2}, 2),
    ],
    ids=str,
)
def test_how_often_it_is_done_unless_it_is_said(options, expected):
    trainer = make_trainer(**options)
    sampled = trainer.sample()
    assert sampled.metrics.get("redrawn_groups", 0) == by_hand(expected)[1]
    assert next(trainer.steps())["step"] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"algorithm": "ppo", "max_redraws": 1}, "max_redraws is 1, expected None or 0 for ppo, which compares no"),
        ({"max_redraws": -1}, "max_redraws is -1, expected None or 0 or more"),
    ],
)
def test_redraws_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**{**SETTINGS, **changes})


def test_a_run_that_was_cut_off_resumes_to_the_bit(tmp_path):
    """With as many prompts drawn, which the number of steps no longer says."""
    options = {"num_steps": 4, "save_every": 1, "grpo_variant": "dapo"}
    whole = list(make_trainer(tmp_path / "whole", **options).steps())
    cut = list(itertools.islice(make_trainer(tmp_path / "cut", **options).steps(), 2))
    cut += make_trainer(tmp_path / "cut", resume=True, **options).steps()
    for one, other in zip(whole, cut, strict=True):
        assert {**one, "tokens_per_second": 0, "elapsed": 0} == {**other, "tokens_per_second": 0, "elapsed": 0}
    states = [
        json.loads((tmp_path / run / "checkpoints/step_00000004/state.json").read_text()) for run in ("whole", "cut")
    ]
    drawn = 4 * GROUPS + sum(metrics["redrawn_groups"] for metrics in whole)
    assert [state["sampler"]["num_drawn"] for state in states] == [drawn, drawn] and drawn > 4 * GROUPS
    policies = [tmp_path / run / "checkpoints/step_00000004/policy/model.safetensors" for run in ("whole", "cut")]
    assert policies[0].read_bytes() == policies[1].read_bytes()
