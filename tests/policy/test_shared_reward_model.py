"""A reward model over the base of a policy: the numbers of one with a base of its own, in memory and in folders."""

import pytest
import torch
from safetensors.torch import load_file

from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.shared_base import have_one_base
from palm_rlhf.policy.actor_critic import ActorCritic
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import join

SERIAL = {"block": "serial", "norm": "rms", "tie_embeddings": False, "kv_heads": 2}
KINDS = pytest.mark.parametrize("fields", [{}, SERIAL], ids=["parallel", "serial"])
LORA = {"use_lora": True, "lora_r": 2}


@pytest.fixture
def rows(draw_rows):
    return join(draw_rows(3, 1, 6), draw_rows(2, 5, 1, seed=1))


@pytest.fixture
def make(wandering_palm, stir):
    """`make(palm, share_base=True)` always has the same adapters, head, embeddings and normalisation."""

    def make(palm: PaLM | None = None, **options) -> RewardModel:
        torch.manual_seed(0)
        model = RewardModel(wandering_palm() if palm is None else palm, **{**LORA, **options})
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        stir(own)
        model.normalise(torch.tensor([1.0, 2.0, 4.0]))
        return model

    return make


def grads(model: RewardModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@KINDS
@pytest.mark.parametrize("options", [{}, {"pooling": "mean"}, {"num_binned_output": 3}], ids=str)
def test_scores_and_gradients_are_those_of_a_base_of_its_own(make, wandering_palm, rows, fields, options):
    palm = wandering_palm(dropout=0.3, **fields)
    palm.add_finetune_params("actor", 2)
    for adapter in palm.finetune_parameters("actor"):
        adapter.data.normal_()
    shared, separate = make(palm, share_base=True, **options), make(wandering_palm(**fields), **options)
    for model in (shared, separate):
        model.train()
        scores = model(rows.tokens, rows.key_mask, prompt_mask=rows.prompt_mask)
        scores.square().sum().backward()
    assert torch.equal(shared.score(rows), separate.score(rows))
    found, expected = grads(shared), grads(separate)
    assert found.keys() == expected.keys() and len(found) >= 3 + 8 * 2
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(adapter.grad is None for adapter in palm.parameters() if adapter not in set(shared.parameters()))
    without = shared.score(rows)
    shared.lora_scope = None  # the mutant: scores of the base
    assert not torch.allclose(shared.score(rows), without, atol=1e-3)


@KINDS
def test_a_folder_is_that_of_a_base_of_its_own_and_opens_over_the_base(make, wandering_palm, rows, tmp_path, fields):
    palm = wandering_palm(**fields)
    shared, separate = make(palm, share_base=True), make(wandering_palm(**fields))
    palm.add_finetune_params("actor", 2)
    shared.save_pretrained(tmp_path / "shared"), separate.save_pretrained(tmp_path / "separate")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("shared", "separate"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("shared", "separate")]
    assert configs[0] == configs[1]

    alone = RewardModel.from_pretrained(tmp_path / "shared")
    policy = wandering_palm(**fields)
    opened = RewardModel.from_pretrained(tmp_path / "shared", base=policy)
    assert have_one_base(opened.palm, policy) and not policy.finetune_modules
    assert torch.equal(opened.score(rows), separate.score(rows)) and torch.equal(alone.score(rows), opened.score(rows))
    trained = {name for name, parameter in opened.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in separate.named_parameters() if parameter.requires_grad}


def test_a_base_in_bfloat16_is_compared_in_bfloat16(make, wandering_palm, tmp_path):
    make().save_pretrained(tmp_path)
    opened = RewardModel.from_pretrained(tmp_path, base=wandering_palm().bfloat16())
    assert {tensor.dtype for tensor in opened.parameters()} == {torch.bfloat16}
    assert opened.score_mean.dtype == torch.float32


def test_what_cannot_share_a_base_is_refused_by_name(make, wandering_palm, tmp_path):
    make().save_pretrained(tmp_path / "adapters")
    RewardModel(wandering_palm()).save_pretrained(tmp_path / "weights")
    other = wandering_palm()
    other.layers[1].ff_out.weight.data[0, 0] += 1e-3
    refused = [
        (tmp_path / "adapters", {"base": other}, r"another layers\.1\.ff_out\.weight than the base"),
        (tmp_path / "adapters", {"base": wandering_palm(num_tokens=14)}, "num_tokens=13 there and 14 here"),
        (tmp_path / "weights", {"base": wandering_palm()}, "no LoRA scope, so all its weights were trained"),
        (tmp_path / "adapters", {"base": wandering_palm(), "dtype": torch.bfloat16}, "expected base alone"),
    ]
    for folder, options, message in refused:
        with pytest.raises(ValueError, match=message):
            RewardModel.from_pretrained(folder, **options)
        assert all(parameter.requires_grad for parameter in options["base"].parameters())
    with pytest.raises(ValueError, match="share_base=True and use_lora=False"):
        RewardModel(wandering_palm(), share_base=True)


def test_loading_and_casting_leave_the_base_of_the_policy_alone(make, wandering_palm, rows, tmp_path):
    palm = wandering_palm()
    shared, before = make(palm, share_base=True), wandering_palm().state_dict()
    other = make(wandering_palm(seed=5))
    other.save_pretrained(tmp_path / "other base")
    RewardModel(wandering_palm()).save_pretrained(tmp_path / "weights")
    scores = shared.score(rows)
    with pytest.raises(ValueError, match="than the base that is to be shared"):
        shared.load(tmp_path / "other base")
    with pytest.raises(ValueError, match="no LoRA scope"):
        shared.load(tmp_path / "weights")
    with pytest.raises(ValueError, match="no LoRA scope for a reward model over a shared base"):
        shared.use_lora_scope(None)
    for cast in (lambda: shared.bfloat16(), lambda: shared.to(torch.float64), lambda: shared.half()):
        with pytest.raises(ValueError, match=r"a cast to .* of a base that 1 other models hold"):
            cast()
    assert all(torch.equal(tensor, before[name]) for name, tensor in palm.state_dict().items())
    assert torch.equal(shared.score(rows), scores)

    moved = make(wandering_palm())
    moved.head.weight.data += 1
    moved.save_pretrained(tmp_path / "moved head")
    shared.load(tmp_path / "moved head")
    assert torch.equal(shared.score(rows), moved.score(rows))
    assert shared.to("cpu") is shared
    del palm
    assert shared.bfloat16().palm.dtype == torch.bfloat16  # nobody else holds the base any more


def test_a_critic_over_the_base_has_adapters_of_its_own(make, wandering_palm, rows):
    palm = wandering_palm()
    reward_model = make(palm, share_base=True)
    torch.manual_seed(1)
    shared = ActorCritic(palm, reward_model, actor_lora_r=2, share_base=True)
    torch.manual_seed(1)
    separate = ActorCritic(wandering_palm(), make(wandering_palm()), actor_lora_r=2)
    assert torch.equal(shared(rows).values, separate(rows).values)
    assert have_one_base(shared.critic.palm, palm)
    ids = [{id(parameter) for parameter in part} for part in (shared.actor_parameters(), shared.critic_parameters())]
    of_reward = {id(parameter) for parameter in reward_model.parameters()}
    assert not ids[0] & ids[1] and not (ids[0] | ids[1]) & of_reward
    names = {name for name, parameter in shared.named_parameters() if parameter.requires_grad}
    assert names == {name for name, parameter in separate.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"actor_lora_r": 0, "critic_lora_r": 2}, "actor_lora_r=0"),
        ({"actor_lora_r": 2}, "expected critic_lora_r of 1 or more"),
        ({"actor_lora_r": 2, "value": "shared"}, "value='shared'"),
        ({"actor_lora_r": 2, "critic": "reward model"}, "RewardModel with a base of its own"),
        ({"actor_lora_r": 2, "critic": "palm"}, "PaLM with a base of its own"),
    ],
)
def test_a_critic_that_cannot_share_is_refused(make, wandering_palm, options, message):
    if (critic := options.get("critic")) is not None:
        options = {**options, "critic": make() if critic == "reward model" else wandering_palm()}
    with pytest.raises(ValueError, match=message):
        ActorCritic(wandering_palm(), share_base=True, **options)
