"""Prompts that several rows share are read once where that pays: same numbers, same gradients, fewer tokens."""

from pathlib import Path

import pytest
import torch

from palm_rlhf.policy import shared_prompts as module
from palm_rlhf.policy.actor_critic import ActorCritic, Reference
from palm_rlhf.policy.sequences import join
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.trainer import RLHFTrainer
from tests.factories import SERIAL


@pytest.fixture
def always(monkeypatch):
    """Prompts are read once however few tokens that saves."""
    monkeypatch.setattr(module, "MIN_SAVED", 0)
    monkeypatch.setattr(module, "MAX_PART", 1.0)


@pytest.fixture
def rows(draw_rows):
    """Groups of one, two and three rows, mixed up, with prompts of several lengths."""
    prompts, responses = draw_rows(5, 9, 3), draw_rows(1, 4, 2, 7, 3, 5, seed=1)
    return join([prompts[index] for index in (0, 1, 0, 2, 1, 0)], responses)


@pytest.fixture
def count_tokens():
    """`count_tokens(palm)` is a list that grows by the tokens of each forward, pads included."""

    def count(palm) -> list[int]:
        counts = []
        palm.token_emb.register_forward_hook(lambda _, args, __: counts.append(args[0].numel()))
        return counts

    return count


def plainly(palm, sequences, scope=None):
    """Every row reads its prompt itself."""
    embeds = palm(sequences.tokens, key_mask=sequences.key_mask, return_only_embedding=True, finetune_scope=scope)
    return sequences.before_actions(embeds)


def require_the_plain_way(palm, sequences, names=vars(module), scope=None):  # noqa: B008 (not changed)
    """Embeddings and the gradients of all parameters, to 1e-10 in float64."""
    groups = names["find_groups"](sequences)
    count = torch.randn(*sequences.action_mask.shape, palm.config.dim, dtype=torch.float64)
    count = count * sequences.action_mask.unsqueeze(-1)
    parameters = [parameter for parameter in palm.parameters() if parameter.requires_grad]
    found = []
    for embeds in (names["_read_prompts_once"](palm, sequences, groups, scope), plainly(palm, sequences, scope)):
        gradients = torch.autograd.grad((count * embeds).sum(), parameters, allow_unused=True)
        found.append([embeds[sequences.action_mask], *(g for g in gradients if g is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    return groups


OPTIONS = [{}, {"kv_heads": 2, "qk_norm": True}, {"xpos": True}, {"flash_attn": False}, SERIAL]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_embeddings_and_gradients_are_those_of_rows_that_read_their_prompts_themselves(options, rows, wandering_palm):
    assert len(require_the_plain_way(wandering_palm(**options).double(), rows).first) == 3


def test_adapters_get_their_gradients(rows, wandering_palm, stir):
    palm = wandering_palm().double()
    stir(palm.add_finetune_params("actor", 2).parameters())
    require_the_plain_way(palm, rows, scope="actor")


@pytest.mark.parametrize("responses", [(1, 1, 1), (2, 2, 1)], ids=str)
def test_short_responses(responses, draw_rows, wandering_palm):
    (prompt,) = draw_rows(6)
    palm, sequences = wandering_palm().double(), join([prompt] * 3, draw_rows(*responses))
    require_the_plain_way(palm, sequences)
    with torch.no_grad():
        torch.testing.assert_close(
            module._read_prompts_once(palm, sequences, module.find_groups(sequences), None)[:, :1],
            plainly(palm, sequences)[:, :1],
            rtol=0,
            atol=1e-10,
        )


def test_an_environments_tokens_are_read(draw_rows, wandering_palm):
    (prompt,), responses = draw_rows(6), draw_rows(5, 4, seed=1)
    masks = [torch.tensor([True, False, False, True, True]), torch.tensor([True, True, False, True])]
    require_the_plain_way(wandering_palm().double(), join([prompt] * 2, responses, masks))


MUTANTS = {
    "rows go on from other prompts": ("cache.select(groups.of_row)", "cache.select(groups.of_row.flip(0))"),
    "the first action follows another prompt": ("[groups.of_row, -1:]", "[groups.of_row.flip(0), -1:]"),
    "pads are read": ("PromptCache(palm.config.depth, left_padding)", "PromptCache(palm.config.depth, 0 * lengths)"),
    "the prompts bring no gradient": ("embeds = torch.cat((embeds,", "embeds = torch.cat((embeds.detach(),"),
    "padded on the right": ("- left_padding.unsqueeze(-1)", "- 0 * left_padding.unsqueeze(-1)"),
    "lengths do not tell prompts apart": ("[groups.first]\n    left", ".flip(0)[groups.first]\n    left"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant, rows, wandering_palm):
    old, new = MUTANTS[mutant]
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    names = {"__name__": "palm_rlhf.policy.mutant", "__package__": "palm_rlhf.policy"}
    exec(source.replace(old, new), names)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        require_the_plain_way(wandering_palm().double(), rows, names)


def test_groups_by_hand():
    prompts = [torch.tensor(ids) for ids in ([1, 2], [1, 2, 0], [1, 2], [0, 1, 2], [1, 2, 0])]
    groups = module.find_groups(join(prompts, [torch.tensor([0, 0])] * 5))
    same = groups.of_row.unsqueeze(0) == groups.of_row.unsqueeze(1)
    assert same.nonzero().tolist() == [[0, 0], [0, 2], [1, 1], [1, 4], [2, 0], [2, 2], [3, 3], [4, 1], [4, 4]]
    assert sorted(groups.first.tolist()) == [0, 1, 3]


@pytest.mark.parametrize(
    ("prompt", "response", "samples", "once"),
    [
        (300, 60, 8, True),
        (300, 5, 2, False),
        (2000, 5, 2, True),
        (100, 400, 8, False),
        (2000, 5, 1, False),
        (1022, 5, 2, True),  # which saves 1024
        (1021, 5, 2, False),
    ],
)
def test_prompts_are_read_once_where_that_saves_a_quarter_and_1024_tokens(
    prompt, response, samples, once, wandering_palm, count_tokens
):
    palm = wandering_palm(depth=1)
    counts = count_tokens(palm)
    sequences = join([torch.arange(prompt) % 13] * samples, [torch.arange(response) % 13] * samples)
    with torch.no_grad():
        module.embeds_before_actions(palm, sequences)
    plain = samples * (prompt + response)
    assert counts == ([prompt, samples * (response - 1)] if once else [plain])
    saved = plain - prompt - samples * (response - 1)
    assert once == (saved >= 1024 and plain - saved <= 0.75 * plain)


@pytest.mark.parametrize("why", ["bfloat16", "autocast", "checkpointing", "dropout", "shards"])
def test_where_two_passes_would_not_do_there_is_one(why, rows, wandering_palm, count_tokens, always):
    options = {"checkpointing": {"gradient_checkpointing": True}, "dropout": {"dropout": 0.1}}.get(why, {})
    palm = wandering_palm(**options).train()
    if why == "bfloat16":
        palm = palm.bfloat16()
    if why == "shards":
        for layer in palm.layers:
            weight = layer.in_proj.weight
            layer.in_proj.weight = type("Shard", (torch.nn.Parameter,), {})(weight.data)
    counts = count_tokens(palm)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        module.embeds_before_actions(palm, rows)
    assert counts == [rows.tokens.numel()]
    counts.clear()
    module.embeds_before_actions(wandering_palm().eval(), rows)
    control = wandering_palm()
    seen = count_tokens(control)
    module.embeds_before_actions(control, rows)
    assert seen == [3 * 9, 6 * 6]


def test_policy_critic_and_reference_share_prompts(rows, wandering_palm, count_tokens, always):
    model = ActorCritic(wandering_palm(), wandering_palm())
    reference = Reference(model)
    counts = [count_tokens(palm) for palm in (model.palm, model.critic, reference.palm)]
    model(rows)
    reference.logprobs(rows)
    assert counts == [[3 * 9, 6 * 6]] * 3


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_step_learns_the_same_from_fewer_tokens(algorithm, monkeypatch, wandering_palm, count_tokens):
    prompts = [(torch.arange(40) * step) % 13 for step in (1, 2)]
    sizes = {"rollouts_per_step": 8, "num_samples": 4, "minibatch_size": 8, "max_new_tokens": 6, "epochs": 1}
    config = PPOConfig(algorithm=algorithm, num_steps=1, kl_coef=0.1, learning_rate=1e-3, **sizes)
    found, read = [], []
    for least in (0, 10**9):
        monkeypatch.setattr(module, "MIN_SAVED", least)
        palm = wandering_palm()
        trainer = RLHFTrainer(
            palm=palm,
            reward_model=lambda prompts, replies: [float(reply[0]) for reply in replies],
            prompt_token_ids=prompts,
            config=config,
        )
        rollout = trainer.collect()
        counts = count_tokens(palm)
        experience = trainer.estimate_advantages(rollout, trainer.score(rollout))
        metrics = trainer.update(experience)
        read.append(sum(counts))
        found.append([experience.ref_logprobs, *(torch.tensor(metrics[name]) for name in ("policy_loss", "grad_norm"))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert read == [2 * 40 + 8 * 5, 8 * 46]
