"""LoRA scopes: nothing at the start, the low-rank sum when trained, the same when merged, and the base left alone."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from palm_rlhf.model.palm import PaLM


@st.composite
def models(draw) -> PaLM:
    """Small models of every kind of attention, in float64, so that equal means equal."""
    torch.manual_seed(draw(st.integers(0, 999)))
    kv_heads = draw(st.sampled_from([1, 2]))
    palm = PaLM(
        num_tokens=11,
        dim=draw(st.sampled_from([6, 12])),
        depth=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        dim_head=draw(st.sampled_from([2, 8])),
        kv_heads=kv_heads,
        ff_mult=2,
        xpos=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        causal=draw(st.booleans()),
    )
    return palm.double()


ranks = st.integers(1, 5)
alphas = st.sampled_from([None, 1, 3.5, 16])


def small_model(**options) -> PaLM:
    return PaLM(**{"num_tokens": 11, "dim": 12, "depth": 2, "heads": 4, "dim_head": 4, "kv_heads": 2, **options})


def tokens(rows: int = 3, device: torch.device | None = None) -> Tensor:
    return torch.randint(11, (rows, 7), generator=torch.Generator().manual_seed(1)).to(device)


@torch.no_grad()
def logits(palm: PaLM, scope: str | None = None, **options) -> Tensor:
    """Without gradients, so that frozen and trainable weights take the same way to the last bit."""
    return palm(tokens(device=palm.device), finetune_scope=scope, **options)


@torch.no_grad()
def trained(palm: PaLM, scope: str = "default") -> PaLM:
    """Any weights but those of the start, where half of them are zero."""
    for parameter in palm.finetune_parameters(scope):
        parameter.normal_(std=parameter.shape[0] ** -0.5)
    return palm


def by_hand(palm: PaLM, scope: str, scale: float) -> PaLM:
    """Hu et al. 2021, equation 3, written out: a copy without scopes whose weights are W + scale (A B)^T."""
    merged = copy.deepcopy(palm)
    q_dim = palm.config.heads * palm.config.dim_head
    kv_dim = palm.config.kv_heads * palm.config.dim_head
    with torch.no_grad():
        for layer, lora in zip(merged.layers, merged.finetune_modules[scope]):
            rows = layer.in_proj.weight
            rows[:q_dim] += scale * (lora.q.A @ lora.q.B).T
            rows[q_dim : q_dim + kv_dim] += scale * (lora.k.A @ lora.k.B).T
            rows[q_dim + kv_dim : q_dim + 2 * kv_dim] += scale * (lora.v.A @ lora.v.B).T
            layer.attn_out.weight += scale * (lora.out.A @ lora.out.B).T
    for name in list(merged.finetune_modules):
        merged.remove_finetune_params(name)
    return merged


@settings(max_examples=25)
@given(models(), ranks, alphas)
def test_a_new_scope_changes_nothing(palm, r, alpha):
    before = logits(palm)
    palm.add_finetune_params("default", r, alpha=alpha)
    assert torch.equal(logits(palm, "default"), before)
    assert torch.equal(logits(palm), before)


@settings(max_examples=25)
@given(models(), ranks, alphas)
def test_a_scope_adds_its_low_rank_product_to_the_weights(palm, r, alpha):
    palm.add_finetune_params("default", r, alpha=alpha)
    adapted = logits(trained(palm), "default")
    scale = (r if alpha is None else alpha) / r
    torch.testing.assert_close(adapted, logits(by_hand(palm, "default", scale)), rtol=0, atol=1e-10)
    # a mutant that forgets the scale, or uses another, is seen
    assert not torch.allclose(adapted, logits(by_hand(palm, "default", 2 * scale)), rtol=0, atol=1e-4)
    assert torch.equal(logits(palm), logits(palm, "default", disable_lora=True))


@settings(max_examples=25)
@given(models(), ranks, alphas)
def test_merged_equals_unmerged(device, palm, r, alpha):
    palm.to(device).add_finetune_params("default", r, alpha=alpha)
    base, adapted = logits(trained(palm)), logits(palm, "default")
    assert not torch.allclose(adapted, base, rtol=0, atol=1e-4)
    palm.merge_finetune_params("default")
    torch.testing.assert_close(logits(palm), adapted, rtol=0, atol=1e-10)
    assert not palm.finetune_modules
    assert all(parameter.requires_grad for parameter in palm.parameters())


@pytest.mark.parametrize("moved", ["q", "k", "v", "out"])
def test_no_adapter_is_left_out_of_the_merge(moved):
    """Each of the four alone changes the model, and merges into the same change."""
    palm = small_model().double()
    palm.add_finetune_params("default", 2)
    base = logits(palm)
    for lora in palm.finetune_modules["default"]:
        torch.nn.init.normal_(getattr(lora, moved).B)
    adapted = logits(palm, "default")
    assert not torch.allclose(adapted, base, rtol=0, atol=1e-4)
    palm.merge_finetune_params("default")
    torch.testing.assert_close(logits(palm), adapted, rtol=0, atol=1e-10)


@settings(max_examples=25)
@given(models(), ranks, st.booleans())
def test_with_a_scope_trained_no_base_parameter_gets_a_gradient(palm, r, recompute):
    if recompute:
        palm = PaLM.from_config(dataclasses.replace(palm.config, gradient_checkpointing=True)).double()
    palm.add_finetune_params("default", r)
    palm(tokens(), return_loss=True, finetune_scope="default").backward()
    assert all(lora.q.B.grad.any() and lora.out.B.grad.any() for lora in palm.finetune_modules["default"])
    trained(palm)(tokens(), return_loss=True, finetune_scope="default").backward()
    assert palm.palm_parameters()
    assert not any(parameter.requires_grad for parameter in palm.palm_parameters())
    assert all(parameter.grad is None for parameter in palm.palm_parameters())
    assert all(parameter.grad.any() for parameter in palm.finetune_parameters())


def test_train_base_leaves_the_base_trainable():
    palm = small_model()
    palm.add_finetune_params("default", 2, train_base=True)
    trained(palm)(tokens(), return_loss=True, finetune_scope="default").backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in palm.parameters())


def test_removing_restores():
    palm = small_model()
    before, names = logits(palm), set(palm.state_dict())
    adapters = palm.add_finetune_params("default", 2)
    trained(palm)
    assert palm.remove_finetune_params("default") is adapters
    assert torch.equal(logits(palm), before)
    assert set(palm.state_dict()) == names
    assert all(parameter.requires_grad for parameter in palm.parameters())


def test_two_scopes_do_not_disturb_each_other():
    palm = small_model().double()
    for scope in ("one", "two"):
        palm.add_finetune_params(scope, 2, alpha=4)
        trained(palm, scope)
    base, one, two = (logits(palm, scope) for scope in (None, "one", "two"))
    assert not torch.allclose(one, two, rtol=0, atol=1e-4)

    optimizer = torch.optim.AdamW(palm.parameters(), lr=0.1)
    palm(tokens(), return_loss=True, finetune_scope="one").backward()
    assert all(parameter.grad is None for parameter in palm.finetune_parameters("two"))
    optimizer.step()
    assert not torch.equal(logits(palm, "one"), one)
    assert torch.equal(logits(palm, "two"), two)
    assert torch.equal(logits(palm), base)

    palm.remove_finetune_params("one")
    assert not any(parameter.requires_grad for parameter in palm.palm_parameters())  # "two" is still there
    assert torch.equal(logits(palm, "two"), two)
    palm.merge_finetune_params("two")
    torch.testing.assert_close(logits(palm), two, rtol=0, atol=1e-10)


def test_after_one_scope_is_merged_the_other_adds_to_the_merged_weights():
    palm = small_model().double()
    for scope in ("one", "two"):
        palm.add_finetune_params(scope, 2)
        trained(palm, scope)
    both = by_hand(palm, "two", 1.0)
    both.finetune_modules["one"] = palm.finetune_modules["one"]
    palm.merge_finetune_params("one")
    torch.testing.assert_close(logits(palm, "two"), logits(by_hand(both, "one", 1.0)), rtol=0, atol=1e-10)


def test_generation_under_a_scope_is_that_of_the_merged_model():
    palm = small_model()
    palm.add_finetune_params("default", 3)
    trained(palm)
    prompt = tokens()
    greedy = {"max_new_tokens": 12, "temperature": 0.0}
    base, adapted = (
        palm.generate(None, prompt, **greedy),
        palm.generate(None, prompt, finetune_scope="default", **greedy),
    )
    streamed = torch.stack(list(palm.stream(prompt, finetune_scope="default", **greedy)), dim=-1)
    palm.merge_finetune_params("default")
    assert not torch.equal(base, adapted)
    assert torch.equal(adapted, streamed)
    assert torch.equal(adapted, palm.generate(None, prompt, **greedy))


def test_merging_after_training():
    palm = small_model().double()
    palm.add_finetune_params("default", 2, alpha=3)
    optimizer = torch.optim.AdamW(palm.finetune_parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(palm(tokens(), return_loss=True, finetune_scope="default"))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01
    stale = palm(tokens(), return_loss=True, finetune_scope="default")
    adapted = logits(palm, "default")
    palm.merge_finetune_params("default")
    torch.testing.assert_close(logits(palm), adapted, rtol=0, atol=1e-10)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()  # the weights that it was computed from are gone: refused, not wrong

    palm(tokens(), return_loss=True).backward()  # and the merged model trains on
    assert all(parameter.is_leaf and parameter.grad.any() for parameter in palm.parameters())


def test_in_bfloat16_merging_rounds_once():
    palm = small_model(dim=64).bfloat16()
    adapters = palm.add_finetune_params("default", 3, alpha=2)
    assert {parameter.dtype for parameter in adapters.parameters()} == {torch.bfloat16}
    trained(palm)
    adapted = logits(palm, "default")
    before, lora = palm.layers[0].attn_out.weight.float(), adapters[0].out
    delta = (lora.A.float() @ lora.B.float()).T * 2 / 3
    once, twice = (before + delta).bfloat16(), (before + delta.bfloat16().float()).bfloat16()
    palm.merge_finetune_params("default")
    assert palm.dtype == torch.bfloat16
    assert torch.equal(palm.layers[0].attn_out.weight, once)
    assert not torch.equal(once, twice)
    torch.testing.assert_close(logits(palm), adapted, rtol=0.1, atol=0.1)


@settings(max_examples=15)
@given(models(), ranks, alphas, st.booleans())
def test_scopes_are_saved_and_loaded_with_the_model(tmp_path_factory, palm, r, alpha, train_base):
    folder = tmp_path_factory.mktemp("palm")
    palm.add_finetune_params("one", r, alpha=alpha)
    palm.add_finetune_params("two", 2, train_base=train_base)
    trained(trained(palm, "one"), "two").save_pretrained(folder)
    loaded = PaLM.from_pretrained(folder)
    for scope in (None, "one", "two"):
        assert torch.equal(logits(loaded, scope), logits(palm, scope))
    trainable = {name: parameter.requires_grad for name, parameter in palm.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == trainable
    palm.merge_finetune_params("one")
    loaded.merge_finetune_params("one")
    assert torch.equal(logits(loaded), logits(palm))


@pytest.mark.parametrize(
    "act",
    [
        lambda palm: palm(tokens(), finetune_scope="other"),
        lambda palm: palm.generate(9, tokens(), finetune_scope="other"),
        lambda palm: palm.remove_finetune_params("other"),
        lambda palm: palm.merge_finetune_params("other"),
        lambda palm: palm.finetune_parameters("other"),
    ],
)
def test_an_unknown_scope_is_refused_by_name(act):
    palm = small_model()
    palm.add_finetune_params("default", 2)
    with pytest.raises(ValueError, match=r"'other'.*\['default'\].*add it first"):
        act(palm)


@pytest.mark.parametrize(
    "scope, r, message",
    [
        ("default", 2, "there already; remove or merge it"),
        ("a.b", 2, "without dots"),
        ("", 2, "cannot name a module"),
        ("keys", 2, "cannot name a module"),
        ("new", 0, "rank r is 0; expected at least 1"),
        ("new", -1, "rank r is -1; expected at least 1"),
    ],
)
def test_a_scope_that_cannot_be_added_is_refused(scope, r, message):
    palm = small_model()
    palm.add_finetune_params("default", 2, train_base=True)
    with pytest.raises(ValueError, match=message):
        palm.add_finetune_params(scope, r)
    assert list(palm.finetune_modules) == ["default"]
    assert all(parameter.requires_grad for parameter in palm.parameters())
