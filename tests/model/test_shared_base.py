"""Several PaLMs over one base: the same numbers as copies, and no change of the base behind the back of another."""

import copy

import pytest
import torch

from palm_rlhf.model.shared_base import adopt_base, copy_over_base, have_one_base, is_shared, palm_over_base
from palm_rlhf.model.token_ids import resize_token_embeddings
from tests.factories import palm_of

SERIAL = {"block": "serial", "norm": "rms", "qkv_bias": True, "tie_embeddings": False}
TOKENS = torch.tensor([[1, 2, 3, 4]])


def with_scope(palm, scope: str, seed: int = 1):
    torch.manual_seed(seed)
    for adapter in palm.add_finetune_params(scope, r=2).parameters():
        adapter.data.normal_(std=0.3)
    return palm


@pytest.mark.parametrize("fields", [{}, SERIAL], ids=["parallel", "serial"])
def test_a_palm_over_the_base_of_another_has_adapters_alone(fields):
    palm = with_scope(palm_of(**fields), "actor")
    view = with_scope(palm_over_base(palm), "reward", seed=2)
    assert list(palm.finetune_modules) == ["actor"] and list(view.finetune_modules) == ["reward"]
    base = {name: parameter for name, parameter in palm.named_parameters() if "finetune" not in name}
    theirs = dict(view.named_parameters())
    assert base and all(theirs[name] is parameter for name, parameter in base.items())
    assert not any(parameter.requires_grad for parameter in base.values())
    separate = with_scope(palm_of(**fields), "reward", seed=2)
    assert torch.equal(view(TOKENS, finetune_scope="reward"), separate(TOKENS, finetune_scope="reward"))
    assert torch.equal(view(TOKENS), palm(TOKENS))
    assert not torch.equal(palm(TOKENS, finetune_scope="actor"), palm(TOKENS))


def test_a_copy_over_the_base_has_adapters_of_its_own():
    palm = palm_of()
    view = palm_over_base(palm)
    assert not any(parameter.requires_grad for parameter in palm.parameters())  # frozen before there is an adapter
    copied = copy_over_base(with_scope(view, "reward"), view)
    assert have_one_base(copied, palm) and have_one_base(copied, view)
    pairs = list(zip(copied.finetune_parameters("reward"), view.finetune_parameters("reward"), strict=True))
    assert all(one is not other and torch.equal(one, other) for one, other in pairs)


def test_a_deep_copy_has_a_base_of_its_own():
    palm = palm_of()
    view = with_scope(palm_over_base(palm), "reward")
    copied = copy.deepcopy(view)
    assert is_shared(view) and is_shared(palm) and not is_shared(copied)
    copied.merge_finetune_params("reward")
    assert torch.equal(view(TOKENS), palm_of()(TOKENS)) and not torch.equal(copied(TOKENS), palm_of()(TOKENS))


@pytest.mark.parametrize("fields", [{}, SERIAL], ids=["parallel", "serial"])
def test_a_base_below_the_adapters_of_another_does_not_change(fields, tmp_path):
    palm = with_scope(palm_of(**fields), "actor")
    other = palm_of(1, **fields)
    other.save_pretrained(tmp_path)
    view = with_scope(palm_over_base(palm), "reward", seed=2)
    before = view(TOKENS, finetune_scope="reward")
    changes = {
        "merge_finetune_params('actor')": lambda: palm.merge_finetune_params("actor"),
        "merge_finetune_params('reward')": lambda: view.merge_finetune_params("reward"),
        "resize_token_embeddings": lambda: resize_token_embeddings(palm, 16),
        "load": lambda: palm.load(tmp_path),
    }
    for named, change in changes.items():
        with pytest.raises(ValueError, match=r"1 other models hold.*LoRA scopes.*copy\.deepcopy") as error:
            change()
        assert named in str(error.value)
    palm.remove_finetune_params("actor")
    assert not any(parameter.requires_grad for parameter in palm.parameters())
    assert torch.equal(view(TOKENS, finetune_scope="reward"), before)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("who", ["palm", "view", "a module around it"])
def test_a_cast_of_a_shared_base_is_refused_and_a_move_is_not(cast, who):
    palm = with_scope(palm_of(), "actor")
    view = with_scope(palm_over_base(palm), "reward", seed=2)
    before = view(TOKENS, finetune_scope="reward")
    module = {"palm": palm, "view": view, "a module around it": torch.nn.ModuleList([palm])}[who]
    with pytest.raises(ValueError, match=rf"got a cast to {cast} of a base that 1 other models.*copy\.deepcopy"):
        module.to(cast)
    module.to("cpu", torch.float32)
    assert torch.equal(view(TOKENS, finetune_scope="reward"), before)
    assert {tensor.dtype for tensor in [*palm.parameters(), *view.parameters()]} == {torch.float32}
    del palm, module
    assert who != "view" or view.to(cast).dtype == cast


@pytest.mark.parametrize("fields", [{}, SERIAL], ids=["parallel", "serial"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_another_base_is_refused_and_adapters_load(fields, assign):
    palm = with_scope(palm_of(**fields), "actor")
    view = with_scope(palm_over_base(palm), "reward", seed=2)
    before = view(TOKENS, finetune_scope="reward")
    other = with_scope(palm_of(**fields), "actor", seed=3)
    for name, change in (("layers.1.ff_out.weight", lambda t: t + 1e-3), ("norm.weight", lambda t: t[:1])):
        state = other.state_dict()
        state |= {name: change(state[name])}
        for module, prefix in ((palm, ""), (torch.nn.ModuleDict({"palm": palm}), "palm.")):
            with pytest.raises(ValueError, match=rf"load_state_dict with another {name} on a base that 1 other"):
                module.load_state_dict({prefix + key: tensor for key, tensor in state.items()}, assign=assign)
    assert torch.equal(view(TOKENS, finetune_scope="reward"), before)
    palm.load_state_dict(other.state_dict(), assign=assign)  # the same base, and other adapters
    assert torch.equal(palm(TOKENS, finetune_scope="actor"), other(TOKENS, finetune_scope="actor"))
    assert torch.equal(view(TOKENS, finetune_scope="reward"), before)


def test_when_the_others_are_gone_the_base_is_free_again():
    palm = with_scope(palm_of(), "actor")
    expected = palm(TOKENS, finetune_scope="actor")
    view = palm_over_base(palm)
    cycle = [view]
    cycle.append(cycle)
    del view, cycle
    palm.merge_finetune_params("actor")
    torch.testing.assert_close(palm(TOKENS), expected, rtol=0, atol=1e-5)
    assert all(parameter.requires_grad for parameter in palm.parameters())


def test_a_palm_can_adopt_a_base_and_lets_its_own_go():
    palm, other = palm_of(), with_scope(palm_of(1), "reward")
    adopt_base(other, palm)
    assert have_one_base(other, palm) and torch.equal(other(TOKENS), palm_of()(TOKENS))
    with pytest.raises(ValueError, match="merge"):
        other.merge_finetune_params("reward")
