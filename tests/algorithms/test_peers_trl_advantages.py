"""Advantages, rewards with a KL and RLOO's loss beside TRL's own trainers, which draw and score the responses.

Where ours differs by definition: TRL's GRPO divides by the deviation plus 1e-4, ours by the root of the variance plus
1e-8, as close to the paper as rounding lets it.
"""

import statistics

import pytest
import torch

from palm_rlhf.algorithms.advantages import group_advantages, overlong_penalty, rloo_advantages, token_rewards
from palm_rlhf.algorithms.losses import policy_loss, step_denominator
from palm_rlhf.model.interop.cohere import to_cohere_tensors
from palm_rlhf.policy.sequences import join, response_logprobs
from tests.factories import wandering_palm

SAMPLES = 4
SCORES = {  # two groups of four
    "scores of both signs": [1.0, -2.0, 0.5, 3.0, 10.0, 12.0, 9.5, 10.5],
    "a group of equal scores": [2.0, 2.0, 2.0, 2.0, 0.0, 1.0, 0.0, 0.0],
    "rows without a score": [None, 1.0, 4.0, 2.0, 3.0, None, None, -5.0],
    "one score in a group": [None, None, 7.0, None, 1.0, 0.0, 0.0, 0.25],
}
PROMPTS = [(2, 3)] * SAMPLES + [(4, 5, 6)] * SAMPLES


@pytest.fixture(scope="module")
def policy():
    return wandering_palm(0)


@pytest.fixture(scope="module")
def reference():
    return wandering_palm(1)


@pytest.fixture(scope="module")
def build(trl_trainer, tmp_path_factory, policy, reference):
    """`build("GRPO", scores, beta=0.1)` is a trainer of the policy, with the reference where it has one."""

    def build(kind, scores, **settings):
        folder = tmp_path_factory.mktemp("cohere")
        policy.save_pretrained(folder, format="cohere")
        trainer = trl_trainer(
            kind,
            folder,
            reward_funcs=lambda completions, **_: scores,
            num_generations=SAMPLES,
            per_device_train_batch_size=len(PROMPTS),
            max_completion_length=6,
            **settings,
        )
        if trainer.ref_model is not None:
            weights = to_cohere_tensors(reference.config, reference.state_dict())
            trainer.ref_model.load_state_dict(weights, strict=False)
            torch.testing.assert_close(trainer.ref_model.lm_head.weight, reference.token_emb.weight)
        return trainer

    return build


def experience_of(trainer):
    """What TRL's trainer makes of one rollout."""
    torch.manual_seed(0)
    return trainer._generate_and_score_completions([{"prompt": " ".join(map(str, prompt))} for prompt in PROMPTS])


def as_tensors(scores):
    valid = torch.tensor([score is not None for score in scores])
    return torch.tensor([0.0 if score is None else score for score in scores], dtype=torch.float64), valid


def deviations(scores, scale):
    """Of each row's group, or of all rows; 1 where there are no two scores."""
    groups = [scores[:SAMPLES], scores[SAMPLES:]] if scale == "group" else [scores, scores]
    known = [[score for score in group if score is not None] for group in groups]
    return torch.tensor([statistics.stdev(group) if len(group) > 1 else 1.0 for group in known]).repeat_interleave(4)


def check_group(group_advantages, theirs, scores, *, scale):
    values, valid = as_tensors(scores)
    got = group_advantages(values, SAMPLES, scale=scale, valid=valid)
    deviation = deviations(scores, scale)
    theirs = theirs.double() * (1 if scale == "none" else (deviation + 1e-4) / deviation.clamp(min=1e-4))
    torch.testing.assert_close(got, theirs, rtol=0, atol=2e-6)


def over_all_groups(scores, num_samples, **options):
    return group_advantages(scores, len(scores), **options)


def another_scale(scores, num_samples, *, scale, **options):
    other = {"group": "none", "none": "batch", "batch": "group"}[scale]
    return group_advantages(scores, num_samples, scale=other, **options)


def missing_scores_are_zeros(scores, num_samples, *, valid, **options):
    return group_advantages(scores, num_samples, **options)


def deviation_of_the_population(scores, num_samples, *, scale, **options):
    advantages = group_advantages(scores, num_samples, scale=scale, **options)
    count = num_samples if scale == "group" else int(options["valid"].sum())
    return advantages * (count / (count - 1)) ** 0.5


def leave_one_out(scores, num_samples, *, scale, **options):
    return rloo_advantages(scores, num_samples, **options)


@pytest.fixture(scope="module", params=["group", "batch", "none"])
def theirs_of_grpo(request, build):
    """What advantages are scaled by, and TRL's for each of SCORES."""
    trainers = {name: build("GRPO", scores, beta=0.0, scale_rewards=request.param) for name, scores in SCORES.items()}
    return request.param, {name: experience_of(trainer)["advantages"] for name, trainer in trainers.items()}


@pytest.mark.parametrize("name", SCORES)
def test_advantages_in_a_group_are_those_of_trl(theirs_of_grpo, name):
    scale, theirs = theirs_of_grpo
    check_group(group_advantages, theirs[name], SCORES[name], scale=scale)


@pytest.mark.parametrize(
    "mutant", [over_all_groups, another_scale, missing_scores_are_zeros, leave_one_out], ids=lambda f: f.__name__
)
def test_advantages_in_a_group_see_the_mutant(theirs_of_grpo, mutant):
    scale, theirs = theirs_of_grpo
    with pytest.raises(AssertionError):
        for name, scores in SCORES.items():
            check_group(mutant, theirs[name], scores, scale=scale)


@pytest.mark.parametrize("theirs_of_grpo", ["group", "batch"], indirect=True)
def test_advantages_in_a_group_see_the_deviation_of_a_population(theirs_of_grpo):
    scale, theirs = theirs_of_grpo
    with pytest.raises(AssertionError):
        for name, scores in SCORES.items():
            check_group(deviation_of_the_population, theirs[name], scores, scale=scale)


def sequences_of(experience):
    lengths = experience["completion_mask"].sum(dim=-1).tolist()
    assert min(lengths) < max(lengths)  # some responses have ended
    responses = [ids[:length] for ids, length in zip(experience["completion_ids"], lengths, strict=True)]
    return join([torch.tensor(prompt) for prompt in PROMPTS], responses)


@pytest.fixture(scope="module", params=[0.0, 0.3])
def rloo(request, build):
    """The weight of the KL, the scores, TRL's trainer and its rollout, for each of SCORES."""
    trainers = {name: build("RLOO", scores, beta=request.param) for name, scores in SCORES.items()}
    return request.param, {name: (trainer, experience_of(trainer)) for name, trainer in trainers.items()}


@torch.no_grad()
def our_advantages(policy, reference, sequences, scores, kl_coef, *, rewards=token_rewards, baselined=rloo_advantages):
    logprobs, ref_logprobs = (response_logprobs(palm, sequences).logprobs for palm in (policy, reference))
    values, valid = as_tensors(scores)
    mask = sequences.action_mask & valid.unsqueeze(-1)
    totals = rewards(values.float(), logprobs, ref_logprobs, mask, kl_coef=kl_coef).sum(dim=-1)
    return baselined(totals, SAMPLES, valid=valid)


def check_rloo(rloo, policy, reference, **mutant):
    kl_coef, rollouts = rloo
    for name, (_, experience) in rollouts.items():
        got = our_advantages(policy, reference, sequences_of(experience), SCORES[name], kl_coef, **mutant)
        torch.testing.assert_close(got, experience["advantages"], rtol=0, atol=2e-5)


def the_sign_of_the_kl(scores, logprobs, ref_logprobs, mask, *, kl_coef):
    return token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=-kl_coef)


def the_score_at_every_token(scores, logprobs, ref_logprobs, mask, *, kl_coef):
    return token_rewards(scores * 0, logprobs, ref_logprobs, mask, kl_coef=kl_coef) + scores.unsqueeze(-1) * mask


def the_mean_with_oneself(totals, num_samples, *, valid):
    return group_advantages(totals, num_samples, scale="none", valid=valid)


def missing_rewards_are_zeros(totals, num_samples, *, valid):
    return rloo_advantages(totals, num_samples)


def test_rloos_advantages_with_the_kl_in_the_reward_are_those_of_trl(rloo, policy, reference):
    check_rloo(rloo, policy, reference)


@pytest.mark.parametrize(
    "mutant",
    [
        {"rewards": the_score_at_every_token},
        {"baselined": the_mean_with_oneself},
        {"baselined": missing_rewards_are_zeros},
    ],
    ids=lambda mutant: next(iter(mutant.values())).__name__,
)
def test_rloos_advantages_see_the_mutant(rloo, policy, reference, mutant):
    with pytest.raises(AssertionError):
        check_rloo(rloo, policy, reference, **mutant)


@pytest.mark.parametrize("rloo", [0.3], indirect=True)
def test_rloos_advantages_see_the_sign_of_the_kl(rloo, policy, reference):
    with pytest.raises(AssertionError):
        check_rloo(rloo, policy, reference, rewards=the_sign_of_the_kl)


def loss_of_a_response(logprobs, old_logprobs, advantages, mask):
    """One ratio for each response, and a mean over them."""
    denominator = step_denominator(mask, aggregation="sequence", num_tokens=0, num_sequences=len(mask), max_length=0)
    options = {"clip_eps": 0.2, "ratio_level": "sequence", "denominator": denominator}
    return policy_loss(logprobs, old_logprobs, advantages, mask, **options).loss


def check_rloo_loss(rloo, policy, loss_of=loss_of_a_response):
    """On responses of a policy that has moved since, so that some of the ratios are beyond the clip."""
    for trainer, experience in rloo[1].values():
        sequences = sequences_of(experience)
        mask = sequences.action_mask
        logprobs = response_logprobs(policy, sequences).logprobs
        noise = 0.1 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(3))
        old_logprobs = (logprobs.detach() + noise) * mask
        trainer.model.zero_grad()
        expected = trainer.compute_loss(trainer.model, {**experience, "old_logps": old_logprobs.sum(dim=-1)})
        expected.backward()
        got = loss_of(logprobs, old_logprobs, experience["advantages"].unsqueeze(-1).expand(mask.shape), mask)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        names, weights = zip(*policy.named_parameters(), strict=True)
        ours = to_cohere_tensors(policy.config, dict(zip(names, torch.autograd.grad(got, weights), strict=True)))
        for name, weight in trainer.model.named_parameters():
            scale = float(weight.grad.abs().max())
            assert scale > 0
            torch.testing.assert_close(ours[name], weight.grad, rtol=0, atol=1e-4 * scale)


def ratios_of_tokens(logprobs, old_logprobs, advantages, mask):
    return policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2, denominator=len(mask)).loss


def a_mean_over_tokens(logprobs, old_logprobs, advantages, mask):
    return policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2, ratio_level="sequence").loss


def a_ratio_of_the_mean_logprob(logprobs, old_logprobs, advantages, mask):
    length = mask.sum(dim=-1, keepdim=True)
    return loss_of_a_response(logprobs / length, old_logprobs / length, advantages, mask)


def never_clipped(logprobs, old_logprobs, advantages, mask):
    ratio = ((logprobs - old_logprobs) * mask).sum(dim=-1).exp()
    return -(advantages[:, 0] * ratio).mean()


def test_rloos_loss_and_its_gradient_are_those_of_trl(rloo, policy):
    check_rloo_loss(rloo, policy)


@pytest.mark.parametrize(
    "mutant",
    [ratios_of_tokens, a_mean_over_tokens, a_ratio_of_the_mean_logprob, never_clipped],
    ids=lambda f: f.__name__,
)
def test_rloos_loss_sees_the_mutant(rloo, policy, mutant):
    with pytest.raises(AssertionError):
        check_rloo_loss(rloo, policy, mutant)


def check_overlong(penalty):
    rewards = pytest.importorskip("trl.rewards", reason="needs the extra peers", exc_type=ImportError)
    lengths = torch.arange(1, 13)
    for room, buffer in ((10, 4), (10, 1), (10, 10), (7, 3)):
        theirs = rewards.get_soft_overlong_punishment(room, buffer)([[0] * int(length) for length in lengths])
        got = penalty(lengths, room, buffer=buffer)
        torch.testing.assert_close(got.double(), torch.tensor(theirs).double(), rtol=0, atol=1e-6)


def test_the_soft_overlong_punishment_is_that_of_trl():
    check_overlong(overlong_penalty)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda lengths, room, buffer: overlong_penalty(lengths, room + 1, buffer=buffer),
        lambda lengths, room, buffer: overlong_penalty(lengths, room, buffer=buffer + 1),
        lambda lengths, room, buffer: -overlong_penalty(lengths, room, buffer=buffer),
        lambda lengths, room, buffer: -(lengths > room).float(),
    ],
    ids=["one token late", "a longer buffer", "a reward", "not soft"],
)
def test_the_soft_overlong_punishment_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_overlong(mutant)
