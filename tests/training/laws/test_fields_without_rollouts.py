"""The fields that one trainer has of its own, of those that learn from data: of language models, examples, choices."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

from palm_rlhf.training import LMConfig, PPOConfig, PreferenceConfig, RewardConfig, SupervisedConfig
from palm_rlhf.training.language_model import LanguageModelTrainer

from .trainers import SETTINGS, build, palm_of


@pytest.mark.law("LMConfig.seq_len")
def test_so_many_tokens_are_predicted_in_a_row():
    trainer = build(LMConfig, seq_len=5, eval_context=4)
    widths = []
    trainer.palm.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    next(trainer.steps())
    assert widths == [5 + 1]


WINDOWS = {  # of 20 tokens, in windows of 8 targets: where each token is read from, and which it predicts
    0: [(0, range(1, 9)), (8, range(9, 17)), (16, range(17, 20))],
    4: [(0, range(1, 9)), (5, range(9, 14)), (10, range(14, 19)), (15, range(19, 20))],
}


@pytest.mark.law("LMConfig.eval_context", "LMConfig.eval_tokens")
@pytest.mark.parametrize("context", WINDOWS)
def test_evaluations_give_each_token_its_context_and_read_so_many_tokens(context):
    """During the run the first 20 tokens of 30, at its end all of them."""
    data = np.random.default_rng(0).integers(0, 12, 30)
    config = LMConfig(**{**SETTINGS[LMConfig], "eval_context": context, "eval_tokens": 20, "eval_every": 1})
    trainer = LanguageModelTrainer(palm_of().double(), train_data=data, valid_data=data, config=config)
    measured = next(trainer.steps())["bits_per_byte"]
    palm, nats = trainer.palm.eval(), math.log(12)  # the first token, which nothing tells, is a uniform guess
    for start, targets in WINDOWS[context]:
        window = torch.from_numpy(data[start : targets.stop])
        with torch.no_grad():
            logprobs = palm(window[None])[0].log_softmax(dim=-1)
        nats -= sum(float(logprobs[target - 1 - start, data[target]]) for target in targets)
    assert measured == pytest.approx(nats / math.log(2) / 20, rel=1e-6)
    assert trainer.finish()["bits_per_byte"] == trainer.evaluate() != pytest.approx(measured, rel=1e-3)


@pytest.mark.law("SupervisedConfig.lora_r", "SupervisedConfig.lora_alpha")
@pytest.mark.law("PreferenceConfig.lora_r", "PreferenceConfig.lora_alpha")
@pytest.mark.parametrize("kind, scope", [(SupervisedConfig, "supervised"), (PreferenceConfig, "policy")])
def test_adapters_have_the_rank_and_the_weight_asked_for(kind, scope):
    """With A and B stirred, the queries are those of a base to which alpha / r times B A is added."""
    for alpha, weight in ((3.0, 3.0 / 2), (None, 1.0)):
        palm = palm_of()
        trainer = build(kind, palm=palm, lora_r=2, lora_alpha=alpha)
        (adapters,) = palm.finetune_modules[scope]
        assert adapters.q.A.shape == (16, 2) and adapters.q.B.shape[0] == 2
        moved = {name for name, p in trainer.run.module.named_parameters() if p.requires_grad}
        assert moved and all("finetune" in name for name in moved)
        with torch.no_grad():
            adapters.q.B.normal_()
            plain, added = palm_of(), (adapters.q.A @ adapters.q.B).T * weight
            plain.layers[0].in_proj.weight[: len(added)] += added
            tokens = torch.tensor([[1, 2, 3, 4]])
            got = palm.eval()(tokens, finetune_scope=scope)
            torch.testing.assert_close(got, plain.eval()(tokens), rtol=0, atol=1e-5)
    assert build(kind, lora_r=1).palm.finetune_modules[scope][0].q.A.shape == (16, 1)  # the lowest rank there is
    assert not build(kind).palm.finetune_modules


@pytest.mark.law("SupervisedConfig.lora_targets", "PreferenceConfig.lora_targets", "PPOConfig.lora_targets")
@pytest.mark.parametrize("targets", [("v", "ff_out"), ("all-linear",)], ids=lambda targets: targets[0])
@pytest.mark.parametrize(
    "kind, ranks",
    [
        (SupervisedConfig, {"lora_r": 2}),
        (PreferenceConfig, {"lora_r": 2}),
        (PPOConfig, {"actor_lora_r": 2, "critic_lora_r": 3}),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_adapters_are_on_the_matrices_asked_for(kind, ranks, targets):
    """The optimiser holds two matrices for each, and a step moves each of them."""
    trainer = build(kind, **ranks, lora_targets=targets)
    expected = {"q", "k", "v", "out", "gate", "value", "ff_out"} if len(targets) == 1 else set(targets)
    adapters = {name: p for name, p in trainer.run.module.named_parameters() if p.requires_grad and "finetune" in name}
    assert Counter(name.split(".")[-2] for name in adapters) == dict.fromkeys(expected, 2 * len(ranks))
    assert trainer.run.module.state_dict().keys() >= adapters.keys()
    before = {name: p.detach().clone() for name, p in adapters.items()}
    held = {id(p) for group in trainer.run.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in adapters.values()} <= held
    next(trainer.steps())
    for name in filter(re.compile(r"\.B$").search, adapters):  # which is 0 at first, and so is the gradient of A
        assert not torch.equal(adapters[name], before[name]), name


@pytest.mark.parametrize("kind, rank", [(SupervisedConfig, "lora_r"), (PreferenceConfig, "lora_r"), (PPOConfig, "a")])
def test_targets_without_adapters_are_refused(kind, rank):
    default = r"\('q', 'k', 'v', 'out'\)"
    with pytest.raises(ValueError, match=rf"lora_targets is \('v',\), expected {default}, without .*{rank}"):
        kind(lora_targets=("v",))
    for targets in ((), ("all-linear", "q")):
        with pytest.raises(ValueError, match=r"expected at least one, and all of them from .* or 'all-linear' alone"):
            kind(**{rank if rank == "lora_r" else "actor_lora_r": 2}, lora_targets=targets)


@pytest.mark.law("RewardConfig.eval_batch_size")
def test_an_evaluation_reads_so_many_responses_at_once():
    trainer = build(RewardConfig, valid=True, eval_batch_size=3)
    sizes = []
    trainer.reward_model.palm.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    trainer.evaluate()
    assert sizes == [3, 3, 2]  # of two responses to each of four prompts


def first_loss(trainer) -> float:
    """Of a step on all eight items."""
    return next(trainer.steps())["loss"]


@torch.no_grad()
def mean_logprobs(palm, pairs) -> list[tuple[float, float]]:
    """Of the chosen and of the rejected responses, a token's mean."""
    means = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            logprobs = palm(torch.cat((pair.prompt, response))[None, :-1])[0, len(pair.prompt) - 1 :].log_softmax(-1)
            means.append(float(logprobs.gather(-1, response[:, None]).mean()))
    return list(zip(means[::2], means[1::2], strict=True))


@pytest.mark.law("PreferenceConfig.desirable_weight", "PreferenceConfig.undesirable_weight")
def test_a_response_costs_half_of_its_weight_where_the_policy_is_the_reference():
    """KTO (Ethayarajh et al. 2024, equation 8), at a KL of 0; half of the eight responses are desirable."""
    whole = {"loss": "kto", "batch_size": 4, "grad_accum": 2}
    weights = {"desirable_weight": 3.0, "undesirable_weight": 0.5}
    assert first_loss(build(PreferenceConfig, **whole, **weights)) == pytest.approx((3 + 0.5) / 2 / 2, rel=1e-5)


@pytest.mark.law("PreferenceConfig.simpo_beta", "PreferenceConfig.simpo_gamma")
def test_simpo_is_that_of_its_paper():
    """Meng et al. 2024, equation 6."""
    whole = {"loss": "simpo", "batch_size": 4, "grad_accum": 2}
    trainer = build(PreferenceConfig, **whole, simpo_beta=1.5, simpo_gamma=0.7)
    margins = [1.5 * (chosen - rejected) - 0.7 for chosen, rejected in mean_logprobs(palm_of(), trainer.items["train"])]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / 8
    assert first_loss(trainer) == pytest.approx(expected, rel=1e-5)


@pytest.mark.law("PreferenceConfig.nll_coef")
def test_the_likelihood_of_the_chosen_counts_beside_the_loss():
    """DPO's is ln 2 where the policy is the reference."""
    trainer = build(PreferenceConfig, batch_size=4, grad_accum=2, nll_coef=0.3)
    nll = -sum(chosen for chosen, _ in mean_logprobs(palm_of(), trainer.items["train"])) / 8
    assert first_loss(trainer) == pytest.approx(math.log(2) + 0.3 * nll, rel=1e-5)
