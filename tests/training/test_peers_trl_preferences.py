"""Steps of the trainers of preferences and rewards beside the losses of TRL's own trainers, from the same weights.

A PaLM and TRL's model in its Cohere form get the same pairs of responses; losses, implied rewards and the norms of the
gradients are compared, those of the reward trainer for the very same model.

Where ours differs by definition: label smoothing is that of conservative DPO, which TRL offers in its loss "aot" alone,
the same as DPO where a batch is one pair; its "robust" also divides by 1 - 2 label_smoothing.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from palm_rlhf.algorithms import preferences
from palm_rlhf.model.interop.cohere import to_cohere_tensors
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training import (
    Preference,
    PreferenceConfig,
    PreferenceTrainer,
    Ranking,
    UnpairedPreference,
    preference_learner,
)
from palm_rlhf.training import preference_objective as preference_module
from palm_rlhf.training import reward as reward_module
from palm_rlhf.training.epoch_sampler import EpochSampler
from palm_rlhf.training.reward import RewardModelTrainer
from palm_rlhf.training.reward_config import RewardConfig
from tests.factories import wandering_palm

SEEDS = range(3)
QUIET = {"precision": "float32", "plot": False, "grad_accum": 1, "num_epochs": 1, "warmup_steps": 0}
SMALL = {"num_tokens": 13, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "ff_mult": 2}


def pairs_of(seed, count=5):
    """Prompts and responses of 1 to 8 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randint(2, 13, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator)

    return [Preference(draw(), draw(), draw()) for _ in range(count)]


def as_ids(pairs):
    return [{f"{name}_ids": tokens.tolist() for name, tokens in vars(pair).items()} for pair in pairs]


def gradient_norm(model):
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


@pytest.fixture(scope="module")
def dpo_trainer(trl_trainer, tmp_path_factory):
    """`dpo_trainer(seed, loss_type=["ipo"])` is TRL's, of the policy and the reference of that seed."""

    def build(seed, **settings):
        policy, reference = wandering_palm(10 * seed), wandering_palm(10 * seed + 1)
        folder = tmp_path_factory.mktemp("cohere")
        policy.save_pretrained(folder, format="cohere")
        trainer = trl_trainer("DPO", folder, **settings)
        weights = to_cohere_tensors(reference.config, reference.state_dict())
        trainer.ref_model.load_state_dict(weights, strict=False)  # without the output layer, which is tied
        trainer.model.eval()
        return trainer

    return build


KINDS = {  # TRL's settings, ours, and pairs in a batch
    "sigmoid": ({"loss_type": ["sigmoid"], "beta": 0.2}, {"loss": "sigmoid", "beta": 0.2}, 5),
    "ipo": ({"loss_type": ["ipo"], "beta": 0.3}, {"loss": "ipo", "beta": 0.3}, 5),
    "likelihood": (  # TRL's is a mean over all tokens of a batch, ours over those of a response
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "beta": 0.2},
        {"loss": "sigmoid", "beta": 0.2, "nll_coef": 0.3},
        1,
    ),
    "label smoothing": (
        {"loss_type": ["aot"], "beta": 0.2, "label_smoothing": 0.1},
        {"loss": "sigmoid", "beta": 0.2, "label_smoothing": 0.1},
        1,
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def theirs_of_dpo(request, dpo_trainer):
    """Our settings, and TRL's numbers of each seed."""
    settings, options, count = KINDS[request.param]
    numbers = []
    for seed in SEEDS:
        trainer = dpo_trainer(seed, **settings)
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(as_ids(pairs_of(seed, count))))
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
        numbers.append({"loss": loss.item(), "grad_norm": gradient_norm(trainer.model), **metrics})
    return options, count, numbers


def step_of_dpo(seed, options, count):
    """The metrics of our trainer's first step."""
    config = PreferenceConfig(**QUIET, **options, batch_size=count)
    trainer = PreferenceTrainer(
        wandering_palm(10 * seed),
        train_data=pairs_of(seed, count),
        reference=wandering_palm(10 * seed + 1),
        config=config,
    )
    return next(trainer.steps())


def check_dpo(theirs_of_dpo, **changed):
    options, count, numbers = theirs_of_dpo
    for seed, theirs in zip(SEEDS, numbers, strict=True):
        ours = step_of_dpo(seed, {**options, **changed}, count)
        assert theirs["grad_norm"] > 1e-3
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name
        assert ours["chosen_logprobs"] == pytest.approx(theirs["logps/chosen"], rel=1e-5)
        assert ours["rejected_logprobs"] == pytest.approx(theirs["logps/rejected"], rel=1e-5)
        if options["loss"] == "sigmoid":  # ours are of means over tokens for ipo
            assert ours["chosen_rewards"] == pytest.approx(theirs["rewards/chosen"], rel=1e-4)
            assert ours["reward_margin"] == pytest.approx(theirs["rewards/margins"], rel=1e-4)
            assert ours["accuracy"] == theirs["rewards/accuracies"]


def test_a_step_of_dpo_is_that_of_trl(theirs_of_dpo):
    check_dpo(theirs_of_dpo)


def mutants_of_dpo(dpo_loss):
    """The loss with one thing changed, by name."""
    return {
        "no reference": lambda chosen, rejected, *_, **o: dpo_loss(chosen, rejected, chosen * 0, chosen * 0, **o),
        "labels swapped": lambda c, r, ref_c, ref_r, **o: dpo_loss(r, c, ref_r, ref_c, **o),
        "references swapped": lambda c, r, ref_c, ref_r, **o: dpo_loss(c, r, ref_r, ref_c, **o),
        "twice beta": lambda *logprobs, beta, **o: dpo_loss(*logprobs, beta=2 * beta, **o),
        "ipo for sigmoid": lambda *logprobs, kind, label_smoothing, **o: dpo_loss(
            *logprobs, kind={"ipo": "sigmoid", "sigmoid": "ipo"}[kind], **o
        ),
        "sums over pairs": lambda *logprobs, denominator, **o: dpo_loss(*logprobs, denominator=2, **o),
    }


@pytest.mark.parametrize("name", mutants_of_dpo(None))
def test_a_step_of_dpo_sees_the_mutant(theirs_of_dpo, monkeypatch, name):
    monkeypatch.setattr(preference_module, "dpo_loss", mutants_of_dpo(preference_module.dpo_loss)[name])
    with pytest.raises(AssertionError):
        check_dpo(theirs_of_dpo)


def test_a_step_of_dpo_sees_an_option_that_is_ignored(theirs_of_dpo):
    options = theirs_of_dpo[0]
    for name in options.keys() - {"loss"}:
        with pytest.raises(AssertionError):
            check_dpo(theirs_of_dpo, **{name: getattr(PreferenceConfig(), name)})


KTO = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.8}


@pytest.fixture(scope="module")
def theirs_of_kto(trl_trainer, tmp_path_factory):
    """Two models, responses, and TRL's numbers of one batch of them in our order; each pair of models both ways round.

    One way the estimate of the KL is above 0, the other way it is clamped there.
    """
    found = []
    for seed in SEEDS:
        pairs = enumerate(pairs_of(seed, 6))
        items = [UnpairedPreference(pair.prompt, pair.chosen, index % 3 != 1) for index, pair in pairs]
        drawn = [items[index] for index in EpochSampler(6, 0).draw(6)]
        rows = [
            {
                "prompt_ids": item.prompt.tolist(),
                "completion_ids": item.response.tolist(),
                "KL_completion_ids": drawn[place - 1].response.tolist(),
                "label": item.desirable,
            }
            for place, item in enumerate(drawn)
        ]
        for models in ((10 * seed, 10 * seed + 1), (10 * seed + 1, 10 * seed)):
            folder = tmp_path_factory.mktemp("cohere")
            policy, reference = map(wandering_palm, models)
            policy.save_pretrained(folder, format="cohere")
            trainer = trl_trainer("KTO", folder, **KTO)
            weights = to_cohere_tensors(reference.config, reference.state_dict())
            trainer.ref_model.load_state_dict(weights, strict=False)
            trainer.model.eval()
            loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
            loss.backward()
            metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
            found.append((models, items, {"loss": loss.item(), "grad_norm": gradient_norm(trainer.model), **metrics}))
    assert min(theirs["kl"] for *_, theirs in found) == 0 and max(theirs["kl"] for *_, theirs in found) > 0.1
    return found


OF_TRL = {
    "z_ref": "kl",
    "reward_margin": "rewards/margins",
    "chosen_rewards": "rewards/chosen",
    "rejected_rewards": "rewards/rejected",
    "chosen_logprobs": "logps/chosen",
    "rejected_logprobs": "logps/rejected",
}


def check_kto(theirs_of_kto, **changed):
    for models, items, theirs in theirs_of_kto:
        config = PreferenceConfig(**QUIET, loss="kto", **{**KTO, **changed}, batch_size=6)
        policy, reference = map(wandering_palm, models)
        ours = next(PreferenceTrainer(policy, train_data=items, reference=reference, config=config).steps())
        assert theirs["grad_norm"] > 1e-3
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name
        for name, other in OF_TRL.items():
            assert ours[name] == pytest.approx(theirs[other], rel=1e-4, abs=1e-5), name


def test_a_step_of_kto_is_that_of_trl(theirs_of_kto):
    check_kto(theirs_of_kto)


KTO_MUTANTS = {
    "responses to their own prompts": ("mismatched", list),
    "a sum": ("kto_baseline", lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).sum().clamp(min=0)),
    "not clamped": ("kto_baseline", lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).mean()),
}


@pytest.mark.parametrize("mutant", KTO_MUTANTS.values(), ids=KTO_MUTANTS)
def test_a_step_of_kto_sees_the_mutant(theirs_of_kto, monkeypatch, mutant):
    monkeypatch.setattr(preference_learner, *mutant)
    with pytest.raises(AssertionError):
        check_kto(theirs_of_kto)


@pytest.mark.parametrize("name", KTO)
def test_a_step_of_kto_sees_an_option_that_is_ignored(theirs_of_kto, name):
    with pytest.raises(AssertionError):
        check_kto(theirs_of_kto, **{name: getattr(PreferenceConfig(), name)})


class Scorer(nn.Module):
    """A RewardModel as TRL calls one, which knows nothing of where a prompt ends."""

    def __init__(self, reward_model):
        super().__init__()
        self.reward_model = reward_model

    def forward(self, input_ids, attention_mask, **_):
        lengths = torch.ones(len(input_ids), dtype=torch.long)  # every prompt here is one token
        scores = self.reward_model(input_ids, attention_mask.bool(), prompt_lengths=lengths, raw=True)
        return SimpleNamespace(logits=scores.unsqueeze(-1))


def reward_model_of(seed):
    model = RewardModel(wandering_palm(seed))
    model.head.weight.data.mul_(4)
    return model


def rankings_of(seed, has_margins):
    return [
        Ranking(pair.prompt[:1], (pair.chosen, pair.rejected), 0.3 * number if has_margins else 0.0)
        for number, pair in enumerate(pairs_of(seed))
    ]


def as_rows(rankings, has_margins):
    rows = []
    for ranking in rankings:
        chosen, rejected = (torch.cat([ranking.prompt, response]).tolist() for response in ranking.responses)
        margin = {"margin": ranking.margins} if has_margins else {}
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected, **margin})
    return rows


OBJECTIVES = {  # TRL's settings, ours, and whether pairs have margins
    "ranking": ({}, {"loss": "ranking"}, False),
    "bradley_terry": ({}, {"loss": "bradley_terry"}, False),
    "plackett_luce": ({}, {"loss": "plackett_luce"}, False),
    "centring": ({"center_rewards_coefficient": 0.05}, {"loss": "bradley_terry", "centering": 0.05}, False),
    "centring of rankings": ({"center_rewards_coefficient": 0.05}, {"loss": "ranking", "centering": 0.05}, False),
    "margins": ({}, {"loss": "bradley_terry"}, True),
}


@pytest.fixture(scope="module", params=OBJECTIVES)
def theirs_of_reward(request, trl_trainer):
    """Our settings, whether pairs have margins, and TRL's numbers of each seed."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    settings, options, has_margins = OBJECTIVES[request.param]
    sizes = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    unused = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=1, num_labels=1, pad_token_id=0))
    trainer = trl_trainer("Reward", unused, **settings)
    trainer.model.eval()
    numbers = []
    for seed in SEEDS:
        model = Scorer(reward_model_of(seed))
        rows = as_rows(rankings_of(seed, has_margins), has_margins)
        loss = trainer.compute_loss(model, trainer.data_collator(rows))
        loss.backward()
        accuracy = trainer._metrics["eval"]["accuracy"][-1]
        numbers.append({"loss": loss.item(), "grad_norm": gradient_norm(model), "accuracy": accuracy})
    return options, has_margins, numbers


def check_reward(theirs_of_reward, **changed):
    options, has_margins, numbers = theirs_of_reward
    for seed, theirs in zip(SEEDS, numbers, strict=True):
        config = RewardConfig(**QUIET, **{**options, **changed}, batch_size=5)
        trainer = RewardModelTrainer(reward_model_of(seed), train_data=rankings_of(seed, has_margins), config=config)
        ours = next(trainer.steps())
        assert theirs["grad_norm"] > 1e-3
        for name in ("loss", "grad_norm", "accuracy"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name


def test_a_step_of_the_reward_trainer_is_that_of_trl(theirs_of_reward):
    check_reward(theirs_of_reward)


def mutant_of_scores(loss, change):
    """Of a loss of chosen and rejected scores, or of the scores of rankings."""

    def mutant(*tensors, **options):
        if loss == "bradley_terry_loss":
            return getattr(preferences, loss)(*change(*tensors), **options)
        scores = torch.stack(change(*tensors[0].unbind(dim=-1)), dim=-1)
        return getattr(preferences, loss)(scores, *tensors[1:], **options)

    return mutant


REWARD_MUTANTS = {
    "the worse is the better": lambda chosen, rejected: (rejected, chosen),
    "half the difference": lambda chosen, rejected: ((chosen + rejected) / 2, rejected),
    "no gradient to the worse": lambda chosen, rejected: (chosen, rejected.detach()),
}


@pytest.mark.parametrize("change", REWARD_MUTANTS.values(), ids=REWARD_MUTANTS)
def test_a_step_of_the_reward_trainer_sees_the_mutant(theirs_of_reward, monkeypatch, change):
    loss = f"{theirs_of_reward[0]['loss']}_loss"
    monkeypatch.setattr(reward_module, loss, mutant_of_scores(loss, change))
    with pytest.raises(AssertionError):
        check_reward(theirs_of_reward)


@pytest.mark.parametrize("theirs_of_reward", ["margins"], indirect=True)
def test_a_step_of_the_reward_trainer_sees_margins_that_are_ignored(theirs_of_reward, monkeypatch):
    def without(*scores, margin, **options):
        return preferences.bradley_terry_loss(*scores, **options)

    monkeypatch.setattr(reward_module, "bradley_terry_loss", without)
    with pytest.raises(AssertionError):
        check_reward(theirs_of_reward)


@pytest.mark.parametrize("theirs_of_reward", ["centring", "centring of rankings"], indirect=True)
def test_a_step_of_the_reward_trainer_sees_another_centring(theirs_of_reward):
    for centering in (0.0, 0.025):
        with pytest.raises(AssertionError):
            check_reward(theirs_of_reward, centering=centering)
