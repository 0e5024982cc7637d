"""KTO, SimPO, ORPO and likelihoods in the trainer: means and gradients by definition, references, a rule learnt."""

import copy
import math
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from palm_rlhf.training import (
    Preference,
    PreferenceConfig,
    PreferenceTrainer,
    UnpairedPreference,
    preference_learner,
    preference_objective,
)

# With an eps this large AdamW's first step is the gradient itself, so that weights show what gradients were.
GRADIENT_DESCENT = {"learning_rate": 1e6, "eps": 1e6, "warmup_steps": 0, "grad_clip": 0.0}
NUM_TOKENS = 12
PAIRED = {
    "sigmoid + nll": {"loss": "sigmoid", "beta": 0.5, "nll_coef": 0.3},
    "ipo + nll": {"loss": "ipo", "beta": 0.5, "nll_coef": 0.3},
    "simpo": {"loss": "simpo", "simpo_beta": 1.5, "simpo_gamma": 0.4},
    "simpo + nll": {"loss": "simpo", "nll_coef": 0.3},
    "orpo": {"loss": "orpo", "beta": 0.4},
}
KTO = {"loss": "kto", "beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}
ALL = {**PAIRED, "kto": KTO}
PAIR_MEANS = ["loss", "accuracy", "reward_margin", "chosen_rewards", "rejected_rewards", "chosen_logprobs",
              "rejected_logprobs"]  # fmt: skip


@pytest.fixture
def palm_of(tiny_palm):
    """`palm_of(dropout=0.5)` is a small PaLM with the same weights at every call."""
    return lambda **fields: tiny_palm(**{"num_tokens": NUM_TOKENS, "dim": 16, "dim_head": 8, "z_loss": 0.5, **fields})


@pytest.fixture
def other_palm(palm_of):
    """A reference that is not the policy: one that is surer (`scale` above 1) gives strange responses less."""

    def build(scale=1.5):
        palm = palm_of()
        with torch.no_grad():
            palm.norm.weight.mul_(scale)
        return palm

    return build


def config_of(**fields) -> PreferenceConfig:
    short = {"batch_size": 4, "grad_accum": 2, "warmup_steps": 0, "learning_rate": 1e-2, "log_every": 1}
    return PreferenceConfig(**{**short, "precision": "float32", "plot": False, **fields})


def items_of(count: int, seed: int = 0, *, paired: bool = True) -> list:
    """Pairs, or responses of which a third is desirable, of all lengths."""
    generator = np.random.default_rng(seed)
    tokens = [torch.from_numpy(generator.integers(0, NUM_TOKENS, generator.integers(1, 7))) for _ in range(6 * count)]
    triples = [tokens[first : first + 3] for first in range(0, len(tokens), 3)]
    triples = [triple for triple in triples if not torch.equal(*triple[1:])][:count]
    if paired:
        return [Preference(*triple) for triple in triples]
    return [UnpairedPreference(prompt, one, index % 3 == 0) for index, (prompt, one, _) in enumerate(triples)]


def logprob(palm, prompt, response, scope=None) -> torch.Tensor:
    """Of one response by definition, no pads and no batch: the sum over its tokens."""
    tokens = torch.cat((prompt, response))
    logprobs = F.log_softmax(palm(tokens[None, :-1], finetune_scope=scope)[0], dim=-1)
    return logprobs[torch.arange(len(tokens) - 1), tokens[1:]][len(prompt) - 1 :].sum()


def loss_of_a_pair(policy, reference, pair, options):
    """The loss of one pair, and its rewards: the formulas of the papers."""
    options = {"beta": 0.1, "nll_coef": 0.0, "simpo_beta": 2.0, "simpo_gamma": 1.0, **options}
    sides = [logprob(policy, pair.prompt, response) for response in (pair.chosen, pair.rejected)]
    lengths = len(pair.chosen), len(pair.rejected)
    means = [side / length for side, length in zip(sides, lengths)]
    if options["loss"] == "simpo":
        rewards = [options["simpo_beta"] * mean for mean in means]
        loss = torch.log(1 + torch.exp(rewards[1] - rewards[0] + options["simpo_gamma"]))
    elif options["loss"] == "orpo":
        odds = [mean.exp() / (1 - mean.exp()) for mean in means]
        rewards = [one.log() for one in odds]
        loss = -means[0] + options["beta"] * torch.log(1 + odds[1] / odds[0])
    else:
        refs = [logprob(reference, pair.prompt, response).detach() for response in (pair.chosen, pair.rejected)]
        per = lengths if options["loss"] == "ipo" else (1, 1)
        rewards = [options["beta"] * (side - ref) / n for side, ref, n in zip(sides, refs, per)]
        margin = rewards[0] - rewards[1]
        ipo = (margin / options["beta"] - 1 / (2 * options["beta"])) ** 2
        loss = ipo if options["loss"] == "ipo" else torch.log(1 + torch.exp(-margin))
    return loss - options["nll_coef"] * means[0], rewards, sides, -means[0]


def pairs_by_definition(policy, reference, pairs, options):
    """The loss, and what is reported of it, over pairs one by one."""
    losses, rewards, sides, nlls = zip(*(loss_of_a_pair(policy, reference, pair, options) for pair in pairs))
    means = {
        "accuracy": np.mean([float(chosen > rejected) for chosen, rejected in rewards]),
        "reward_margin": np.mean([float((chosen - rejected).detach()) for chosen, rejected in rewards]),
    }
    for name, values in (("rewards", rewards), ("logprobs", sides)):
        for place, side in enumerate(("chosen", "rejected")):
            means[f"{side}_{name}"] = np.mean([float(pair[place].detach()) for pair in values])
    if options["loss"] == "orpo" or options.get("nll_coef"):
        means["nll"] = np.mean([float(nll.detach()) for nll in nlls])
    return torch.stack(losses).mean(), means


def baseline_by_definition(policy, reference, items) -> float:
    """Of each prompt with the response before it, over all items."""
    with torch.no_grad():
        sides = [
            [logprob(palm, item.prompt, items[place - 1].response) for place, item in enumerate(items)]
            for palm in (policy, reference)
        ]
    return max(0.0, float(np.mean(sides[0]) - np.mean(sides[1])))


def kto_by_definition(policy, reference, items, options, z_ref=None):
    """The loss of KTO, and what is reported of it, over responses one by one."""
    z_ref = baseline_by_definition(policy, reference, items) if z_ref is None else z_ref
    losses, seen = [], {True: [], False: []}
    for item in items:
        logp = logprob(policy, item.prompt, item.response)
        reward = options["beta"] * (logp - logprob(reference, item.prompt, item.response).detach())
        margin = reward - options["beta"] * z_ref
        weight = options["desirable_weight"] if item.desirable else options["undesirable_weight"]
        losses.append(weight * (1 - torch.sigmoid(margin if item.desirable else -margin)))
        seen[item.desirable].append([float(value.detach()) for value in (reward, logp, margin)])
    (chosen, chosen_logprobs, up), (rejected, rejected_logprobs, down) = (
        np.array(seen[key]).T for key in (True, False)
    )
    means = {
        "accuracy": ((up > 0).sum() + (down <= 0).sum()) / len(items),
        "reward_margin": chosen.mean() - rejected.mean(),
        "chosen_rewards": chosen.mean(),
        "rejected_rewards": rejected.mean(),
        "chosen_logprobs": chosen_logprobs.mean(),
        "rejected_logprobs": rejected_logprobs.mean(),
        "z_ref": z_ref,
    }
    return torch.stack(losses).mean(), means


def by_definition(policy, reference, items, options):
    define = kto_by_definition if options["loss"] == "kto" else pairs_by_definition
    return define(policy, reference, items, options)


def reference_for(options, other_palm, scale=1.5):
    """What a trainer of this loss takes as reference."""
    return {} if options["loss"] in ("simpo", "orpo") else {"reference": other_palm(scale)}


def first_step(palm, items, config, **models):
    """The metrics of the first step, the gradient that it followed, and the items in their order."""
    before = {name: parameter.detach().clone() for name, parameter in palm.named_parameters()}
    trainer = PreferenceTrainer(palm, train_data=items, config=config, **models)
    drawn = copy.deepcopy(trainer.sampler).draw(trainer.items_per_step)
    metrics = next(trainer.steps())
    moved = {name: before[name] - parameter.detach() for name, parameter in palm.named_parameters()}
    return metrics, moved, [items[index] for index in drawn]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def check_first_steps(palm_of, other_palm, options, scale=1.5, batches=((8, 1), (4, 2), (2, 4), (1, 8))):
    """Loss, metrics and gradient of one step of 8 items in batches of any size, by definition."""
    items, palm = items_of(8, paired=options["loss"] != "kto"), palm_of()
    for batch_size, grad_accum in batches:
        config = config_of(batch_size=batch_size, grad_accum=grad_accum, **GRADIENT_DESCENT, **options)
        models = reference_for(options, other_palm, scale)
        metrics, followed, drawn = first_step(palm_of(), items, config, **models)
        loss, means = by_definition(palm, other_palm(scale), drawn, options)
        names, parameters = zip(*palm.named_parameters(), strict=True)
        expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert {name: metrics[name] for name in means} == pytest.approx(means, rel=1e-4, abs=1e-5)
        assert distance(followed, expected) < 2e-6
        assert metrics["grad_norm"] > 1e-2
    return metrics


@pytest.mark.parametrize("name", ALL)
def test_a_step_follows_the_gradient_of_the_definition_however_it_is_batched(palm_of, other_palm, name):
    metrics = check_first_steps(palm_of, other_palm, ALL[name])
    if name == "kto":
        assert metrics["z_ref"] > 0.1  # so that it counts


def test_the_baseline_of_kto_is_not_below_zero(palm_of, other_palm):
    assert check_first_steps(palm_of, other_palm, KTO, scale=0.7, batches=[(8, 1)])["z_ref"] == 0


def kto_loss_without(part):
    def mutant(*tensors, baseline, **options):
        if part == "baseline":
            baseline = torch.zeros_like(baseline)
        return original(*tensors, baseline=baseline, **{key: o for key, o in options.items() if key != part})

    original = preference_objective.kto_loss
    return mutant


@pytest.mark.parametrize("part", ["baseline", "desirable_weight", "undesirable_weight"])
def test_a_step_of_kto_sees_a_part_that_is_missing(palm_of, other_palm, monkeypatch, part):
    monkeypatch.setattr(preference_objective, "kto_loss", kto_loss_without(part))
    with pytest.raises(AssertionError):
        check_first_steps(palm_of, other_palm, KTO, batches=[(8, 1)])


def test_a_step_of_kto_sees_a_baseline_of_the_responses_themselves(palm_of, other_palm, monkeypatch):
    monkeypatch.setattr(preference_learner, "mismatched", list)
    with pytest.raises(AssertionError):
        check_first_steps(palm_of, other_palm, KTO, batches=[(8, 1)])


IGNORED = {
    "sigmoid + nll": {"nll_coef": 0.0, "beta": 0.4},
    "ipo + nll": {"nll_coef": 0.1},
    "simpo": {"simpo_beta": 2.0, "simpo_gamma": 1.0},
    "simpo + nll": {"nll_coef": 0.0},
    "orpo": {"beta": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
}


@pytest.mark.parametrize("name", ALL)
def test_a_step_sees_an_option_that_is_ignored(palm_of, other_palm, monkeypatch, name):
    define = by_definition
    for field, other in IGNORED[name].items():
        with monkeypatch.context() as patch:
            patch.setitem(
                globals(), "by_definition", lambda *args, f=field, o=other: define(*args[:3], {**args[3], f: o})
            )
            with pytest.raises(AssertionError):
                check_first_steps(palm_of, other_palm, ALL[name], batches=[(8, 1)])


def test_at_the_start_kto_costs_half_of_the_weights(palm_of):
    items = items_of(9, paired=False)
    for options in (KTO, {"loss": "kto"}, {"loss": "kto", "lora_r": 2}):
        config = config_of(**options, batch_size=9, grad_accum=1)
        weights = config.desirable_weight, config.undesirable_weight
        metrics = next(PreferenceTrainer(palm_of(), train_data=items, config=config).steps())
        assert metrics["loss"] == pytest.approx((3 * weights[0] + 6 * weights[1]) / 18, abs=1e-6)
        assert metrics["z_ref"] == 0 and abs(metrics["reward_margin"]) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_means_after_some_steps_are_those_of_the_definition(palm_of, name):
    options, paired = ALL[name], name != "kto"
    items, held_out, start = items_of(16, paired=paired), items_of(9, seed=1, paired=paired), palm_of().eval()
    config = config_of(num_epochs=3, **options)
    trainer = PreferenceTrainer(palm_of(), train_data=items, valid_data=held_out, config=config)
    *_, last = trainer.steps()
    assert last["step"] == 6 and last["epoch"] == 3
    with torch.no_grad():
        loss, means = by_definition(trainer.palm.eval(), start, held_out, options)
    got = trainer.evaluate()
    assert got == pytest.approx({"loss": loss.item(), **means}, rel=1e-4, abs=1e-5)
    assert list(got) == [*PAIR_MEANS, *([] if name == "simpo" else ["z_ref"] if name == "kto" else ["nll"])]
    assert trainer.finish().items() >= {f"valid_{key}": value for key, value in got.items()}.items()
    if not config.has_reference or not paired:  # whose reference is still there, or not needed
        assert trainer.evaluate(held_out) == pytest.approx(got, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_pads_and_batch_mates_do_not_matter(palm_of, other_palm, name):
    options, items = ALL[name], items_of(10, paired=name != "kto")
    trainers = [
        PreferenceTrainer(
            palm_of(),
            train_data=items,
            config=config_of(**options, batch_size=size),
            **reference_for(options, other_palm),
        )
        for size in (10, 1)
    ]
    together, alone = (trainer.evaluate(items) for trainer in trainers)
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_step_without_a_desirable_response_reports_none(palm_of):
    items = [UnpairedPreference(item.prompt, item.response, False) for item in items_of(8, paired=False)]
    trainer = PreferenceTrainer(palm_of(), train_data=items, valid_data=items, config=config_of(loss="kto"))
    metrics = next(trainer.steps())
    assert "chosen_rewards" not in metrics and "chosen_logprobs" not in metrics and "reward_margin" not in metrics
    assert metrics["rejected_logprobs"] < 0 and all(map(math.isfinite, metrics.values()))
    assert set(trainer.evaluate()) == {"loss", "accuracy", "rejected_rewards", "rejected_logprobs", "z_ref"}


@pytest.mark.parametrize("name, lora_r", [("sigmoid + nll", 0), ("simpo", 0), ("orpo", 0), ("kto", 0), ("kto", 2)])
def test_only_kto_without_adapters_keeps_a_copy(palms_alive, palm_of, tmp_path, name, lora_r):
    palm = palm_of()
    alive = palms_alive()
    config = config_of(**ALL[name], lora_r=lora_r, save_every=1)
    trainer = PreferenceTrainer(palm, train_data=items_of(8, paired=name != "kto"), config=config, output_dir=tmp_path)
    list(trainer.steps())
    copies = int(name == "kto" and lora_r == 0)
    assert palms_alive() == alive + copies
    saved = {path.name for path in (tmp_path / "checkpoints/step_00000001").iterdir()}
    files = {"model", "optimizer.safetensors", "state.json"}
    assert saved == files | ({"reference"} if copies else set()) | (
        {"reference.safetensors"} if config.has_reference else set()
    )


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_without_a_reference_only_the_policy_is_asked(palm_of, monkeypatch, name):
    """One forward a batch, and none before the first step."""
    asked = []
    forward = preference_learner.ResponseLogprobs.forward
    monkeypatch.setattr(
        preference_learner.ResponseLogprobs,
        "forward",
        lambda self, sequences: asked.append(len(sequences)) or forward(self, sequences),
    )
    trainer = PreferenceTrainer(palm_of(), train_data=items_of(8), config=config_of(**ALL[name]))
    assert asked == [] and trainer.reference is None and trainer.ref_logprobs == {}
    list(trainer.steps())
    assert asked == [8, 8]
    with pytest.raises(ValueError, match=f"a reference with the loss {name}, which has none: leave it out"):
        PreferenceTrainer(palm_of(), train_data=items_of(8), reference=palm_of(), config=config_of(**ALL[name]))


def test_the_copy_of_kto_never_changes_and_the_one_given_is_left_alone(palm_of, other_palm):
    items, given = items_of(16, paired=False), other_palm()
    before = copy.deepcopy(given.state_dict())
    trainer = PreferenceTrainer(palm_of(), train_data=items, reference=given, config=config_of(**KTO, num_epochs=2))
    list(trainer.steps())
    for palm in (given, trainer.reference.palm):
        assert all(torch.equal(before[name], value) for name, value in palm.state_dict().items())
    assert given is not trainer.reference.palm and all(p.requires_grad for p in given.parameters())
    assert not any(p.requires_grad for p in trainer.reference.palm.parameters())


def rule(count: int, seed: int, *, paired: bool) -> list:
    """Chosen, or desirable, are responses that count on from the prompt's last token; the others are any others."""
    generator = np.random.default_rng(seed)
    items = []
    while len(items) < count:
        prompt, rejected = (torch.from_numpy(generator.integers(0, NUM_TOKENS, size)) for size in (4, 3))
        prompt = prompt[generator.integers(4) :]
        chosen = (prompt[-1] + torch.arange(1, 4)) % NUM_TOKENS
        if not torch.equal(chosen, rejected):
            desirable = bool(generator.integers(2))
            one = UnpairedPreference(prompt, chosen if desirable else rejected, desirable)
            items.append(Preference(prompt, chosen, rejected) if paired else one)
    return items


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["sigmoid + nll", "simpo", "orpo", "kto"])
def test_a_rule_is_learnt(palm_of, name, seed):
    options = {"kto": {"loss": "kto", "beta": 0.5}, "simpo": {"loss": "simpo"}}.get(name, ALL[name])
    train, valid = (rule(count, at, paired=name != "kto") for count, at in ((256, seed), (100, seed + 7)))
    config = config_of(batch_size=16, num_epochs=4, seed=seed, **options)
    trainer = PreferenceTrainer(palm_of(), train_data=train, valid_data=valid, config=config)
    assert trainer.evaluate()["accuracy"] < 0.75
    list(trainer.steps())
    means = trainer.evaluate()
    assert means["accuracy"] > 0.9
    assert means["reward_margin"] > 0.1
    if config.has_nll:  # what is fine-tuned on is learnt as well, not only preferred
        assert means["nll"] < 1.5 < math.log(NUM_TOKENS)


@pytest.mark.parametrize("name, lora_r", [("sigmoid + nll", 0), ("simpo", 0), ("orpo", 2), ("kto", 0), ("kto", 2)])
def test_a_run_goes_on_to_the_bit_with_the_reference_that_it_had(palm_of, other_palm, tmp_path, name, lora_r):
    def make(folder, palm, resume=False):
        items, held_out = (items_of(count, paired=name != "kto", seed=count) for count in (14, 5))
        fields = {"batch_size": 2, "num_epochs": 2, "save_every": 3, "eval_every": 2, "lora_r": lora_r}
        return PreferenceTrainer(
            palm, train_data=items, valid_data=held_out, config=config_of(**ALL[name], **fields), output_dir=folder,
            resume=resume,
        )  # fmt: skip

    def plain(steps):
        return [{key: step[key] for key in step.keys() - {"elapsed", "tokens_per_second"}} for step in steps]

    whole = list(make(tmp_path / "whole", palm_of()).steps())
    list(islice(make(tmp_path / "part", palm_of()).steps(), 5))
    resumed = make(tmp_path / "part", other_palm(), resume=True)  # whose weights do not matter
    assert resumed.step == 3
    assert plain(resumed.steps()) == plain(whole[3:])


def test_a_run_of_kto_resumes_with_the_kind_of_reference_that_it_had(palm_of, other_palm, tmp_path):
    items = items_of(8, paired=False)

    def make(**models):
        config = config_of(**KTO, lora_r=2, save_every=1, num_epochs=2)
        return PreferenceTrainer(palm_of(), train_data=items, config=config, output_dir=tmp_path, **models)

    next(make().steps())
    with pytest.raises(ValueError, match=r"reference is a model of its own, that of .* is the base below the adapters"):
        make(reference=other_palm(), resume=True)
    assert next(make(resume=True).steps())["step"] == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"loss": "kto", "nll_coef": 0.1},
            r"nll_coef is 0.1, expected 0.0, with the loss kto, which it does not reach",
        ),
        ({"loss": "orpo", "nll_coef": 0.1}, "nll_coef is 0.1"),
        ({"loss": "simpo", "beta": 2.0}, r"beta is 2.0, expected 0.1, with the loss simpo"),
        ({"loss": "simpo", "label_smoothing": 0.1}, "label_smoothing is 0.1, expected 0.0, with the loss simpo"),
        ({"loss": "sigmoid", "desirable_weight": 2.0}, "desirable_weight is 2.0, expected 1.0, with the loss sigmoid"),
        ({"loss": "orpo", "undesirable_weight": 2.0}, "undesirable_weight is 2.0"),
        ({"loss": "ipo", "simpo_beta": 2.5}, "simpo_beta is 2.5"),
        ({"loss": "kto", "simpo_gamma": 0.5}, "simpo_gamma is 0.5"),
        ({"loss": "kto", "desirable_weight": 0.0}, "desirable_weight is 0.0, expected a number above 0"),
        ({"loss": "simpo", "simpo_beta": -1.0}, "simpo_beta is -1.0"),
        ({"loss": "simpo", "simpo_gamma": -1.0}, "simpo_gamma is -1.0, expected 0 or more"),
        ({"nll_coef": -1.0}, "nll_coef is -1.0"),
    ],
)
def test_settings_that_the_loss_lacks_or_that_have_no_meaning_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**fields)


def test_data_of_the_other_kind_is_refused(palm_of):
    for name, options in ALL.items():
        paired = name != "kto"
        with pytest.raises(ValueError, match=r"train_data has items of \['(Unp|P)\w+'\], expected (Unp|P)\w+ alone"):
            PreferenceTrainer(palm_of(), train_data=items_of(8, paired=not paired), config=config_of(**options))
    with pytest.raises(ValueError, match=r"valid_data has one item, expected two or more: kto"):
        items = items_of(8, paired=False)
        PreferenceTrainer(palm_of(), train_data=items, valid_data=items[:1], config=config_of(**KTO))
    with pytest.raises(ValueError, match=r"a step has one response, expected two or more for the loss kto"):
        PreferenceTrainer(palm_of(), train_data=items, config=config_of(**KTO, batch_size=1, grad_accum=1))
    with pytest.raises(ValueError, match=r"response 0 of train_data\[8\]: token id 12"):
        bad = UnpairedPreference(torch.tensor([1]), torch.tensor([12]), True)
        PreferenceTrainer(palm_of(), train_data=[*items, bad], config=config_of(**KTO))
