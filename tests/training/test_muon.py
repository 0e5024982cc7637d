"""Muon: its updates are orthogonal, are those of each matrix of a fused projection, and leave the rest to AdamW."""

import pytest
import torch

from palm_rlhf.training.run.muon import muon, orthogonalise
from palm_rlhf.training.run.optimizer import adamw
from tests.factories import SERIAL

SETTINGS = (0.01, (0.9, 0.95), 1e-8, 0.0)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 48), (2, 48, 16)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    matrices = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalise(matrices)
    assert ((torch.linalg.svdvals(result) > 0.3) & (torch.linalg.svdvals(result) < 1.4)).all()
    # in the basis of the singular vectors of the input the result is diagonal, and positive
    diagonal = left.mT @ result @ right.mT
    assert diagonal.diagonal(dim1=-2, dim2=-1).min() > 0.2
    off = diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 0.1


def stepped(palm, make):
    before = {name: parameter.detach().clone() for name, parameter in palm.named_parameters()}
    make(palm, *SETTINGS).step()
    return {name: parameter.detach() - before[name] for name, parameter in palm.named_parameters()}


def with_gradients(palm):
    generator = torch.Generator().manual_seed(0)
    for parameter in palm.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return palm


def test_every_matrix_of_a_fused_projection_is_orthogonalised_by_itself(tiny_palm):
    palm = with_gradients(tiny_palm())
    config, gradient = palm.config, palm.layers[0].in_proj.weight.grad.clone()
    moved = stepped(palm, muon)["layers.0.in_proj.weight"]
    q_dim, kv_dim = config.heads * config.dim_head, config.kv_heads * config.dim_head
    sizes = [q_dim, kv_dim, kv_dim, config.inner_dim, config.inner_dim]
    for got, block in zip(moved.split(sizes), gradient.split(sizes), strict=True):
        expected = orthogonalise(block.unsqueeze(0))[0] * -0.01 * 0.2 * max(block.shape) ** 0.5
        assert (got - expected).norm() < 0.05 * expected.norm()  # the iteration is in bfloat16
    whole = orthogonalise(gradient.unsqueeze(0))[0] * -0.01 * 0.2 * max(gradient.shape) ** 0.5
    assert (moved - whole).norm() > 0.2 * whole.norm()  # what one matrix of all rows would have given


def test_the_matrices_of_a_serial_block_are_orthogonalised_one_by_one(tiny_palm):
    """Gate and value are two matrices, and an output layer and biases are left to AdamW."""
    palm = with_gradients(tiny_palm(**SERIAL))
    inner, q_dim, kv_dim = palm.config.inner_dim, palm.config.heads * palm.config.dim_head, palm.config.dim_head
    sizes = {"in_proj": [q_dim, kv_dim, kv_dim], "ff_proj": [inner, inner], "attn_out": None, "ff_out": None}
    gradients = {name: parameter.grad.clone() for name, parameter in palm.named_parameters()}
    moved = stepped(palm, muon)
    for name, rows in sizes.items():
        name = f"layers.1.{name}.weight"
        for got, block in zip(*(t[name].split(rows or len(t[name])) for t in (moved, gradients)), strict=True):
            expected = orthogonalise(block.unsqueeze(0))[0] * -0.01 * 0.2 * max(block.shape) ** 0.5
            assert (got - expected).norm() < 0.05 * expected.norm()
    theirs = stepped(with_gradients(tiny_palm(**SERIAL)), adamw)
    for name in ("lm_head.weight", "layers.0.in_proj.bias", "layers.0.ff_norm.weight", "layers.0.q_norm.weight"):
        torch.testing.assert_close(moved[name], theirs[name], rtol=0, atol=0)


def test_updates_are_as_large_as_adamws(tiny_palm):
    moved = stepped(with_gradients(tiny_palm()), muon)
    for name in ("layers.0.attn_out.weight", "layers.1.ff_out.weight"):
        assert 0.1 * 0.01 < moved[name].square().mean().sqrt() < 0.4 * 0.01


def test_the_rest_is_adamws(tiny_palm):
    ours = stepped(with_gradients(tiny_palm()), muon)
    theirs = stepped(with_gradients(tiny_palm()), adamw)
    for name in ("token_emb.weight", "norm.weight", "layers.0.norm.weight"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    assert not torch.equal(ours["layers.0.ff_out.weight"], theirs["layers.0.ff_out.weight"])


def test_only_what_is_trainable_moves(tiny_palm):
    palm = tiny_palm()
    palm.add_finetune_params("scope", r=2)
    for parameter in palm.finetune_parameters("scope"):
        parameter.grad = torch.ones_like(parameter)
    moved = stepped(palm, muon)
    assert {name for name, change in moved.items() if change.any()} == {
        name for name in moved if name.startswith("finetune_modules")
    }


def test_frozen_numbers_in_fewer_bits_are_left_out(tiny_palm):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e '.[quantize]'")
    palm = tiny_palm()
    palm.quantize_("int8")
    with pytest.raises(ValueError, match="all weights are frozen"):
        muon(palm, *SETTINGS)
    palm.add_finetune_params("a", 2)
    trained = [parameter for group in muon(palm, *SETTINGS).param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in palm.finetune_parameters("a")}
