"""LoRA on chosen matrices of a block: of the attention, of the feed-forward, in both kinds of block."""

import copy
import json

import pytest
import torch
from torch import Tensor

from palm_rlhf.model.lora import ATTENTION, TARGETS
from palm_rlhf.model.palm import PaLM

BLOCKS = {"parallel": {}, "serial": {"block": "serial", "norm": "rms", "tie_embeddings": False, "qkv_bias": True}}
SUBSETS = [TARGETS, ("q", "v"), ("k",), ("out",), ("gate",), ("value",), ("ff_out",), ("v", "gate", "ff_out")]


def small_model(block: str = "parallel", **options) -> PaLM:
    torch.manual_seed(3)
    sizes = {"num_tokens": 11, "dim": 12, "depth": 2, "heads": 4, "dim_head": 4, "kv_heads": 2, "ff_inner_dim": 10}
    return PaLM(**sizes, **BLOCKS[block], **options).double()


@torch.no_grad()
def with_scope(palm: PaLM, targets, r: int = 3, **options) -> PaLM:
    for parameter in palm.add_finetune_params("default", r, targets=targets, **options).parameters():
        parameter.normal_(std=0.4)
    return palm


@torch.no_grad()
def logits(palm: PaLM, scope: str | None = "default") -> Tensor:
    tokens = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))
    return palm(tokens, finetune_scope=scope)


def by_hand(palm: PaLM, scale: float) -> PaLM:
    """A copy without the scope, whose weights are W + scale (A B)^T (Hu et al. 2021, equation 3), row by row."""
    merged = copy.deepcopy(palm)
    c = palm.config
    q_dim, kv_dim, inner = c.heads * c.dim_head, c.kv_heads * c.dim_head, c.inner_dim
    feed_forward = q_dim + 2 * kv_dim if c.block == "parallel" else 0
    places = {
        "q": ("in_proj", 0, q_dim),
        "k": ("in_proj", q_dim, kv_dim),
        "v": ("in_proj", q_dim + kv_dim, kv_dim),
        "out": ("attn_out", 0, c.dim),
        "gate": ("in_proj" if c.block == "parallel" else "ff_proj", feed_forward, inner),
        "value": ("in_proj" if c.block == "parallel" else "ff_proj", feed_forward + inner, inner),
        "ff_out": ("ff_out", 0, c.dim),
    }
    with torch.no_grad():
        for layer, block in zip(merged.layers, merged.finetune_modules["default"]):
            for target, (matrix, start, size) in places.items():
                if (part := getattr(block, target)) is not None:
                    getattr(layer, matrix).weight[start : start + size] += scale * (part.A @ part.B).T
    merged.remove_finetune_params("default")
    return merged


@pytest.mark.parametrize("targets", SUBSETS, ids="-".join)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_scope_adds_its_low_rank_product_to_the_chosen_weights_alone(block, targets):
    palm = with_scope(small_model(block), targets, alpha=7)
    base, adapted, expected = logits(palm, None), logits(palm), by_hand(palm, 7 / 3)
    assert not torch.allclose(adapted, base, rtol=0, atol=1e-4)
    torch.testing.assert_close(adapted, logits(expected, None), rtol=0, atol=1e-10)
    assert {name.split(".")[-2] for name in palm.state_dict() if name.startswith("finetune")} == set(targets)
    palm.merge_finetune_params("default")
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(palm.state_dict()[name], weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_adapter_is_trained_and_nothing_else(block):
    palm = with_scope(small_model(block), TARGETS)
    tokens = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1))
    palm(tokens, return_loss=True, finetune_scope="default").backward()
    assert all(parameter.grad.any() for parameter in palm.finetune_parameters())
    assert all(parameter.grad is None for parameter in palm.palm_parameters())
    # the gradient of an adapter follows from that of the merged weight: dL/dB = scale A^T (dL/dW)^T
    merged = by_hand(palm, 1.0)
    merged(tokens, return_loss=True).backward()
    part = palm.finetune_modules["default"][0].ff_out
    expected = part.A.T @ merged.layers[0].ff_out.weight.grad.T
    torch.testing.assert_close(part.B.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("targets", [("q", "v"), TARGETS], ids="-".join)
def test_generation_is_that_of_the_merged_model(block, targets):
    """With a cache, and on a CPU by the kernel in C where it knows the adapters: it must not pass any by."""
    palm = with_scope(small_model(block), targets).float()
    prompt = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))
    greedy = {"max_new_tokens": 12, "temperature": 0.0}
    base = palm.generate(None, prompt, **greedy)
    adapted = palm.generate(None, prompt, finetune_scope="default", **greedy)
    palm.merge_finetune_params("default")
    assert torch.equal(palm.generate(None, prompt, **greedy), adapted)
    assert not torch.equal(adapted, base)


def test_without_targets_a_scope_has_the_names_and_the_weights_that_it_always_had():
    torch.manual_seed(0)
    palm = PaLM(num_tokens=11, dim=6, depth=1, heads=2, dim_head=4)
    torch.manual_seed(5)
    palm.add_finetune_params("default", 2)
    torch.manual_seed(5)
    sizes = {"q": (6, 8), "k": (6, 4), "v": (6, 4), "out": (8, 6)}
    for name, (width_in, width_out) in sizes.items():
        state = palm.state_dict()
        expected = torch.randn(width_in, 2) * width_in**-0.5
        assert torch.equal(state[f"finetune_modules.default.0.{name}.A"], expected)
        assert state[f"finetune_modules.default.0.{name}.B"].shape == (2, width_out)
    assert sum(name.startswith("finetune") for name in palm.state_dict()) == 8


@pytest.mark.parametrize("targets", [ATTENTION, ("v", "ff_out")], ids="-".join)
def test_a_saved_model_has_its_targets_again(tmp_path, targets):
    palm = with_scope(small_model(), targets, alpha=5)
    palm.save_pretrained(tmp_path)
    (options,) = json.loads((tmp_path / "config.json").read_text())["finetune_scopes"].values()
    others = {} if targets == ATTENTION else {"targets": ["v", "ff_out"]}  # a file of old has no such entry
    assert options == {"r": 3, "alpha": 5, "train_base": False, **others}
    opened = PaLM.from_pretrained(tmp_path)
    assert opened.finetune_modules["default"][0].targets == targets
    assert torch.equal(logits(opened), logits(palm))
    fresh = small_model()
    fresh.load(tmp_path)
    assert torch.equal(logits(fresh), logits(palm))
    other = with_scope(small_model(), TARGETS, alpha=5)
    with pytest.raises(ValueError, match="finetune scope 'default'"):
        other.load(tmp_path)


@pytest.mark.parametrize("targets", [(), ("q", "lm_head"), ("q_proj",), "kv", ("all-linear", "q")])
def test_other_targets_are_refused_by_name(targets):
    palm = small_model()
    with pytest.raises(ValueError, match=r"expected at least one, and all of them from .*'ff_out'"):
        palm.add_finetune_params("default", targets=targets)
    assert not palm.finetune_modules
