"""How the RLHF trainer draws, deals out, repeats, stops, steers and reports: what is no formula of a token."""

import json
import math
import time
from statistics import mean, pstdev, pvariance

import pytest
import torch

from palm_rlhf import PPOConfig, RLHFTrainer

from .rlhf_definition import critic_says, policy_says
from .trainers import evens, palm_of, record_tokens

EOS = 5
PROMPTS = [torch.tensor([token, 0]) for token in range(4, 12)]  # told apart by their first tokens
GROUPS = {"algorithm": "grpo", "num_samples": 2}


def make_trainer(
    folder=None, palm=None, reward=evens, reference=None, environment=None, prompts=PROMPTS, **options
) -> RLHFTrainer:
    settings = {"rollouts_per_step": 8, "minibatch_size": 8, "epochs": 1, "max_new_tokens": 4, "eos_token": EOS,
                "plot": False}  # fmt: skip
    return RLHFTrainer(
        palm=palm_of().double() if palm is None else palm,
        reward_model=reward,
        prompt_token_ids=prompts,
        reference=reference,
        environment=environment,
        config=PPOConfig(**{**settings, **options}),
        output_dir=folder,
    )


def experience_of(trainer):
    rollout = trainer.collect()
    return trainer.estimate_advantages(rollout, trainer.score(rollout))


def firsts(tokens) -> list[int]:
    return tokens[:, 0].tolist()


# ---- what is drawn


@pytest.mark.law("PPOConfig.rollouts_per_step", "PPOConfig.num_samples")
def test_a_step_draws_so_many_responses_those_to_one_prompt_together():
    assert len(set(firsts(make_trainer(rollouts_per_step=6).collect().sequences.tokens))) == 6
    drawn = firsts(make_trainer(**{**GROUPS, "num_samples": 3}, rollouts_per_step=6).collect().sequences.tokens)
    assert drawn == [drawn[0]] * 3 + [drawn[3]] * 3 and drawn[0] != drawn[3]


def test_prompts_come_in_a_new_order_each_epoch_each_once():
    trainer = make_trainer(rollouts_per_step=4)
    steps = [firsts(trainer.collect().sequences.tokens) for _ in range(6)]
    epochs = [[*steps[first], *steps[first + 1]] for first in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(4, 12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_of_prompts_is_of_the_seed_and_so_are_the_responses_to_one():
    def drawn(seed, drawn_before, prompts):
        palm = palm_of().double()
        torch.manual_seed(drawn_before)
        num_samples = 8 // len(prompts)
        return make_trainer(palm=palm, prompts=prompts, seed=seed, num_samples=num_samples).collect().sequences.tokens

    for prompts in (PROMPTS, PROMPTS[:1]):
        first, again, other = (drawn(*seeds, prompts).tolist() for seeds in ((3, 0), (3, 1), (4, 0)))
        assert first == again != other
        starts, other_starts = ([row[0] for row in rows] for rows in (first, other))
        assert sorted(starts) == sorted(other_starts) and (starts != other_starts) == (prompts is PROMPTS)


@pytest.mark.law("PPOConfig.rollout_batch_size")
@pytest.mark.parametrize(
    "options, sizes", [({}, [8]), ({"rollout_batch_size": 3}, [3, 3, 2]), ({**GROUPS, "rollout_batch_size": 4}, [2, 2])]
)
def test_so_many_responses_are_drawn_at_once(options, sizes):
    """Prompts are read once, whatever the number of their responses."""
    trainer = make_trainer(**options)
    seen = record_tokens(trainer.palm, learning=False)
    trainer.collect()
    assert [len(tokens) for tokens in seen if tokens.shape[1] == 2] == sizes


@pytest.mark.law("PPOConfig.max_new_tokens", "PPOConfig.max_seq_len", "PPOConfig.eos_token")
@pytest.mark.parametrize(
    "options, longest",
    [({"max_new_tokens": 3}, 3), ({"max_seq_len": 9}, 7), ({"max_new_tokens": None, "max_seq_len": 4}, 2)],
)
@pytest.mark.parametrize("eos_token", [None, EOS, 7])
def test_responses_end_at_the_eos_or_where_there_is_no_more_room(options, longest, eos_token):
    trainer = make_trainer(rollouts_per_step=64, eos_token=eos_token, **options)
    rollout = trainer.collect()
    s = rollout.sequences
    responses = [
        row[2 : 2 + length].tolist() for row, length in zip(s.tokens, s.response_lengths.tolist(), strict=True)
    ]
    if eos_token is None:
        assert {len(response) for response in responses} == {longest} and not rollout.truncated.any()
        return
    assert all(eos_token not in response[:-1] for response in responses)
    assert all(len(response) == longest or response[-1] == eos_token for response in responses)
    assert rollout.truncated.tolist() == [response[-1] != eos_token for response in responses]
    assert 0 < int(rollout.truncated.sum()) < 64


@pytest.mark.law("PPOConfig.max_turns", "PPOConfig.max_turn_tokens")
def test_so_many_turns_of_so_many_tokens_are_taken():
    """Three of two tokens each, with a reply of one between them."""
    replies = lambda messages: torch.tensor([3])  # noqa: E731
    trainer = make_trainer(environment=replies, max_new_tokens=20, eos_token=None, max_turns=3, max_turn_tokens=2)
    s = trainer.collect().sequences
    assert s.response_lengths.tolist() == [2 + 1 + 2 + 1 + 2] * 8
    assert s.action_mask.tolist() == [[True, True, False, True, True, False, True, True]] * 8


def test_the_adapters_policy_answers():
    """At a temperature near 0, where policy and base have one answer each."""
    trainer = make_trainer(actor_lora_r=2, temperature=1e-3, eos_token=None)
    with torch.no_grad():
        for parameter in trainer.actor_critic.actor_parameters():
            parameter.normal_()
    prompt = torch.tensor([7, 0])

    def greedy(**options):
        return trainer.palm.generate(prompt=prompt, max_new_tokens=4, temperature=0, **options).tolist()

    assert trainer.generate(prompt=prompt, max_new_tokens=4).tolist() == greedy(finetune_scope="actor") != greedy()
    assert trainer.generate(6, prompt=prompt, num_samples=2).tolist() == greedy(finetune_scope="actor")
    rows = trainer.collect().sequences
    (row,) = (index for index, first in enumerate(firsts(rows.tokens)) if first == 7)
    assert rows.actions[row].tolist() == greedy(finetune_scope="actor")


# ---- how it is learnt from


@pytest.mark.law("PPOConfig.minibatch_size", "PPOConfig.micro_batch_size", "PPOConfig.epochs")
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, GROUPS], ids=str)
def test_each_epoch_deals_the_responses_out_in_a_new_order(options):
    """Optimiser steps of 3, 3 and 2 of the 8 responses, in forwards of up to 2; each once an epoch, three times."""
    trainer = make_trainer(minibatch_size=3, epochs=3, **options)
    experience = experience_of(trainer)
    seen, steps = record_tokens(trainer.palm), []
    trainer.run.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(sum(map(len, seen))))
    metrics = trainer.update(experience)
    assert steps == [3, 6, 8, 11, 14, 16, 19, 22, 24] and metrics["optimizer_steps"] == 9
    assert [len(tokens) for tokens in seen[:5]] == (
        [2, 1, 2, 1, 2] if "micro_batch_size" in options else [3, 3, 2, 3, 3]
    )
    order = [first for tokens in seen for first in firsts(tokens)]
    epochs = [order[:8], order[8:16], order[16:]]
    assert all(sorted(epoch) == sorted(firsts(experience.sequences.tokens)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.law("PPOConfig.early_stop_kl")
@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_optimisation_ends_after_the_step_that_sees_the_policy_far_away(micro_batch_size):
    """The record of one response is off by 0.2 a token: a KL of e^0.2 - 1.2 there, and of 0 elsewhere."""
    for bound, stops in ((0.0210, True), (0.0218, False), (None, False)):
        trainer = make_trainer(
            minibatch_size=1, learning_rate=1e-12, early_stop_kl=bound, micro_batch_size=micro_batch_size
        )
        experience = experience_of(trainer)
        experience.logprobs[3] -= 0.2
        seen = record_tokens(trainer.palm)
        metrics = trainer.update(experience)
        order = [firsts(tokens)[0] for tokens in seen]
        place = order.index(firsts(experience.sequences.tokens)[3]) + 1
        assert metrics["optimizer_steps"] == len(order) == (place if stops else 8)
        assert metrics["approx_kl"] == pytest.approx((math.exp(0.2) - 1.2) / len(order), rel=1e-5)  # the steps' mean
        assert metrics["ratio_max"] == pytest.approx(math.exp(0.2), rel=1e-6) and metrics["ratio_min"] < 1.0001
        assert 1 < place < 8


# ---- the KL


@pytest.mark.law("PPOConfig.kl_target", "PPOConfig.kl_horizon")
@pytest.mark.parametrize("target", [1.0, 4.0, 100.0])
def test_the_coefficient_is_steered_by_the_kl_of_each_step(target):
    """Ziegler et al. 2019, section 2.2: from the KL that is reported, and the 8 responses of a step."""
    trainer = make_trainer(reference=palm_of(1).double(), num_steps=4, kl_coef=0.5, kl_target=target, kl_horizon=50)
    expected, errors = 0.5, []
    for metrics in trainer.steps():
        assert metrics["kl_coef"] == pytest.approx(expected, rel=1e-9)
        errors.append(min(max(metrics["kl"] / target - 1, -0.2), 0.2))
        expected *= 1 + errors[-1] * 8 / 50
    assert trainer.kl_coef == pytest.approx(expected, rel=1e-9)
    if target == 4.0:
        assert any(abs(error) < 0.2 for error in errors), errors
    else:
        assert set(errors) == {0.2 if target == 1.0 else -0.2}


@pytest.mark.parametrize(
    "options", [{}, {"kl_penalty": "loss"}, GROUPS, {**GROUPS, "num_samples": 4, "kl_penalty": "reward"}], ids=str
)
def test_the_coefficient_that_it_is_steered_to_is_the_one_that_counts(options):
    """In the rewards or the loss: as if the config had begun with it."""

    def gradients(start, steered_to):
        torch.manual_seed(0)
        trainer = make_trainer(reference=palm_of(1).double(), kl_coef=start, **options)
        trainer.kl_coef = steered_to
        trainer.run.base_rates = [0.0 for _ in trainer.run.base_rates]
        trainer.update(experience_of(trainer))
        return torch.cat([p.grad.flatten() for p in trainer.palm.parameters()])

    assert torch.equal(gradients(0.1, 0.9), gradients(0.9, 0.9))
    assert not torch.allclose(gradients(0.1, 0.1), gradients(0.9, 0.9), atol=1e-4)


# ---- what is reported


@pytest.mark.parametrize("options", [{}, {**GROUPS, "kl_coef": 0.2}], ids=str)
def test_what_is_said_of_a_rollout_by_hand(options):
    """The reward keeps what it is asked about; a critic with a head of its own has values that explain a little."""
    asked = []

    def reward(prompts, completions):
        asked.extend(zip(prompts, completions, strict=True))
        return [float(index**2 % 5) for index in range(len(prompts))]

    reference = palm_of(1).double()
    trainer = make_trainer(reward=reward, reference=reference, gamma=0.9 if not options else 1.0, **options)
    if not options:
        torch.nn.init.normal_(trainer.actor_critic.value_head.weight, std=0.1)
    c, scores = trainer.config, [float(index**2 % 5) for index in range(8)]
    spoken, values = palm_of().double(), []
    before = time.perf_counter()
    steps = trainer.steps()
    if not options:  # the critic as it was before the update
        values = lambda: [list(map(float, critic_says(trainer.actor_critic, *pair))) for pair in asked]  # noqa: E731
        trainer.run.base_rates = [0.0 for _ in trainer.run.base_rates]
    metrics = next(steps)
    seconds = time.perf_counter() - before
    lengths = [len(completion) for _, completion in asked]
    with torch.no_grad():
        moved = []
        for pair in asked:
            new, old = (policy_says(c, palm, *pair) for palm in (spoken, reference))
            moved.append([float(n.logprob - o.logprob) for n, o in zip(new, old, strict=True)])
        values = values() if values else None
    assert metrics["score"] == pytest.approx(mean(scores)) and metrics["score_std"] == pytest.approx(pstdev(scores))
    assert metrics["kl"] == pytest.approx(mean(map(sum, moved)), rel=1e-9)
    assert metrics["response_length"] == mean(lengths)
    assert metrics["eos_rate"] == mean(int(completion[-1]) == EOS for _, completion in asked)
    assert metrics["tokens_per_second"] >= sum(lengths) / seconds
    if options:
        assert "explained_variance" not in metrics
        return
    returns, residuals = [], []
    for row, value, score in zip(moved, values, scores, strict=True):
        rewards = [-0.05 * d for d in row]
        rewards[-1] += score
        errors = [r + 0.9 * after - v for r, v, after in zip(rewards, value, [*value[1:], 0.0])]
        for t in range(len(row)):
            advantage = sum((0.9 * 0.95) ** (later - t) * errors[later] for later in range(t, len(row)))
            returns.append(advantage + value[t])
            residuals.append(advantage)
    explained = 1 - pvariance(residuals) / pvariance(returns)
    assert metrics["explained_variance"] == pytest.approx(explained, abs=1e-6) and abs(explained) > 1e-3


@pytest.mark.law("PPOConfig.sample_every", "PPOConfig.samples_kept")
def test_samples_are_kept_when_due_so_many(tmp_path):
    trainer = make_trainer(tmp_path, num_steps=5, sample_every=2, samples_kept=3)
    scores = {metrics["step"]: metrics["score"] for metrics in trainer.steps()}
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2] * 3 + [4] * 3
    assert all(math.isfinite(line["score"]) for line in lines) and len(scores) == 5
