"""Checkpoints of the PyPI package palm-rlhf-pytorch: its model and ours compute the same logits from them."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from palm_rlhf.model.palm import PaLM

theirs = pytest.importorskip("palm_rlhf_pytorch", reason="needs the bench extra: palm-rlhf-pytorch is not installed")

NUM_TOKENS = 31
sizes = st.fixed_dictionaries(
    {
        "dim": st.sampled_from([12, 32]),
        "depth": st.integers(1, 3),
        "heads": st.integers(1, 4),
        "dim_head": st.sampled_from([2, 8]),
        "ff_mult": st.integers(1, 4),
        "causal": st.booleans(),
    }
)
SMALL = {"dim": 32, "depth": 2, "heads": 4, "dim_head": 8, "ff_mult": 2}


@torch.no_grad()
def their_palm(seed: int = 0, **options) -> nn.Module:
    """A model of that package with weights of which none is like another: its norms store their scale less 1."""
    model = theirs.PaLM(num_tokens=NUM_TOKENS, **{**SMALL, **options})
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 0.3 if "gamma" in name or "emb" in name else parameter.shape[-1] ** -0.5
        parameter.normal_(0, std, generator=generator)
    return model.eval()


def tokens(seed: int = 0, length: int = 40) -> Tensor:
    return torch.randint(NUM_TOKENS, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same_logits(palm: PaLM, model: nn.Module, scope: str | None = None) -> None:
    expected = model(tokens(), finetune_scope=scope)
    assert 0.3 < expected.std() < 10
    torch.testing.assert_close(palm(tokens(), finetune_scope=scope), expected, rtol=0, atol=1e-5)


@settings(max_examples=30)
@given(sizes, st.booleans(), st.integers(0, 999))
def test_the_logits_are_the_same(tmp_path_factory, options, from_file, seed):
    model = their_palm(seed, **options)
    source = state = model.state_dict()
    if from_file:
        source = tmp_path_factory.mktemp("theirs") / "palm.pt"
        torch.save(state, source)
    palm = PaLM.from_palm_rlhf_pytorch(source, causal=options["causal"])
    assert_same_logits(palm, model)
    config, sizes = palm.config, dict(options)
    assert config.inner_dim == sizes["dim"] * sizes.pop("ff_mult")
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert (config.kv_heads, config.xpos, config.logit_scale, config.z_loss) == (1, options["causal"], 1.0, 0.0)
    assert all(parameter.requires_grad for parameter in palm.parameters())


def test_far_positions_are_the_same_too():
    """The scales of xPos are the same wherever the middle of the sequence is."""
    model = their_palm(depth=1)
    palm = PaLM.from_palm_rlhf_pytorch(model.state_dict())
    with torch.no_grad():
        far = tokens(length=700)
        torch.testing.assert_close(palm(far), model(far), rtol=0, atol=2e-5)


def test_its_weights_are_not_shared():
    model = their_palm()
    palm = PaLM.from_palm_rlhf_pytorch(model.state_dict())
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in palm.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_the_loss_is_the_same_where_no_token_is_ignored():
    model = their_palm(cross_entropy_ignore_index=-100)
    palm = PaLM.from_palm_rlhf_pytorch(model.state_dict()).train()
    expected = model(tokens(), return_loss=True)
    torch.testing.assert_close(palm(tokens(), return_loss=True), expected, rtol=0, atol=1e-6)


def test_bfloat16_stays_bfloat16():
    model = their_palm().bfloat16()
    palm = PaLM.from_palm_rlhf_pytorch(model.state_dict())
    assert {parameter.dtype for parameter in palm.parameters()} == {torch.bfloat16}
    assert torch.equal(palm.layers[1].ff_out.weight, model.layers[1].fn.ff_out[2].weight)


@pytest.mark.parametrize("from_file", [False, True])
def test_lora_scopes_are_carried_over(tmp_path, from_file):
    model = their_palm(finetune_scopes=("one", "two"), lora_r=3)
    source = model.state_dict()
    if from_file:
        source = tmp_path / "palm.pt"
        torch.save(model.state_dict(), source)
    palm = PaLM.from_palm_rlhf_pytorch(source)
    with torch.no_grad():
        assert (palm(tokens()) - palm(tokens(), finetune_scope="one")).abs().max() > 0.1
    for scope in (None, "one", "two"):
        assert_same_logits(palm, model, scope)
    assert all(parameter.requires_grad for parameter in palm.parameters())  # as there
    palm.merge_finetune_params("one")
    model.merge_finetune_params("one")
    assert_same_logits(palm, model)


def matching(**options) -> PaLM:
    """A PaLM of the numbers that the package has fixed."""
    fixed = {"xpos": True, "logit_scale": 1.0}
    return PaLM(num_tokens=NUM_TOKENS, **{**SMALL, **fixed, **options})


@pytest.mark.parametrize("causal", [True, False])
def test_load_takes_it_in_place(tmp_path, causal):
    model = their_palm(causal=causal, finetune_scopes=("one",), lora_r=2)
    torch.save(model.state_dict(), tmp_path / "palm.pt")
    palm = matching(causal=causal, xpos=causal)
    weight = palm.token_emb.weight
    assert palm.load(tmp_path / "palm.pt") is palm
    assert palm.token_emb.weight is weight
    assert_same_logits(palm, model)
    assert_same_logits(palm, model, "one")
    saved = tmp_path / "saved"
    palm.save_pretrained(saved)
    assert_same_logits(PaLM.from_pretrained(saved), model, "one")


@pytest.mark.parametrize(
    "option, message",
    [
        ({"xpos": False}, "xpos=True there and False here"),
        ({"logit_scale": None}, r"output_scale=1\.0 there and 0\.17\d+ here"),
        ({"depth": 3}, "depth=2 there and 3 here"),
        ({"kv_heads": 2}, "kv_heads=1 there and 2 here"),
        ({"ff_mult": 4}, "inner_dim=64 there and 128 here"),
        ({"rotary_theta": 500.0}, r"rotary_theta=10000\.0 there and 500\.0 here"),
    ],
)
def test_load_names_what_is_not_the_same(tmp_path, option, message):
    torch.save(their_palm().state_dict(), tmp_path / "palm.pt")
    palm = matching(**option)
    before = [parameter.clone() for parameter in palm.parameters()]
    with pytest.raises(ValueError, match=rf"palm\.pt is of another model: .*{message}.*from_palm_rlhf_pytorch"):
        palm.load(tmp_path / "palm.pt")
    assert all(torch.equal(a, b) for a, b in zip(palm.parameters(), before, strict=True))


# Mutants of the subtle steps of the way: these tests would see them


def without_one_in_the_norms(palm: PaLM, layer: nn.Module) -> None:
    layer.norm.weight -= 1


def without_swapping_gate_and_value(palm: PaLM, layer: nn.Module) -> None:
    layer.in_proj.weight[48:] = layer.in_proj.weight[48:].roll(64, dims=0)


def with_the_paper_s_logit_scale(palm: PaLM, layer: nn.Module) -> None:
    palm.norm.weight *= 32**-0.25


def with_keys_and_values_exchanged(palm: PaLM, layer: nn.Module) -> None:
    layer.in_proj.weight[32:48] = layer.in_proj.weight[32:48].roll(8, dims=0)


@pytest.mark.parametrize(
    "mutate",
    [
        without_one_in_the_norms,
        without_swapping_gate_and_value,
        with_the_paper_s_logit_scale,
        with_keys_and_values_exchanged,
    ],
)
def test_a_mutant_is_seen(mutate):
    model = their_palm()
    palm = PaLM.from_palm_rlhf_pytorch(model.state_dict())
    with torch.no_grad():
        for layer in palm.layers:
            mutate(palm, layer)
        assert (palm(tokens()) - model(tokens())).abs().max() > 0.01


def test_xpos_taken_for_plain_rotary_is_seen():
    model, plain = their_palm(), matching(xpos=False)
    plain.load_state_dict(PaLM.from_palm_rlhf_pytorch(model.state_dict()).state_dict())
    with torch.no_grad():
        assert (plain(tokens()) - model(tokens())).abs().max() > 1e-3


# Refused


def test_normalised_queries_and_keys_are_refused_by_name(tmp_path):
    state = their_palm(qk_rmsnorm=True).state_dict()
    torch.save(state, tmp_path / "palm.pt")
    for source in (state, tmp_path / "palm.pt"):
        with pytest.raises(ValueError, match=r"qk_rmsnorm=True \(it has layers\.0\.fn\.q_scale\), which a PaLM cannot"):
            PaLM.from_palm_rlhf_pytorch(source)
    with pytest.raises(ValueError, match="qk_rmsnorm=True"):
        matching().load(tmp_path / "palm.pt")


def edited(**changes) -> dict[str, Tensor]:
    state = their_palm(finetune_scopes=("one",)).state_dict()
    for name, value in changes.items():
        state[name.replace("__", ".")] = value
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    "state, message",
    [
        ({}, "lacks ['token_emb.weight', 'layers.0.fn.fused_attn_ff_proj.weight'"),
        ({"weight": torch.ones(3)}, "lacks ['token_emb.weight'"),
        (edited(layers__1__fn__attn_out__weight=None), "lacks layers.1.fn.attn_out.weight; expected all tensors"),
        (edited(layers__0__fn__rotary_emb__inv_freq=None), "lacks ['layers.0.fn.rotary_emb.inv_freq']"),
        (edited(finetune_modules__one__1__3__B=None), "lacks finetune_modules.one.1.3.B"),
        (edited(extra=torch.ones(1)), "has the unexpected extra"),
        (
            edited(layers__1__fn__attn_out__weight=torch.ones(3, 3)),
            "has another shape of layers.1.fn.attn_out.weight: (3, 3), not (32, 32)",
        ),
        (edited(norm__beta=torch.ones(32)), "has another norm.beta than palm-rlhf-pytorch 0.8.0 makes"),
        (
            edited(layers__1__fn__rotary_emb__inv_freq=torch.ones(4)),
            "has another layers.1.fn.rotary_emb.inv_freq than palm-rlhf-pytorch 0.8.0 makes",
        ),
        (edited(to_logits__weight=torch.ones(NUM_TOKENS, 32)), "has a to_logits.weight of its own"),
        (edited(norm__gamma=3), "holds something other than floating-point tensors by name"),
    ],
)
def test_a_state_dict_that_is_none_of_theirs_is_refused(state, message):
    with pytest.raises(ValueError, match=f"the state dict {re.escape(message)}"):
        PaLM.from_palm_rlhf_pytorch(state)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"palm\.pt is not a file"):
        PaLM.from_palm_rlhf_pytorch(tmp_path / "palm.pt")


def test_a_checkpoint_of_ours_is_not_taken_for_one_of_theirs(tmp_path: Path):
    torch.save(matching().state_dict(), tmp_path / "palm.pt")
    with pytest.raises(
        ValueError, match=r"palm\.pt lacks \['layers\.0\.fn.*expected the state dict of a PaLM of palm-"
    ):
        PaLM.from_palm_rlhf_pytorch(tmp_path / "palm.pt")
