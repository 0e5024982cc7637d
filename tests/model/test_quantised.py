"""Weights in fewer bits: their numbers by hand, the model of plain weights that they stand for, gradients, refusals."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from palm_rlhf import PaLM
from palm_rlhf.model.captured import why_not_captured
from palm_rlhf.model.quantised.quantised_model import QuantisedLinear, check_frozen, is_quantised, weights_bytes
from palm_rlhf.model.quantised.quantised_weights import pack, product
from palm_rlhf.model.shared_base import palm_over_base
from palm_rlhf.policy.reward_model import RewardModel

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e '.[quantize]'")

CONFIGS = {
    "parallel": {"kv_heads": 2, "qk_norm": True},
    "serial": {
        "kv_heads": 2, "block": "serial", "norm": "rms", "qkv_bias": True, "tie_embeddings": False, "ff_inner_dim": 96
    },
}  # fmt: skip
# Dettmers et al. 2023, appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def by_hand(weight, kind):
    """The weight that the numbers stand for, from loops over rows or blocks."""
    if kind == "int8":
        rows = []
        for row in weight.half().float():  # bitsandbytes packs weights of 16 bits
            largest = row.abs().max()
            rows.append((row * (127 / largest)).round() * largest / 127)
        return torch.stack(rows)
    weight = weight.double()
    numbers = torch.tensor(NF4, dtype=torch.float64)
    blocks = []
    for block in weight.flatten().split(64):
        scale = block.abs().max()
        nearest = (block.unsqueeze(-1) / scale - numbers).abs().argmin(-1)
        blocks.append(numbers[nearest] * scale)
    return torch.cat(blocks).view(weight.shape)


@pytest.fixture(params=CONFIGS)
def palm(request):
    torch.manual_seed(0)
    model = PaLM(num_tokens=50, dim=64, depth=2, heads=4, dim_head=16, **CONFIGS[request.param])
    with torch.no_grad():
        for layer in model.layers:
            if layer.in_proj.bias is not None:
                layer.in_proj.bias.normal_()
    return model


@pytest.fixture
def tokens():
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def with_weights_by_hand(palm, kind):
    plain = copy.deepcopy(palm)
    for layer in plain.layers:
        for name in layer.matrices():
            weight = getattr(layer, name).weight
            weight.copy_(by_hand(weight, kind))
    return plain


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_computes_with_the_weights_that_its_numbers_stand_for(palm, tokens, kind):
    plain, expected = palm(tokens), with_weights_by_hand(palm, kind)
    palm.quantize_(kind)
    torch.testing.assert_close(palm(tokens), expected(tokens), atol=1e-5, rtol=1e-5)
    assert (palm(tokens) - plain).abs().max() > 1e-3  # the bits are fewer
    with torch.no_grad():
        assert torch.equal(
            palm.generate(prompt=tokens[0], max_new_tokens=12, temperature=0.0),
            expected.generate(prompt=tokens[0], max_new_tokens=12, temperature=0.0),
        )


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_get_the_gradients_of_the_dequantised_model(palm, tokens, kind, checkpointing):
    expected = with_weights_by_hand(palm, kind)
    palm.quantize_(kind)
    palm.config = dataclasses.replace(palm.config, gradient_checkpointing=checkpointing)
    for model in (palm, expected):
        torch.manual_seed(2)
        model.add_finetune_params("a", 4)
        with torch.no_grad():
            for parameter in model.finetune_parameters("a"):
                parameter.normal_(std=0.1)
        model(tokens, return_loss=True, finetune_scope="a").backward()
    gradients = [[parameter.grad for parameter in model.finetune_parameters("a")] for model in (palm, expected)]
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients[1])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is None for parameter in palm.palm_parameters())


def test_bfloat16_and_autocast_keep_the_numbers_and_their_scales(palm, tokens):
    palm.quantize_("int8")
    scales = palm.layers[0].in_proj.scales.clone()
    narrow = copy.deepcopy(palm).to(torch.bfloat16)
    assert torch.equal(narrow.layers[0].in_proj.scales, scales) and scales.dtype == torch.float32
    assert narrow(tokens).dtype == torch.bfloat16
    torch.testing.assert_close(narrow(tokens).float(), palm(tokens), atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(palm(tokens).float(), palm(tokens).float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind, bits", [("int8", 8), ("int4", 4.5)])
def test_the_matrices_take_their_bits_and_the_scales_of_rows(palm, kind, bits):
    sizes = [(layer, name, getattr(layer, name).weight.numel()) for layer in palm.layers for name in layer.matrices()]
    rows = sum(getattr(layer, name).weight.shape[0] for layer, name, _ in sizes) if kind == "int8" else 0
    before = weights_bytes(palm)
    palm.quantize_(kind)
    numbers = sum(size for *_, size in sizes)
    assert before - weights_bytes(palm) == numbers * 4 - numbers * bits / 8 - rows * 4


def test_the_backward_keeps_no_plain_weights(palm, tokens):
    palm.quantize_("int8")
    palm.add_finetune_params("a", 4)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    shapes = {tuple(part.shape) for part in palm.modules() if isinstance(part, QuantisedLinear)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        palm(tokens, return_loss=True, finetune_scope="a")
    plain = [t for t in saved if t.is_floating_point() and {tuple(t.shape), tuple(t.shape[::-1])} & shapes]
    assert saved and not plain


def test_the_state_dict_has_the_plain_weights_and_loads_into_a_plain_model(palm, tokens, tmp_path):
    palm.quantize_("int4")
    plain = PaLM.from_config(palm.config)
    plain.load_state_dict(palm.state_dict())
    torch.testing.assert_close(plain(tokens), palm(tokens), atol=1e-5, rtol=1e-5)
    palm.save_pretrained(tmp_path / "saved")
    assert torch.equal(PaLM.from_pretrained(tmp_path / "saved")(tokens), plain(tokens))
    palm.load(tmp_path / "saved")  # the same weights: nothing changes
    palm.dequantize_()
    assert not is_quantised(palm) and all(parameter.requires_grad for parameter in palm.parameters())
    assert torch.equal(palm(tokens), plain(tokens))


def test_plain_weights_that_another_model_holds_do_not_train(palm, tokens):
    view = palm_over_base(palm)
    palm.quantize_("int8")
    numbers = view(tokens)
    palm.dequantize_()
    torch.testing.assert_close(view(tokens), numbers, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in [*palm.parameters(), *view.parameters()])


def test_other_weights_are_not_loaded_below_a_frozen_base(palm, tmp_path):
    palm.save_pretrained(tmp_path / "saved")
    palm.quantize_("int8")
    before = copy.deepcopy(palm.token_emb.weight)
    with torch.no_grad():
        palm.token_emb.weight.add_(1)
    with pytest.raises(ValueError, match=r"in_proj.weight differs from the frozen weight in int8.*dequantize_"):
        palm.load(tmp_path / "saved")
    assert torch.equal(palm.token_emb.weight, before + 1)  # nothing was copied


def test_a_step_in_fewer_bits_is_not_captured(palm, monkeypatch):
    monkeypatch.setattr("palm_rlhf.model.captured.GPUS", {"cpu"})
    assert why_not_captured(palm) is None
    palm.quantize_("int8")
    assert why_not_captured(palm) == "the weights are in fewer bits"


def test_loading_other_weights_adds_no_scope(palm, tmp_path):
    saved = copy.deepcopy(palm)
    saved.add_finetune_params("theirs")
    for model, kind in ((saved, "palm"), (RewardModel(saved), "reward")):
        model.save_pretrained(tmp_path / kind)
    with torch.no_grad():
        palm.layers[1].ff_out.weight.mul_(2)
    reward_model = RewardModel(palm)
    for model, base, kind in ((palm, palm, "palm"), (reward_model, reward_model.palm, "reward")):
        base.quantize_("int8")
        with pytest.raises(ValueError, match="differs from the frozen weight"):
            model.load(tmp_path / kind)
        assert not base.finetune_modules


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_float16_has_room_for_large_outputs_and_small_gradients(kind):
    """LLaMA has activations of thousands, and half of its folders are float16."""
    torch.manual_seed(0)
    weight, x = (torch.randn(8, 512) * 0.02).half(), torch.randn(3, 512)
    x[0, 5] = 3000
    x, packed, plain = x.half().requires_grad_(), pack(weight, kind), by_hand(weight.float(), kind).double()
    got, expected = product(x, packed, (8, 512)), x.double() @ plain.T
    assert 50 < expected.abs().max() < 200
    assert (got - expected).norm() < 2e-3 * expected.norm()
    d_out = torch.full_like(got, 1e-3)
    (gradient,) = torch.autograd.grad(got, x, d_out)
    expected = d_out.double() @ plain
    assert (gradient - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("shape", [(3, 5), (2, 96), (64, 33)], ids=str)
def test_int4_numbers_of_any_width_go_on_in_blocks_of_64(shape):
    """Blocks cross the ends of rows, and the last one may be short."""
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(2, shape[1])
    expected = x.double() @ by_hand(weight, "int4").double().T
    torch.testing.assert_close(product(x, pack(weight, "int4"), shape).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_base_neither_trains_nor_takes_adapters_in(palm, kind):
    palm.quantize_(kind)
    check_frozen(palm, is_sharded=False)
    with pytest.raises(ValueError, match=rf"got weights in {kind}, expected plain ones in shards \(FSDP\)"):
        check_frozen(palm, is_sharded=True)
    assert not any(parameter.requires_grad for parameter in palm.parameters())
    with pytest.raises(ValueError, match=rf"got weights in {kind}, expected plain ones; call palm.dequantize_"):
        palm.quantize_("int8")
    with pytest.raises(ValueError, match=rf"got weights in {kind}, expected plain ones to train the base"):
        palm.add_finetune_params("a", train_base=True)
    palm.add_finetune_params("a")
    with pytest.raises(ValueError, match=rf"got weights in {kind}, expected plain ones to merge adapters into"):
        palm.merge_finetune_params("a")
    palm.remove_finetune_params("a")
    assert not any(parameter.requires_grad for parameter in palm.parameters())


def test_on_the_meta_device_the_sizes_are_those_of_the_real_model(palm):
    with torch.device("meta"):
        skeleton = PaLM.from_config(palm.config)
    for kind in ("int8", "int4"):
        real, sizes = copy.deepcopy(palm), copy.deepcopy(skeleton)
        real.quantize_(kind)
        sizes.quantize_(kind)
        assert weights_bytes(sizes) == weights_bytes(real)
        assert math.isclose(weights_bytes(real), sum(t.nbytes for t in [*real.parameters(), *real.buffers()]))


def test_only_the_matrices_of_blocks_are_quantised(palm):
    palm.quantize_("int4")
    assert {name for name, part in palm.named_modules() if isinstance(part, QuantisedLinear)} == {
        f"layers.{i}.{name}" for i, layer in enumerate(palm.layers) for name in layer.matrices()
    }
    assert isinstance(palm.token_emb, nn.Embedding)
