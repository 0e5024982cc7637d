"""The master tests of the RLHF trainer; beside each law stands a broken copy of the trainer that it must reject."""

import copy
import dataclasses
import math
import statistics
from itertools import chain

import pytest
import torch

from palm_rlhf import PaLM, PPOConfig, RewardModel, RLHFTrainer
from palm_rlhf.algorithms import advantages as advantage_functions
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.policy.sequences import Sequences
from palm_rlhf.training.rlhf import metrics as rlhf_metrics
from palm_rlhf.training.rlhf.experience import shape_scores
from palm_rlhf.training.rlhf.running_moments import RunningMoments
from tests.factories import evens, palm_of

EOS = 5
GROUPS = {"algorithm": "grpo", "num_samples": 4}


def ragged_prompts(count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(12, (1 + index % 5,), generator=generator) for index in range(count)]


def make_trainer(palm: PaLM | None = None, reward=evens, prompts=None, output_dir=None, **options) -> RLHFTrainer:
    settings = {
        "rollouts_per_step": 8,
        "minibatch_size": 8,
        "epochs": 1,
        "max_new_tokens": 6,
        "eos_token": EOS,
        "learning_rate": 1e-3,
        "plot": False,
    }
    extra = {name: options.pop(name) for name in ("critic", "reference", "tokenizer", "resume") if name in options}
    return RLHFTrainer(
        palm=palm_of() if palm is None else palm,
        reward_model=reward,
        prompt_token_ids=ragged_prompts() if prompts is None else prompts,
        config=PPOConfig(**{**settings, **options}),
        output_dir=output_dir,
        **extra,
    )


def experience_of(trainer: RLHFTrainer):
    rollout = trainer.collect()
    return trainer.estimate_advantages(rollout, trainer.score(rollout))


def gradients(trainer: RLHFTrainer, experience) -> dict[str, torch.Tensor]:
    """What one update would have stepped along: with no learning rate the weights stay."""
    trainer.run.base_rates = [0.0 for _ in trainer.run.base_rates]
    trainer.update(experience)
    return {name: p.grad.clone() for name, p in trainer.actor_critic.named_parameters() if p.grad is not None}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


SAMPLING = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.4, "top_p": 0.8},
    {"top_k": 4},
    {"actor_lora_r": 2},
    {"shared_trunk": True},
    {"algorithm": "grpo", "num_samples": 4},
    {"micro_batch_size": 3},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_the_first_ratio_is_one(device, options, dtype, tolerance):
    """For every token, in train() mode, with dropout in the config and prompts of different lengths."""
    trainer = make_trainer(palm_of(dropout=0.3).to(dtype), compile=False, **options)
    trainer.actor_critic.train()
    assert trainer.run.device.type == device.type
    if device.type == "cuda" and dtype is torch.float32:
        tolerance = 1e-4  # the kernels of rollouts and of updates add up in different orders
    metrics = trainer.update(experience_of(trainer))
    assert metrics["optimizer_steps"] == 1
    assert abs(metrics["ratio_min"] - 1) < tolerance and abs(metrics["ratio_max"] - 1) < tolerance


def dropout_on(trainer):
    for part in trainer.actor_critic.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.3


def temperature_forgotten(trainer):
    trainer.config = dataclasses.replace(trainer.config, temperature=1.0)


def another_row_s_actions(experience):
    return dataclasses.replace(experience, logprobs=experience.logprobs.roll(1, dims=0))


def log_probabilities_one_off(experience):
    return dataclasses.replace(experience, logprobs=experience.logprobs.roll(1, dims=1))


@pytest.mark.parametrize("spoil", [dropout_on, temperature_forgotten])
def test_the_first_ratio_is_not_one_in_a_broken_trainer(spoil):
    trainer = make_trainer(palm_of(dropout=0.3), temperature=0.6)
    trainer.actor_critic.train()
    experience = experience_of(trainer)
    spoil(trainer)
    assert trainer.update(experience)["ratio_max"] > 1 + 1e-2


@pytest.mark.parametrize("spoil", [another_row_s_actions, log_probabilities_one_off])
def test_the_first_ratio_is_not_one_with_broken_records(spoil):
    trainer = make_trainer()
    assert trainer.update(spoil(experience_of(trainer)))["ratio_max"] > 1 + 1e-2


def widened(experience, garbage: float):
    """The same experience with three more columns of pads, which hold garbage."""

    def pad(part: torch.Tensor, value) -> torch.Tensor:
        return torch.cat((part, torch.full((len(part), 3), value, dtype=part.dtype)), dim=-1)

    sequences = experience.sequences
    wider = Padded(pad(sequences.tokens, 7), sequences.prompt_lengths, sequences.response_lengths)
    floats = ("logprobs", "ref_logprobs", "values", "advantages", "returns")
    return dataclasses.replace(
        experience,
        sequences=wider,
        action_mask=pad(experience.action_mask, False),
        **{name: pad(getattr(experience, name), garbage) for name in floats},
    )


class Padded(Sequences):
    """Sequences whose rows and responses have three columns more than they need."""

    @property
    def _steps(self):
        return torch.arange(int(self.response_lengths.max()) + 3)

    def select(self, rows):
        return Padded(self.tokens[rows], self.prompt_lengths[rows], self.response_lengths[rows])


@pytest.mark.parametrize("options", [{}, {"algorithm": "grpo", "num_samples": 4}, {"entropy_coef": 0.1}], ids=str)
def test_pads_are_nothing(options, monkeypatch):
    """Columns of pads, with garbage in all that stands there, change no loss, no gradient and no metric."""
    trainer = make_trainer(palm_of().double(), **options)
    experience = experience_of(trainer)
    assert not experience.action_mask.all(), "responses of different lengths are what this is about"

    def run(with_experience):
        torch.manual_seed(2)
        metrics = trainer.update(with_experience)
        return metrics, {n: p.grad.clone() for n, p in trainer.actor_critic.named_parameters() if p.grad is not None}

    trainer.run.base_rates = [0.0 for _ in trainer.run.base_rates]
    metrics, plain = run(experience)
    # an update cuts columns that no row needs: leave them in
    monkeypatch.setattr(type(experience), "select", keep_all_columns)
    padded_metrics, padded = run(widened(experience, float("nan")))
    assert largest_difference(plain, padded) < 1e-12
    assert padded_metrics == pytest.approx(metrics, abs=1e-12)
    broken = dataclasses.replace(
        widened(experience, 1.0), action_mask=torch.ones(8, experience.logprobs.shape[1] + 3) > 0
    )
    assert largest_difference(plain, run(broken)[1]) > 1e-3


def keep_all_columns(experience, rows):
    parts = {field.name: getattr(experience, field.name) for field in dataclasses.fields(experience)}
    sequences = parts.pop("sequences")
    return type(experience)(sequences.select(rows), **{name: part[rows] for name, part in parts.items()})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"entropy_coef": 0.05},
        {"algorithm": "rloo", "num_samples": 2},
        {"algorithm": "rloo", "num_samples": 2, "ratio_level": "token"},
        {"algorithm": "grpo", "num_samples": 4},
        {"algorithm": "grpo", "num_samples": 4, "grpo_variant": "dr_grpo"},
        {"algorithm": "grpo", "num_samples": 4, "grpo_variant": "dapo"},
    ],
    ids=str,
)
def test_micro_batches_of_uneven_lengths_add_up_to_one_batch(options):
    trainer = make_trainer(palm_of().double(), grad_clip=0.0, **options)
    experience = experience_of(trainer)
    whole = gradients(trainer, experience)
    trainer.config = dataclasses.replace(trainer.config, micro_batch_size=3)
    assert largest_difference(whole, gradients(trainer, experience)) < 1e-12


def test_a_mean_of_micro_batch_means_is_not_the_mean():
    """The mutant: each micro-batch divided by its own tokens."""
    trainer = make_trainer(palm_of().double(), grad_clip=0.0)
    experience = experience_of(trainer)
    whole = gradients(trainer, experience)
    lengths = experience.sequences.response_lengths
    assert len(set(lengths.tolist())) > 1
    parts = [gradients(trainer, experience.select(rows)) for rows in torch.arange(8).split(3)]
    mean = {name: sum(part[name] for part in parts) / 3 for name in whole}
    assert largest_difference(whole, mean) > 1e-4


@pytest.mark.parametrize("options", [{}, {"actor_lora_r": 2}, {"algorithm": "grpo", "num_samples": 2}], ids=str)
def test_the_reference_stays_and_the_kl_leaves_zero(options):
    trainer = make_trainer(num_steps=4, epochs=2, learning_rate=1e-2, **options)
    rollout = trainer.collect()
    before = trainer.reference.logprobs(rollout.sequences).logprobs
    weights = {name: p.clone() for name, p in trainer.reference.palm.state_dict().items() if "finetune" not in name}
    kls = [metrics["kl"] for metrics in trainer.steps()]
    assert abs(kls[0]) < 1e-5 < max(map(abs, kls[1:]))
    assert torch.equal(trainer.reference.logprobs(rollout.sequences).logprobs, before)
    assert all(torch.equal(trainer.reference.palm.state_dict()[name], weight) for name, weight in weights.items())
    base = [p for name, p in trainer.reference.palm.named_parameters() if "finetune" not in name]
    assert all(p.grad is None and not p.requires_grad for p in base)


def test_a_reference_that_is_the_policy_is_noticed():
    trainer = make_trainer(num_steps=3, epochs=2, learning_rate=1e-2)
    trainer.reference.palm = trainer.palm
    assert max(abs(metrics["kl"]) for metrics in trainer.steps()) < 1e-5  # a KL that never leaves 0


def test_the_seed_of_the_config_is_the_seed_of_the_adapters():
    """Of policy and critic, whatever was drawn before."""

    def adapters(seed: int, drawn_before: int) -> dict[str, torch.Tensor]:
        palm = palm_of()
        torch.manual_seed(drawn_before)
        trainer = make_trainer(palm, seed=seed, actor_lora_r=2, critic_lora_r=2)
        return {name: t.clone() for name, t in trainer.actor_critic.state_dict().items() if "finetune" in name}

    first, again, other = adapters(3, 0), adapters(3, 1), adapters(4, 0)
    assert {name.split(".")[0] for name in first} == {"palm", "critic"}
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    drawn = [name for name, tensor in first.items() if tensor.any()]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


def exact_kl(trainer: RLHFTrainer, prompts: list[torch.Tensor]) -> float:
    """KL(policy, reference) of the first new token, over the whole vocabulary, summed over prompts."""
    with torch.no_grad():
        pairs = [
            [palm(p[None])[0, -1].log_softmax(-1) for palm in (trainer.palm, trainer.reference.palm)] for p in prompts
        ]
    return sum(float((one.exp() * (one - other)).sum()) for one, other in pairs)


@pytest.mark.parametrize("options", [{}, {"kl_penalty": "loss"}, {"algorithm": "grpo", "num_samples": 4}], ids=str)
@pytest.mark.parametrize("sign", [1, -1], ids=["penalty", "sign flipped"])
def test_kl_pulls_back(options, sign, monkeypatch):
    """Without a reward, a perturbed policy comes nearer to the reference; with the sign flipped it goes away."""
    reference = palm_of()
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    settings = {"rollouts_per_step": 64, "minibatch_size": 32, "max_new_tokens": 1, "eos_token": None, "num_steps": 8,
                "kl_coef": 2.0, "learning_rate": 3e-3}  # fmt: skip
    settings |= {} if "algorithm" in options else {"whiten_advantages": False}
    trainer = make_trainer(
        policy, reward=lambda prompts, completions: [0.0] * len(prompts), reference=reference, **{**settings, **options}
    )
    trainer.kl_coef *= sign
    before = exact_kl(trainer, trainer.prompts)
    list(trainer.steps())
    after = exact_kl(trainer, trainer.prompts)
    assert after < 0.7 * before if sign > 0 else after > before


def test_the_score_stands_at_the_last_action_and_nothing_after_it():
    """With gamma 0 a return is the action's own reward: the score is seen in the last column of each row alone."""
    trainer = make_trainer(gamma=0.0, gae_lambda=1.0, kl_coef=0.0)
    rollout = trainer.collect()
    scores = trainer.score(rollout)
    experience = trainer.estimate_advantages(rollout, scores)
    lengths = rollout.sequences.response_lengths
    expected = torch.zeros_like(experience.returns)
    expected[torch.arange(8), lengths - 1] = scores.scores
    torch.testing.assert_close(experience.returns, expected)
    assert (experience.sequences.actions[torch.arange(8), lengths - 1] == EOS).any(), "an EOS carries a score as well"


def test_returns_are_not_whitened():
    trainer = make_trainer(kl_coef=0.0)
    rollout = trainer.collect()
    whitened = trainer.estimate_advantages(rollout, trainer.score(rollout))
    trainer.config = dataclasses.replace(trainer.config, whiten_advantages=False)
    plain = trainer.estimate_advantages(rollout, trainer.score(rollout))
    torch.testing.assert_close(whitened.returns, plain.returns)
    kept = whitened.advantages[whitened.action_mask]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-6) and float(kept.std(correction=0)) == pytest.approx(
        1, abs=1e-3
    )


def test_whitening_that_counts_pads_is_noticed(monkeypatch):
    def unmasked(advantages, action_mask, reduce):
        return (advantages - advantages.mean()) / advantages.std(correction=0)

    monkeypatch.setattr("palm_rlhf.training.rlhf.experience.whiten", unmasked)
    experience = experience_of(make_trainer(kl_coef=0.0))
    kept = experience.advantages[experience.action_mask]
    assert abs(float(kept.mean())) > 1e-3 or abs(float(kept.std(correction=0)) - 1) > 1e-2
    assert advantage_functions.whiten is not unmasked


def test_responses_without_a_score_are_left_out():
    def half(prompts, completions):
        return [None if index % 2 else 1.0 + index for index in range(len(prompts))]

    trainer = make_trainer(palm_of().double(), reward=half, grad_clip=0.0)
    rollout = trainer.collect()
    scores = trainer.score(rollout)
    experience = trainer.estimate_advantages(rollout, scores)
    assert scores.valid.tolist() == [True, False] * 4
    assert not experience.action_mask[1::2].any() and experience.action_mask[::2].any(dim=-1).all()
    told = experience.select(torch.arange(0, 8, 2))
    assert largest_difference(gradients(trainer, experience), gradients(trainer, told)) < 1e-12
    nobody = make_trainer(reward=lambda prompts, completions: [None] * len(prompts))
    with pytest.raises(ValueError, match="None for all responses of step 1"):
        next(nobody.steps())


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_deviations_are_exact_though_scores_lie_far_from_zero(offset):
    """Of the scores, and of returns and values in the explained variance; the same value for all explains nothing."""
    numbers = [offset + index % 7 / 4 for index in range(64)]
    trainer = make_trainer(
        reward=lambda prompts, completions: numbers,
        kl_coef=0.0, rollouts_per_step=64, minibatch_size=64, max_new_tokens=1,
    )  # fmt: skip
    torch.nn.init.constant_(trainer.actor_critic.value_head.bias, offset)
    metrics = next(trainer.steps())
    assert metrics["score_std"] == pytest.approx(statistics.pstdev(numbers), abs=1e-4)
    assert metrics["explained_variance"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"algorithm": "grpo", "num_samples": 2}], ids=str)
def test_every_metric_is_explained(options):
    explained = rlhf_metrics.__doc__.replace(",", " ").split()
    assert set(next(make_trainer(**options).steps())) <= set(explained)


def test_what_would_stop_a_run_half_way_is_refused_before_it():
    long = make_trainer(prompts=[torch.tensor([1])] * 99 + [torch.arange(8)], max_seq_len=8)
    with pytest.raises(ValueError, match="prompt 99 has 8 tokens, expected fewer than max_seq_len=8"):
        next(long.steps())
    assert next(make_trainer(prompts=[torch.arange(7)], max_seq_len=8).steps())["response_length"] == 1
    for num_tokens in (11, 13):
        with pytest.raises(ValueError, match=f"the reward model has num_tokens={num_tokens}; expected 12"):
            make_trainer(reward=RewardModel(palm_of(num_tokens=num_tokens)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops_the_run(bad):
    trainer = make_trainer(reward=lambda prompts, completions: [0.0] * 7 + [bad])
    weights = copy.deepcopy(trainer.actor_critic.state_dict())
    with pytest.raises(FloatingPointError, match=r"the reward is (nan|inf), expected a finite number"):
        next(trainer.steps())
    assert all(torch.equal(weights[name], t) for name, t in trainer.actor_critic.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = make_trainer()
    experience = experience_of(trainer)
    with torch.no_grad():
        trainer.palm.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 1 has the loss nan"):
        trainer.update(experience)


def test_moments_are_those_of_all_numbers_however_they_come():
    numbers = torch.tensor([0.25, -0.5, 0.125, 0.75, 0.0, 0.5], dtype=torch.float64)
    moments = RunningMoments()
    assert moments.deviation == 1.0  # where there is nothing to scale by yet
    for part in (numbers[:1], numbers[1:1], numbers[1:4].view(3, 1), numbers[4:]):
        moments.update(part)
    assert (moments.count, moments.mean) == (6, pytest.approx(statistics.fmean(numbers.tolist())))
    assert moments.deviation == pytest.approx(statistics.pstdev(numbers.tolist()))
    same = RunningMoments()
    same.update(torch.full((3,), 7.0))
    assert same.deviation == 1.0
    same.update(torch.tensor([7.0 + 4e-6], dtype=torch.float64))
    assert same.deviation == pytest.approx(4e-6 * 3**0.5 / 4, rel=1e-6)  # little, but no rounding


def test_scores_are_shaped_as_asked():
    trainer = make_trainer(score_clip=1.0, missing_eos_penalty=0.25, scale_scores=True)
    scores = Scores(torch.tensor([4.0, -8.0, 0.5, 0.0]), torch.tensor([True, True, True, False]))
    truncated = torch.tensor([False, True, False, True])
    sequences = Sequences(torch.zeros(4, 3), torch.ones(4), torch.ones(4))
    deviation = torch.tensor([4.0, -8.0, 0.5]).std(correction=0)
    expected = torch.tensor([4.0 / deviation, -1.0 - 0.25, 0.5 / deviation, -0.25])
    rollout = Rollout(sequences, torch.zeros(4, 1), truncated)
    got = shape_scores(trainer.config, scores, rollout, trainer.score_moments)
    torch.testing.assert_close(got, expected)


def test_optimisation_stops_early_where_the_policy_has_moved_enough():
    trainer = make_trainer(epochs=50, learning_rate=1e-2, early_stop_kl=0.01)
    metrics = trainer.update(experience_of(trainer))
    assert 1 < metrics["optimizer_steps"] < 50


VARIANTS = [{}, GROUPS, {**GROUPS, "grpo_variant": "dr_grpo"}, {**GROUPS, "grpo_variant": "dapo"}]


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_what_is_said_of_ratios_is_a_mean_over_tokens(options, micro_batch_size):
    """With records that are off by known numbers, ratios are known; responses are of many lengths."""
    trainer = make_trainer(palm_of().double(), micro_batch_size=micro_batch_size, **options)
    experience = experience_of(trainer)
    moved = 0.4 * torch.randn_like(experience.logprobs)
    metrics = trainer.update(dataclasses.replace(experience, logprobs=experience.logprobs - moved))
    mask, ratios, advantages = experience.action_mask, moved.exp(), experience.advantages
    high = 1.28 if options.get("grpo_variant") == "dapo" else 1.2
    clipped = ((advantages > 0) & (ratios > high)) | ((advantages < 0) & (ratios < 0.8))
    assert len(set(mask.sum(dim=-1).tolist())) > 2 and clipped[mask].any()
    assert metrics["approx_kl"] == pytest.approx(float((ratios - 1 - moved)[mask].mean()), rel=1e-6)
    assert metrics["clip_fraction"] == pytest.approx(float(clipped[mask].double().mean()), rel=1e-6)


@pytest.mark.parametrize("room, longest", [({"max_new_tokens": 6}, 6), ({"max_seq_len": 11}, 11 - 2)], ids=str)
def test_the_constant_of_dr_grpo_is_the_longest_response_that_there_is_room_for(room, longest):
    """At ratio 1 the loss is the sum of all advantages, over 8 responses times that; prompts have 2 to 5 tokens."""
    prompts = [torch.arange(length) for length in (3, 2, 5, 4)]
    options = {"num_samples": 2, "prompts": prompts, "algorithm": "grpo", "grpo_variant": "dr_grpo", **room}
    trainer = make_trainer(palm_of().double(), micro_batch_size=3, **options)
    experience = experience_of(trainer)
    total = float(experience.advantages[experience.action_mask].sum())
    assert abs(total) > 0.1
    assert trainer.update(experience)["policy_loss"] == pytest.approx(-total / (8 * longest), rel=1e-6)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("ratio_level", ["sequence", "token", None])
def test_the_ratio_of_rloo_is_of_a_response_unless_it_is_asked_for_of_tokens(ratio_level, micro_batch_size):
    """With records that are off by known numbers; None is the default, as in TRL."""
    given = {} if ratio_level is None else {"ratio_level": ratio_level}
    options = {"algorithm": "rloo", "num_samples": 4, "micro_batch_size": micro_batch_size, **given}
    trainer = make_trainer(palm_of().double(), **options)
    experience = experience_of(trainer)
    moved = 0.2 * torch.randn_like(experience.logprobs)
    metrics = trainer.update(dataclasses.replace(experience, logprobs=experience.logprobs - moved))
    losses = {"sequence": [], "token": []}
    for advantages, move, mask in zip(experience.advantages, moved, experience.action_mask, strict=True):
        row = [(float(a), float(m)) for a, m, keep in zip(advantages, move, mask, strict=True) if keep]
        row_move = sum(m for _, m in row)
        for kind, pairs in (("sequence", [(row[0][0], row_move)]), ("token", row)):
            ratios = [(advantage, math.exp(m)) for advantage, m in pairs]
            losses[kind] += [max(-a * r, -a * min(max(r, 0.8), 1.2)) for a, r in ratios]
    expected = {kind: statistics.mean(numbers) for kind, numbers in losses.items()}
    assert abs(expected["sequence"] - expected["token"]) > 1e-2
    assert metrics["policy_loss"] == pytest.approx(expected[ratio_level or "sequence"], rel=1e-6)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_optimisation_stops_by_the_kl_of_a_token_in_every_variant(options):
    """The records are off by 0.2 at every token, a KL of e^0.2 - 1.2 = 0.0214: a bound just below ends it at once."""
    for bound, expected in ((0.0210, 1), (0.0218, 3)):
        trainer = make_trainer(epochs=3, learning_rate=1e-9, early_stop_kl=bound, max_new_tokens=20, **options)
        experience = experience_of(trainer)
        moved = dataclasses.replace(experience, logprobs=experience.logprobs - 0.2)
        assert trainer.update(moved)["optimizer_steps"] == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 0.05),
        (GROUPS, 0.05),
        ({"algorithm": "rloo", "num_samples": 4}, 0.05),
        ({**GROUPS, "grpo_variant": "dr_grpo"}, 0.0),
        ({**GROUPS, "grpo_variant": "dapo"}, 0.0),
        ({**GROUPS, "grpo_variant": "dapo", "kl_coef": 0.3}, 0.3),
        ({"kl_coef": 0.0}, 0.0),
    ],
    ids=str,
)
def test_the_kl_counts_as_in_the_papers_unless_another_weight_is_given(options, expected):
    """Between a policy and a reference that differ, a KL has a gradient; the loss of these equal scores has none."""
    policy = palm_of(1).double()
    same = lambda prompts, completions: [1.0] * len(prompts)  # noqa: E731
    trainer = make_trainer(policy, reward=same, reference=palm_of(2).double(), **options)
    assert trainer.kl_coef == expected
    if trainer.config.kl_in_loss and trainer.config.grpo_variant != "dapo":
        moved = gradients(trainer, experience_of(trainer))
        assert any(gradient.any() for gradient in moved.values()) == (expected > 0)


WITHOUT_KL = [
    {"kl_coef": 0.0},
    {"kl_coef": 0.0, "actor_lora_r": 2},
    {**GROUPS, "kl_coef": 0.0},
    {**GROUPS, "grpo_variant": "dapo"},
]


@pytest.mark.parametrize("options", WITHOUT_KL, ids=str)
def test_without_a_kl_no_reference_is_copied_or_run(options, monkeypatch):
    """Only the policy and a critic read tokens; what is learnt is what a reference of weight 0 would leave."""
    trainer = make_trainer(num_steps=2, **options)
    with_one = make_trainer(num_steps=2, reference=palm_of(7), **options)
    assert trainer.reference is None
    readers = set()
    forward = PaLM.forward
    monkeypatch.setattr(
        PaLM, "forward", lambda self, *args, **rest: readers.add(id(self)) or forward(self, *args, **rest)
    )
    torch.manual_seed(0)
    steps = list(trainer.steps())
    critic = trainer.actor_critic.critic
    assert readers <= {id(trainer.palm), id(critic)}
    assert all("kl" not in metrics and "kl_loss" not in metrics for metrics in steps)
    torch.manual_seed(0)
    measured = list(with_one.steps())
    assert all(metrics["kl"] != 0 for metrics in measured)
    for name, weight in with_one.actor_critic.state_dict().items():
        assert torch.equal(trainer.actor_critic.state_dict()[name], weight), name
    trainer.kl_coef = 0.1
    with pytest.raises(ValueError, match=r"kl_coef is 0\.1 in a run begun with 0, without a reference"):
        experience_of(trainer)


@pytest.mark.parametrize("options", [{}, {"critic_learning_rate": 3e-3}, GROUPS], ids=str)
def test_learning_rates_are_reported_as_the_optimiser_steps_with_them(options):
    """Two steps of warm-up, times half a cosine from 1 to 0.2 over four steps; Adam's first step is the rate itself."""
    trainer = make_trainer(num_steps=4, warmup_steps=2, min_lr_ratio=0.2, eps=1e-12, **options)
    before = trainer.palm.token_emb.weight.detach().clone()
    steps = list(trainer.steps())
    cosines = [1.0, 0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5]
    factors = [warmup * (0.2 + 0.8 * cosine) for warmup, cosine in zip((0.5, 1, 1, 1), cosines, strict=True)]
    assert [metrics["learning_rate"] for metrics in steps] == pytest.approx([1e-3 * factor for factor in factors])
    critic = [metrics["critic_learning_rate"] for metrics in steps if "critic_learning_rate" in metrics]
    rate = None if options == GROUPS else options.get("critic_learning_rate", 1e-3)
    assert critic == ([] if rate is None else pytest.approx([rate * factor for factor in factors]))
    first = make_trainer(num_steps=4, warmup_steps=2, min_lr_ratio=0.2, eps=1e-12, **options)
    next(first.steps())
    moved = (first.palm.token_emb.weight.detach() - before).abs().max()
    assert float(moved) == pytest.approx(5e-4, rel=1e-3)


def test_the_kl_coefficient_is_steered_to_its_target():
    low = make_trainer(kl_coef=1.0, kl_target=6.0, kl_horizon=80, num_steps=2)
    steps = list(low.steps())  # the KL is 0 at first, far below the target: -0.2 * 8 / 80
    assert [round(metrics["kl_coef"], 6) for metrics in steps] == [1.0, 0.98]
    high = make_trainer(kl_coef=1.0, kl_target=1e-9, kl_horizon=80, num_steps=4, learning_rate=1e-2)
    assert list(high.steps())[-1]["kl"] > 0 or high.kl_coef != 1.0
    assert make_trainer(num_steps=1, kl_coef=0.3).kl_coef == 0.3


def test_groups_that_score_the_same_teach_grpo_nothing():
    trainer = make_trainer(
        reward=lambda prompts, completions: [3.0] * len(prompts), algorithm="grpo", num_samples=4, kl_coef=0.0
    )
    experience = experience_of(trainer)
    assert not experience.advantages.any()
    assert all(not gradient.any() for gradient in gradients(trainer, experience).values())
    dapo = make_trainer(
        reward=lambda prompts, completions: [3.0] * 4 + [0.0, 1.0, 2.0, 3.0],
        algorithm="grpo", grpo_variant="dapo", num_samples=4,
    )  # fmt: skip
    kept = experience_of(dapo).action_mask.any(dim=-1)
    assert kept.tolist() == [False] * 4 + [True] * 4


def test_the_upper_clip_is_higher_for_dapo_and_as_asked():
    grpo = {"algorithm": "grpo", "num_samples": 2}
    assert PPOConfig().variant.clip_eps_high == 0.2
    assert PPOConfig(**grpo, grpo_variant="dapo").variant.clip_eps_high == 0.28
    assert PPOConfig(**grpo, clip_eps_high=0.4).variant.clip_eps_high == 0.4


def test_minibatches_cover_every_response_once_an_epoch(monkeypatch):
    trainer = make_trainer(minibatch_size=3, epochs=2)
    experience = experience_of(trainer)
    seen, select = [], type(experience).select

    def select_of(self, rows):
        if self is experience:
            seen.append(self.sequences.tokens[rows, 0].tolist())
        return select(self, rows)

    monkeypatch.setattr(type(experience), "select", select_of)
    trainer.update(experience)
    assert [len(rows) for rows in seen] == [3, 3, 2] * 2
    firsts = sorted(experience.sequences.tokens[:, 0].tolist())
    assert sorted(chain(*seen[:3])) == sorted(chain(*seen[3:])) == firsts


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize(
    "name, value, default",
    [
        ("gamma", 0.9, 1.0),
        ("gae_lambda", 1.0, 0.95),
        ("value_coef", 0.5, 0.1),
        ("value_clip_eps", None, 0.2),
        ("whiten_advantages", False, True),
        ("critic_learning_rate", 1e-3, None),
        ("critic_lora_r", 2, 0),
    ],
)
def test_what_only_a_critic_has_is_refused_without_one(algorithm, name, value, default):
    with pytest.raises(ValueError, match=rf"{name} is {value}, expected {default}, for {algorithm} has no critic"):
        PPOConfig(algorithm=algorithm, num_samples=4, **{name: value})
    assert getattr(PPOConfig(**{name: value}), name) == value


def test_a_penalty_for_a_missing_end_is_refused_where_no_end_is_looked_for():
    """Before the run: the token may be given to train(), or be the tokenizer's."""
    trainer = make_trainer(eos_token=None, missing_eos_penalty=1.0, num_steps=1)
    message = "missing_eos_penalty is 1.0, expected 0.0, where eos_token is None"
    with pytest.raises(ValueError, match=message):
        next(trainer.steps())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.train(1, 8, eos_token=EOS)["step"] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kl_horizon": 300}, "kl_horizon is 300, expected 10000, where kl_target is None"),
        ({"kl_estimator": "k2"}, "kl_estimator is k2, expected k3, where the KL is in the reward"),
        ({**GROUPS, "kl_penalty": "reward", "kl_estimator": "k2"}, "kl_estimator is k2, expected k3"),
        ({"algorithm": "grpo"}, "num_samples is 1, expected at least 2"),
        ({"rollouts_per_step": 6, "num_samples": 4}, "rollouts_per_step is 6, expected a multiple of num_samples, 4"),
        ({"max_new_tokens": None}, "max_new_tokens is None, expected a number where max_seq_len is None"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"grpo_variant": "dapo"}, "grpo_variant is 'dapo'|grpo_variant is dapo"),
        ({"kl_target": 0.0}, "kl_target is 0.0"),
        ({"ratio_level": "geometric"}, "ratio_level is geometric, expected None or 'token' for ppo"),
        ({"gamma": 1.5}, "gamma is 1.5, expected 0 to 1"),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "kl_target is 6.0, expected None where kl_coef is 0"),
        ({**GROUPS, "grpo_variant": "dapo", "kl_target": 6.0}, "kl_target is 6.0, expected None where kl_coef is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**changes)


def test_rollouts_know_which_responses_were_cut():
    rollout = make_trainer(rollouts_per_step=64).collect()
    assert isinstance(rollout, Rollout)
    last = rollout.sequences.actions[torch.arange(64), rollout.sequences.response_lengths - 1]
    assert torch.equal(rollout.truncated, last != EOS)
    assert rollout.truncated.any() and not rollout.truncated.all()
    assert rollout.sequences.response_lengths[rollout.truncated].eq(6).all()
