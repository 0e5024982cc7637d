"""The losses of GRPO, its variants and PPO's policy beside TRL's own trainers, on the same log-probabilities.

The trainers compute their losses in float64 from a model that is a table of log-probabilities, so that both sides agree
to rounding, in value and in gradient. Every comparison refuses mutants of our side.

Where ours differs by definition: TRL's GRPO trainer starts without a KL (beta 0), its DAPO without clip-higher, and
both get ours here. By its default TRL multiplies the KL by the ratio (DeepSeek-V3.2, arXiv:2512.02556); GRPO's paper
does not, nor do we: `use_bias_correction_kl=False`. TRL counts a row without actions as a sequence, ours does not: rows
here have at least one. TRL has no PPO since 1.13: its GRPO trainer takes one advantage for each token and the mean over
tokens ("bnpo"), which is PPO's policy loss; what a critic learns has no counterpart. The bound of CISPO's weight is
epsilon_high in TRL, 1 + clip_eps_high in ours, as in its paper.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from palm_rlhf.algorithms.kl import kl_estimate
from palm_rlhf.algorithms.losses import cispo_loss, policy_loss, step_denominator
from palm_rlhf.algorithms.ratios import importance_weights
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.masked import masked_mean

SEEDS = range(5)
PROMPT, LONGEST = 3, 9
BETA = 0.04
LENGTHS = [[1, 7, 2, 5, 6, 3], [4, 4, 4, 4, 4, 4], [9, 1, 1, 1, 1, 1], [3, 8, 2, 9, 5, 7], [2, 1, 2, 3, 1, 2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Something for the trainers to open; the losses are those of tables."""
    path = tmp_path_factory.mktemp("cohere")
    PaLM(num_tokens=13, dim=16, depth=1, heads=2, dim_head=8).save_pretrained(path, format="cohere")
    return path


class Table(nn.Module):
    """A causal model that gives the token in a place the log-probability in the table, as TRL's fused head does."""

    def __init__(self, logprobs):
        super().__init__()
        self.logprobs = nn.Parameter(logprobs)  # b (n-1)

    def forward(self, *, labels, **_):
        log_probs = torch.where(labels[:, 1:] != -100, self.logprobs, 0.0)
        return SimpleNamespace(log_probs=log_probs, entropy=torch.zeros_like(log_probs))


def batch_of(seed):
    """Six responses of uneven lengths: what each policy says of them, and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS[seed]).unsqueeze(-1)
    mask = torch.arange(int(lengths.max())) < lengths
    noise = torch.randn(5, *mask.shape, dtype=torch.float64, generator=generator)
    old = noise[0] - 3
    return SimpleNamespace(
        mask=mask,
        old_logprobs=old,
        logprobs=old + 0.4 * noise[1],  # about half of the ratios are beyond the clip
        ref_logprobs=old + 0.3 * noise[2],
        token_advantages=noise[3],
        advantages=noise[4, :, 0],
    )


def of_trl(trainer, batch, *, per_token=False, parts=1, weights=None):
    """TRL's loss and its gradient, summed over the parts of a step that are accumulated."""
    rows, width = batch.mask.shape
    table = Table(torch.cat([torch.zeros(rows, PROMPT - 1, dtype=torch.float64), batch.logprobs], dim=1))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = parts
    total, num_tokens = 0.0, batch.mask.sum()
    for index in torch.arange(rows).chunk(parts):
        part = Table(table.logprobs.detach()[index])
        inputs = {
            "prompt_ids": torch.full((len(index), PROMPT), 2),
            "prompt_mask": torch.ones(len(index), PROMPT, dtype=torch.long),
            "completion_ids": torch.full((len(index), width), 3),
            "completion_mask": batch.mask[index].long(),
            "old_per_token_logps": batch.old_logprobs[index],
            "ref_per_token_logps": batch.ref_logprobs[index],
            "old_logps": (batch.old_logprobs * batch.mask)[index].sum(dim=-1),
            "advantages": (batch.token_advantages if per_token else batch.advantages)[index],
            "num_items_in_batch": num_tokens,
        }
        if weights is not None:
            inputs["importance_sampling_ratio"] = weights[index]
        loss = trainer.compute_loss(part, inputs)
        loss.backward()
        total = total + loss.detach()
        table.logprobs.grad = torch.zeros_like(table.logprobs) if table.logprobs.grad is None else table.logprobs.grad
        table.logprobs.grad[index] = part.logprobs.grad
    return total, table.logprobs.grad[:, PROMPT - 1 :]


def k3(logprobs, ref_logprobs, **options):
    return kl_estimate(logprobs, ref_logprobs, kind="k3", **options)


def of_ours(
    batch,
    *,
    aggregation,
    beta,
    per_token=False,
    policy_loss=policy_loss,
    kl=k3,
    max_length=LONGEST,
    **clip,
):
    """Our loss, and its gradient."""
    logprobs, mask = batch.logprobs.clone().requires_grad_(), batch.mask
    denominator = step_denominator(
        mask, aggregation=aggregation, num_tokens=mask.sum(), num_sequences=len(mask), max_length=max_length
    )
    advantages = batch.token_advantages if per_token else batch.advantages.unsqueeze(-1).expand(mask.shape)
    policy = policy_loss(logprobs, batch.old_logprobs, advantages, mask, denominator=denominator, **clip)
    penalty = masked_mean(kl(logprobs, batch.ref_logprobs, action_mask=mask), mask, denominator=denominator)
    loss = policy.loss + beta * penalty
    loss.backward()
    return loss.detach(), logprobs.grad


VARIANTS = {  # TRL's settings, and ours
    "grpo": ({"loss_type": "grpo", "beta": BETA}, {"aggregation": "sequence", "clip_eps": 0.2, "beta": BETA}),
    "dr_grpo": ({"loss_type": "dr_grpo", "beta": 0.0}, {"aggregation": "constant", "clip_eps": 0.2, "beta": 0}),
    "dapo": (
        {"loss_type": "dapo", "beta": BETA, "epsilon_high": 0.28},
        {"aggregation": "token", "clip_eps": 0.2, "clip_eps_high": 0.28, "beta": BETA},
    ),
    "bnpo": ({"loss_type": "bnpo", "beta": BETA}, {"aggregation": "token", "clip_eps": 0.2, "beta": BETA}),
}


def grpo_trainer(trl_trainer, folder, **settings):
    return trl_trainer(
        "GRPO",
        folder,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        max_completion_length=LONGEST,
        num_generations=2,
        per_device_train_batch_size=2,
        **{"use_bias_correction_kl": False, **settings},
    )


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, trl_trainer, folder):
    """TRL's trainer, and our options."""
    settings, options = VARIANTS[request.param]
    return grpo_trainer(trl_trainer, folder, **settings), options


def check(theirs, ours):
    for got, expected in zip(ours, theirs, strict=True):
        assert expected.dtype == torch.float64 and expected.abs().max() > 1e-4
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def check_losses(trainer, options, **kind):
    for seed in SEEDS:
        batch = batch_of(seed)
        check(of_trl(trainer, batch, **kind), of_ours(batch, **options, **kind))


def sees(mutated, theirs):
    """A mutant passes no comparison whose batch can tell: of five, most can, and one suffices."""
    with pytest.raises(AssertionError):
        for seed in SEEDS:
            check(theirs(batch_of(seed)), mutated(batch_of(seed)))


def test_the_loss_and_its_gradient_are_those_of_trl(variant):
    trainer, options = variant
    check_losses(trainer, options)


def test_ppos_loss_of_token_advantages_is_that_of_trl(trl_trainer, folder):
    trainer = grpo_trainer(trl_trainer, folder, loss_type="bnpo", beta=0.0)
    check_losses(trainer, {"aggregation": "token", "clip_eps": 0.2, "beta": 0}, per_token=True)
    for seed in SEEDS:
        batch = batch_of(seed)
        of_trl(trainer, batch, per_token=True)
        ours = policy_loss(batch.logprobs, batch.old_logprobs, batch.token_advantages, batch.mask, clip_eps=0.2)
        assert 0 < ours.clip_fraction < 1
        clipped = trainer._metrics["train"]["clip_ratio/region_mean"][-1]
        assert ours.clip_fraction.item() == pytest.approx(clipped, abs=1e-6)
    sees(
        partial(of_ours, aggregation="token", clip_eps=0.2, beta=0, per_token=False),
        partial(of_trl, trainer, per_token=True),
    )


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_the_parts_of_an_accumulated_step_add_up_as_in_trl(trl_trainer, folder, name):
    settings, options = VARIANTS[name]
    trainer = grpo_trainer(trl_trainer, folder, gradient_accumulation_steps=3, **settings)
    for seed in SEEDS:
        batch = batch_of(seed)
        check(of_trl(trainer, batch, parts=3), of_ours(batch, **options))


def advantages_of_other_rows(logprobs, old_logprobs, advantages, mask, **options):
    return policy_loss(logprobs, old_logprobs, advantages.roll(1, 0), mask, **options)


def sign_of_the_ratio(logprobs, old_logprobs, advantages, mask, **options):
    return policy_loss(old_logprobs, logprobs, advantages, mask, **options)


def rewards_called_costs(logprobs, old_logprobs, advantages, mask, **options):
    return policy_loss(logprobs, old_logprobs, -advantages, mask, **options)


def old_is_new(logprobs, old_logprobs, advantages, mask, **options):
    return policy_loss(logprobs, logprobs.detach(), advantages, mask, **options)


def never_clipped(*tensors, clip_eps, clip_eps_high=None, **options):
    return policy_loss(*tensors, clip_eps=1 - 1e-9, clip_eps_high=1e9, **options)


def pads_are_actions(logprobs, old_logprobs, advantages, mask, **options):
    return policy_loss(logprobs, old_logprobs, advantages, torch.ones_like(mask), **options)


def clip_bounds_swapped(*tensors, clip_eps, clip_eps_high=None, **options):
    return policy_loss(*tensors, clip_eps=clip_eps_high or 0.3, clip_eps_high=clip_eps, **options)


POLICY_MUTANTS = [
    advantages_of_other_rows,
    sign_of_the_ratio,
    rewards_called_costs,
    old_is_new,
    never_clipped,
    pads_are_actions,
    clip_bounds_swapped,
]


@pytest.mark.parametrize("mutant", POLICY_MUTANTS, ids=lambda f: f.__name__)
def test_the_comparison_sees_the_mutant(variant, mutant):
    trainer, options = variant
    sees(partial(of_ours, policy_loss=mutant, **options), partial(of_trl, trainer))


def test_the_comparison_sees_another_aggregation(variant):
    trainer, options = variant
    for aggregation in {"token", "sequence", "constant"} - {options["aggregation"]}:
        sees(partial(of_ours, **{**options, "aggregation": aggregation}), partial(of_trl, trainer))


KL_MUTANTS = {
    "k1": partial(kl_estimate, kind="k1"),
    "k2": partial(kl_estimate, kind="k2"),
    "of the reference to the policy": lambda logprobs, ref_logprobs, **options: k3(ref_logprobs, logprobs, **options),
}


@pytest.mark.parametrize("variant", ["grpo", "dapo", "bnpo"], indirect=True)
@pytest.mark.parametrize("kl", KL_MUTANTS.values(), ids=KL_MUTANTS)
def test_the_comparison_sees_another_kl(variant, kl):
    trainer, options = variant
    sees(partial(of_ours, kl=kl, **options), partial(of_trl, trainer))


def test_the_comparison_sees_the_prompt_in_dr_grpos_constant(trl_trainer, folder):
    settings, options = VARIANTS["dr_grpo"]
    trainer = grpo_trainer(trl_trainer, folder, **settings)
    sees(partial(of_ours, **options, max_length=LONGEST + PROMPT), partial(of_trl, trainer))


def test_the_comparison_sees_dapo_without_clip_higher(trl_trainer, folder):
    settings, options = VARIANTS["dapo"]
    trainer = grpo_trainer(trl_trainer, folder, **settings)
    sees(partial(of_ours, **{**options, "clip_eps_high": None}), partial(of_trl, trainer))


def test_the_comparison_sees_a_kl_times_the_ratio(trl_trainer, folder):
    settings, options = VARIANTS["grpo"]
    trainer = grpo_trainer(trl_trainer, folder, use_bias_correction_kl=True, **settings)
    sees(partial(of_ours, **options), partial(of_trl, trainer))


NEWER = {
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08},
        {"aggregation": "sequence", "clip_eps": 0.05, "clip_eps_high": 0.08, "ratio_level": "geometric"},
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.5},
        {"aggregation": "token", "clip_eps": 1.0, "clip_eps_high": 0.5, "policy_loss": cispo_loss},
    ),
}


@pytest.fixture(scope="module", params=NEWER)
def newer(request, trl_trainer, folder):
    """TRL's trainer, and our options."""
    settings, options = NEWER[request.param]
    return grpo_trainer(trl_trainer, folder, beta=BETA, **settings), {**options, "beta": BETA}


def test_gspo_and_cispo_are_those_of_trl(newer):
    check_losses(*newer)


@pytest.mark.parametrize(
    "newer, changed",
    [
        ("gspo", {"ratio_level": "token"}),
        ("gspo", {"ratio_level": "sequence"}),
        ("gspo", {"clip_eps": 0.08}),
        ("gspo", {"clip_eps_high": 0.05}),
        ("gspo", {"aggregation": "token"}),
        ("gspo", {"policy_loss": cispo_loss}),
        ("gspo", {"policy_loss": old_is_new}),
        ("gspo", {"policy_loss": rewards_called_costs}),
        ("cispo", {"policy_loss": policy_loss}),
        ("cispo", {"clip_eps": 0.2}),
        ("cispo", {"clip_eps_high": 1.5}),
        ("cispo", {"aggregation": "sequence"}),
        ("cispo", {"ratio_level": "geometric"}),
    ],
    indirect=["newer"],
    ids=lambda x: x if isinstance(x, str) else str({key: getattr(v, "__name__", v) for key, v in x.items()}),
)
def test_gspo_and_cispo_see_the_mutant(newer, changed):
    trainer, options = newer
    sees(partial(of_ours, **{**options, **changed}), partial(of_trl, trainer))


CAP = 1.2


def weighed(batch, cap=CAP, aggregation="token", weights_of=importance_weights):
    """Our loss of advantages times the weights of a sampler whose log-probabilities lie about the old ones."""
    weights = weights_of(batch.old_logprobs, batch.sampler_logprobs, batch.mask, cap=cap)
    advantages = batch.advantages.unsqueeze(-1) * weights
    per_token = SimpleNamespace(**{**vars(batch), "token_advantages": advantages})
    return of_ours(per_token, aggregation=aggregation, clip_eps=0.2, clip_eps_high=0.28, beta=BETA, per_token=True)


def truncated_by_trl(trainer, batch):
    """Its loss times the ratio clamped from above, which its trainer has where vLLM drew the responses."""
    ratio = torch.exp((batch.old_logprobs - batch.sampler_logprobs) * batch.mask)
    return of_trl(trainer, batch, weights=torch.clamp(ratio, max=CAP))


def sampled(seed):
    batch = batch_of(seed)
    noise = torch.randn(batch.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + seed))
    batch.sampler_logprobs = batch.old_logprobs + 0.3 * noise
    return batch


@pytest.fixture(scope="module")
def truncating(trl_trainer, folder):
    """TRL's trainer as it is where vLLM drew the responses, which is not installed here."""
    trainer = grpo_trainer(trl_trainer, folder, **VARIANTS["dapo"][0])
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    return trainer


def test_truncated_importance_sampling_is_that_of_trl(truncating):
    for seed in SEEDS:
        check(truncated_by_trl(truncating, sampled(seed)), weighed(sampled(seed)))


@pytest.mark.parametrize(
    "changed",
    [
        {"cap": 1e9},
        {"weights_of": lambda old, sampler, mask, cap: importance_weights(sampler, old, mask, cap=cap)},
        {"weights_of": lambda old, sampler, mask, cap: torch.ones_like(old)},
    ],
    ids=["not truncated", "upside down", "ignored"],
)
def test_truncated_importance_sampling_sees_the_mutant(truncating, changed):
    with pytest.raises(AssertionError):
        for seed in SEEDS:
            check(truncated_by_trl(truncating, sampled(seed)), weighed(sampled(seed), **changed))
