"""Preferences: known losses and gradients, rewards by definition, a reference that stays, adapters, a rule learnt."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from palm_rlhf.policy.sequences import join
from palm_rlhf.training import Preference, PreferenceConfig, PreferenceTrainer
from palm_rlhf.training.preference_learner import ResponseLogprobs
from palm_rlhf.training.run.log import read_metrics

# With an eps this large AdamW's first step is the gradient itself, so that weights show what gradients were.
GRADIENT_DESCENT = {"learning_rate": 1e6, "eps": 1e6, "warmup_steps": 0, "grad_clip": 0.0}
NUM_TOKENS = 12
MEANS = ["loss", "accuracy", "reward_margin", "chosen_rewards", "rejected_rewards", "chosen_logprobs",
         "rejected_logprobs"]  # fmt: skip
OBJECTIVES = [
    {"loss": "sigmoid", "beta": 0.5},
    {"loss": "sigmoid", "beta": 0.5, "label_smoothing": 0.1},
    {"loss": "ipo", "beta": 0.5},
]


@pytest.fixture
def palm_of(tiny_palm):
    """`palm_of(dropout=0.5)` is a small PaLM with the same weights at every call."""
    return lambda **fields: tiny_palm(**{"num_tokens": NUM_TOKENS, "dim": 16, "dim_head": 8, "z_loss": 0.5, **fields})


def config_of(**fields) -> PreferenceConfig:
    short = {"batch_size": 4, "grad_accum": 2, "warmup_steps": 0, "learning_rate": 1e-2, "log_every": 1}
    return PreferenceConfig(**{**short, "precision": "float32", "plot": False, **fields})


def pairs_of(count: int, seed: int = 0) -> list[Preference]:
    """Pairs of all lengths, token 0 among them."""
    generator = np.random.default_rng(seed)
    tokens = [torch.from_numpy(generator.integers(0, NUM_TOKENS, generator.integers(1, 7))) for _ in range(6 * count)]
    pairs = [Preference(*tokens[first : first + 3]) for first in range(0, len(tokens), 3)]
    return [pair for pair in pairs if not torch.equal(pair.chosen, pair.rejected)][:count]


def logprob(palm, prompt, response, *, scope=None, with_prompt=False) -> torch.Tensor:
    """Of one response by definition, no pads and no batch: the sum over its tokens."""
    tokens = torch.cat((prompt, response))
    logprobs = F.log_softmax(palm(tokens[None, :-1], finetune_scope=scope)[0], dim=-1)
    logprobs = logprobs[torch.arange(len(tokens) - 1), tokens[1:]]
    return logprobs.sum() if with_prompt else logprobs[len(prompt) - 1 :].sum()


def pair_logprobs(palm, pairs, **options) -> torch.Tensor:
    """`2 p`: of all chosen and of all rejected responses."""
    chosen = [logprob(palm, pair.prompt, pair.chosen, **options) for pair in pairs]
    rejected = [logprob(palm, pair.prompt, pair.rejected, **options) for pair in pairs]
    return torch.stack((torch.stack(chosen), torch.stack(rejected)))


def lengths_of(pairs) -> torch.Tensor:
    return torch.tensor([[len(pair.chosen) for pair in pairs], [len(pair.rejected) for pair in pairs]])


def means_by_definition(logprobs, ref_logprobs, pairs, *, loss, beta, label_smoothing=0.0) -> dict[str, float]:
    """The seven means that the trainer reports, from log-probabilities `2 p`."""
    per = lengths_of(pairs) if loss == "ipo" else 1
    chosen, rejected = beta * (logprobs - ref_logprobs) / per
    margin = chosen - rejected
    if loss == "ipo":
        losses = (margin / beta - 1 / (2 * beta)) ** 2
    else:
        right = 1 / (1 + torch.exp(-margin))
        losses = -(1 - label_smoothing) * right.log() - label_smoothing * (1 - right).log()
    values = (losses, (margin > 0).float(), margin, chosen, rejected, *logprobs)
    return dict(zip(MEANS, (float(value.mean()) for value in values), strict=True))


def first_step(palm, pairs, config) -> tuple[dict, dict[str, torch.Tensor]]:
    """The metrics of the first step, and the gradient that it followed."""
    before = {name: parameter.detach().clone() for name, parameter in palm.named_parameters()}
    metrics = next(PreferenceTrainer(palm, train_data=pairs, config=config).steps())
    return metrics, {name: before[name] - parameter.detach() for name, parameter in palm.named_parameters()}


def gradients(palm, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*palm.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_at_the_start_every_pair_costs_ln_2_or_for_ipo_a_quarter_over_beta_squared(palm_of, beta):
    pairs = pairs_of(8)
    for loss, expected in (("sigmoid", math.log(2)), ("ipo", 1 / (4 * beta**2))):
        config = config_of(loss=loss, beta=beta)
        trainer = PreferenceTrainer(palm_of(), train_data=pairs, reference=palm_of(), config=config)
        assert [trainer.evaluate([pair])["loss"] for pair in pairs] == pytest.approx([expected] * 8, rel=1e-5)
        assert next(trainer.steps())["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "objective, factor",
    [(OBJECTIVES[0], -0.5 / 2), (OBJECTIVES[1], -0.5 / 2 * (1 - 2 * 0.1)), (OBJECTIVES[2], -1 / 0.5)],
    ids=["sigmoid", "smoothed", "ipo"],
)
def test_the_first_step_follows_the_difference_of_log_probabilities_however_it_is_batched(palm_of, objective, factor):
    pairs, palm = pairs_of(8), palm_of()

    def by_definition(**options):
        per = lengths_of(pairs) if objective["loss"] == "ipo" else 1
        chosen, rejected = pair_logprobs(palm, pairs, **options) / per
        return gradients(palm, factor * (chosen - rejected).mean())

    expected = by_definition()
    for batch_size, grad_accum in ((8, 1), (4, 2), (2, 4), (1, 8)):
        config = config_of(batch_size=batch_size, grad_accum=grad_accum, **GRADIENT_DESCENT, **objective)
        metrics, followed = first_step(palm_of(), pairs, config)
        assert distance(followed, expected) < 1e-6
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    if objective["loss"] == "ipo":  # elsewhere the prompt is in both sums
        assert distance(followed, by_definition(with_prompt=True)) > 1e-3


@pytest.mark.law("PreferenceConfig.loss", "PreferenceConfig.beta", "PreferenceConfig.label_smoothing")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["sigmoid", "smoothed", "ipo"])
def test_means_are_those_of_the_definition_and_of_no_mutant(palm_of, objective):
    pairs, held_out, start = pairs_of(16), pairs_of(9, seed=1), palm_of()
    config = config_of(num_epochs=3, **objective)
    trainer = PreferenceTrainer(palm_of(), train_data=pairs, valid_data=held_out, config=config)
    *_, last = trainer.steps()
    assert last["step"] == 6
    with torch.no_grad():
        now, then = pair_logprobs(trainer.palm.eval(), held_out), pair_logprobs(start.eval(), held_out)
        now_with_prompt, then_with_prompt = (
            pair_logprobs(palm, held_out, with_prompt=True) for palm in (trainer.palm, start)
        )
    means = trainer.evaluate()
    assert means == pytest.approx(means_by_definition(now, then, held_out, **objective), abs=1e-5)
    assert list(means) == MEANS

    aliased = means_by_definition(now, now, held_out, **objective)  # a reference that moves with the policy
    assert aliased["reward_margin"] == aliased["chosen_rewards"] == aliased["accuracy"] == 0
    assert abs(means["reward_margin"]) > 1e-2 and abs(means["chosen_rewards"]) > 1e-2 and means["accuracy"] > 0
    prompted = means_by_definition(now_with_prompt, then_with_prompt, held_out, **objective)
    assert abs(means["chosen_rewards"] - prompted["chosen_rewards"]) > 1e-2
    assert abs(means["chosen_logprobs"] - prompted["chosen_logprobs"]) > 1e-2


def test_the_means_of_a_step_are_those_before_its_update(palm_of):
    pairs = pairs_of(8)
    trainer = PreferenceTrainer(palm_of(), train_data=pairs, valid_data=pairs, config=config_of(num_epochs=3))
    for step in range(3):
        before = trainer.evaluate()
        metrics = next(trainer.steps())
        if step == 0:  # the policy is the reference, and rounding decides which answer of a pair has the edge
            assert before.pop("reward_margin") == pytest.approx(0, abs=1e-6) and before.pop("accuracy") < 1
        assert {key: metrics[key] for key in before} == pytest.approx(before, abs=1e-5)
        assert set(MEANS) <= set(metrics)
        assert metrics["epoch"] == step + 1


def test_pads_and_batch_mates_do_not_matter(palm_of):
    pairs = pairs_of(10)
    trainer = PreferenceTrainer(palm_of(), train_data=pairs, reference=palm_of(), config=config_of(num_epochs=3))
    list(trainer.steps())
    together = trainer.evaluate(pairs)
    alone = [trainer.evaluate([pair]) for pair in pairs]
    for key in MEANS:
        assert together[key] == pytest.approx(np.mean([means[key] for means in alone]), abs=1e-5)
    assert len({round(means["chosen_rewards"], 3) for means in alone}) == 10


def test_the_reference_never_changes(palm_of):
    pairs, reference = pairs_of(16), palm_of(dropout=0.5)
    with torch.no_grad():
        reference.norm.weight.mul_(1.5)  # another model than the one that training starts from
    reference.train()
    before = copy.deepcopy(reference.state_dict())
    trainer = PreferenceTrainer(palm_of(), train_data=pairs, reference=reference, config=config_of(num_epochs=2))
    expected = pair_logprobs(copy.deepcopy(reference).eval(), pairs).detach()
    assert trainer.evaluate(pairs)["chosen_rewards"] != pytest.approx(0, abs=1e-2)
    assert len(list(trainer.steps())) == 4
    torch.testing.assert_close(trainer.ref_logprobs["train"], expected, rtol=0, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in reference.parameters())
    assert all(module.training for module in reference.modules())
    assert reference.dropout.p == 0.5


@pytest.mark.parametrize("lora_r, given", [(0, False), (0, True), (4, False)])
def test_no_second_copy_of_the_model_is_made(palms_alive, palm_of, lora_r, given):
    palm, reference = palm_of(), palm_of() if given else None
    alive, num_base = palms_alive(), sum(parameter.numel() for parameter in palm.parameters())
    config = config_of(lora_r=lora_r)
    trainer = PreferenceTrainer(palm, train_data=pairs_of(16), reference=reference, config=config)
    list(trainer.steps())
    assert palms_alive() == alive
    # per block of two heads of 8 over one of keys and values: queries, keys, values and output
    num_adapters = 2 * lora_r * ((16 + 16) + 2 * (16 + 8) + (16 + 16))
    assert sum(parameter.numel() for parameter in trainer.run.module.parameters()) == num_base + num_adapters
    kept = copy.deepcopy(palm)
    assert palms_alive() == alive + 1  # the count would have seen it
    del kept


def test_adapters_alone_are_trained_and_without_them_the_base_is_the_reference(palm_of):
    pairs, held_out, palm = pairs_of(16), pairs_of(9, seed=1), palm_of()
    base = {name: parameter.detach().clone() for name, parameter in palm.named_parameters()}
    config = config_of(lora_r=4, lora_alpha=8, num_epochs=3)
    trainer = PreferenceTrainer(palm, train_data=pairs, config=config)
    metrics = list(trainer.steps())
    assert metrics[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert metrics[-1]["loss"] < math.log(2)
    assert all(torch.equal(value, dict(palm.named_parameters())[name]) for name, value in base.items())
    assert all(dict(palm.named_parameters())[name].grad is None for name in base)
    assert palm.finetune_modules["policy"][0].q.scale == 2
    with torch.no_grad():
        now, then = (pair_logprobs(palm.eval(), held_out, scope=scope) for scope in ("policy", None))
    expected = means_by_definition(now, then, held_out, loss="sigmoid", beta=0.1)
    assert trainer.evaluate(held_out) == pytest.approx(expected, abs=1e-5)
    assert abs(expected["reward_margin"]) > 1e-3


def test_adapters_start_the_same_for_a_seed(palm_of):
    def adapter(seed):
        torch.manual_seed(seed + 10)
        palm = palm_of()
        torch.rand(seed + 1)
        PreferenceTrainer(palm, train_data=pairs_of(4), config=config_of(lora_r=4, seed=seed // 2))
        return palm.finetune_modules["policy"][0].q.A

    first, same, other = (adapter(seed) for seed in (0, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_large_vocabularies_are_worked_in_chunks_to_the_same_gradient(palm_of, monkeypatch):
    """The logits of the vocabulary are then never held for the backward."""
    pairs, held = pairs_of(8), []

    def step():
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.shape[-1:]) or t, lambda t: t):
            return first_step(palm_of(num_tokens=70), pairs, config_of())

    metrics, moved = step()
    assert (70,) in held
    monkeypatch.setattr("palm_rlhf.ops.logprobs.CHUNK", 200)
    metrics_in_chunks, moved_in_chunks = step()
    assert (70,) not in held
    for name in MEANS:
        assert metrics_in_chunks[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5)
    assert distance(moved_in_chunks, moved) < 1e-4


def test_dropout_is_off(palm_of):
    def run(**fields):
        trainer = PreferenceTrainer(palm_of(**fields), train_data=pairs_of(16), config=config_of(num_epochs=2))
        return [{key: metrics[key] for key in MEANS} for metrics in trainer.steps()]

    assert run(dropout=0.5) == run()


def rule(count: int, seed: int) -> list[Preference]:
    """Chosen are responses that count on from the prompt's last token; rejected are any others."""
    generator = np.random.default_rng(seed)
    pairs = []
    while len(pairs) < count:
        prompt, rejected = (torch.from_numpy(generator.integers(0, NUM_TOKENS, size)) for size in (4, 3))
        prompt = prompt[generator.integers(4) :]
        chosen = (prompt[-1] + torch.arange(1, 4)) % NUM_TOKENS
        pairs += [] if torch.equal(chosen, rejected) else [Preference(prompt, chosen, rejected)]
    return pairs


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["sigmoid", "smoothed", "ipo"])
def test_a_rule_is_learnt_from_pairs(palm_of, objective, seed):
    config = config_of(batch_size=16, num_epochs=4, seed=seed, **objective)
    trainer = PreferenceTrainer(palm_of(), train_data=rule(256, seed), valid_data=rule(100, seed + 7), config=config)
    assert trainer.evaluate()["accuracy"] < 0.75
    list(trainer.steps())
    means = trainer.evaluate()
    assert means["accuracy"] > 0.9
    assert means["reward_margin"] > 0.1


@pytest.mark.law("PreferenceConfig.max_seq_len")
def test_long_pairs_lose_the_left_of_their_prompts_and_then_the_right_of_their_responses(palm_of):
    pairs = [*pairs_of(7), Preference(torch.tensor([1, 2]), torch.arange(11), torch.arange(11).flip(0))]
    cut = [Preference(pair.prompt, pair.chosen[:8], pair.rejected[:8]) for pair in pairs]
    longest = [max(len(pair.chosen), len(pair.rejected)) for pair in cut]
    cut = [
        Preference(torch.tensor(pair.prompt.tolist()[-(9 - num) :]), pair.chosen, pair.rejected)
        for pair, num in zip(cut, longest, strict=True)
    ]
    assert sum(len(short.prompt) < len(pair.prompt) for short, pair in zip(cut, pairs, strict=True)) > 1
    long, short = (
        next(PreferenceTrainer(palm_of(), train_data=data, config=config_of(max_seq_len=limit)).steps())
        for data, limit in ((pairs, 9), (cut, 1024))
    )
    assert {key: long[key] for key in MEANS} == {key: short[key] for key in MEANS}


def test_the_schedule_sees_each_pair_so_often_and_the_rate_follows_it(palm_of):
    config = config_of(num_epochs=2, warmup_steps=2, learning_rate=0.01, min_lr_ratio=0.5)
    trainer = PreferenceTrainer(palm_of(), train_data=pairs_of(18), config=config)
    metrics = list(trainer.steps())
    assert len(metrics) == trainer.num_steps == 5  # of 8 pairs: 36, and 4 to fill up the last
    assert [m["epoch"] for m in metrics] == pytest.approx([step * 8 / 18 for step in range(1, 6)])
    rates = [m["learning_rate"] for m in metrics]
    assert rates[0] == pytest.approx(0.005)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] > 0.005


def test_metrics_are_logged_and_drawn(palm_of, tmp_path):
    config = config_of(num_epochs=2, eval_every=3, plot=True)
    trainer = PreferenceTrainer(
        palm_of(), train_data=pairs_of(16), valid_data=pairs_of(6, seed=1), config=config, output_dir=tmp_path
    )
    result = trainer.train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    own = {"step", "epoch", "learning_rate", "grad_norm", "tokens_per_second", "elapsed"}
    valid = {f"valid_{key}" for key in MEANS}
    assert [set(line) for line in lines] == [
        own | set(MEANS),
        own | set(MEANS),
        own | set(MEANS) | valid,
        own | set(MEANS),
        {"step"} | valid,
    ]
    assert lines[-1] == {"step": 4, **{f"valid_{key}": value for key, value in trainer.evaluate().items()}}
    assert result.items() >= lines[-1].items() - {("step", 4)}
    assert result["steps"] == 4
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def test_log_probabilities_in_chunks_are_those_of_an_output_layer_of_its_own(palm_of, monkeypatch):
    """Vocabularies of real models take the way in chunks."""
    monkeypatch.setattr("palm_rlhf.training.preference_learner.chunks_are_faster", lambda *_: True)
    palm = palm_of(tie_embeddings=False).double()
    prompts, responses = [torch.arange(3), torch.arange(4, 6)], [torch.tensor([5, 1]), torch.tensor([7, 0, 2])]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        logprobs = palm(torch.cat((prompt, response))[None])[0].log_softmax(dim=-1)
        expected.append(sum(logprobs[len(prompt) - 1 + at, token] for at, token in enumerate(response)))
    got = ResponseLogprobs(palm, None)(join(prompts, responses))
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-10)
