"""LLaMA's block and the switches of its kin against formulas written a second time, for every token, head and pair."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf import PaLM, PaLMConfig
from palm_rlhf.model.block import ParallelBlock, SerialBlock
from palm_rlhf.ops.rotary_scaling import RotaryScaling
from tests.factories import palm_of_scaled_norms

SMALL = {"num_tokens": 11, "dim": 10, "depth": 2, "heads": 4, "kv_heads": 2, "dim_head": 6, "ff_inner_dim": 7}
SMALL |= {"z_loss": 0.0, "block": "serial", "norm": "rms", "rotary_theta": 50.0}
STRETCHED = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 6.0,
        "original_max_position_embeddings": 20,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 3.0, "original_max_position_embeddings": 40},
}
VARIANTS = {
    "a key head for each": {"kv_heads": 4},
    "grouped-query, untied": {"tie_embeddings": False, "logit_scale": 1.0},
    "biases": {"qkv_bias": True, "norm_eps": 0.1},
    "qk norm": {"qk_norm": True, "norm_eps": 0.1},
    "layer norms": {"norm": "layer", "qk_norm": True, "norm_eps": 0.1},
    **{name: {"rotary_scaling": scaling} for name, scaling in STRETCHED.items()},
    "PaLM's block with all else": {
        "block": "parallel",
        "qk_norm": True,
        "tie_embeddings": False,
        "rotary_scaling": STRETCHED["yarn"],
    },
    "all at once": {
        "qk_norm": True,
        "qkv_bias": True,
        "tie_embeddings": False,
        "rotary_scaling": STRETCHED["llama3"],
        "depth": 3,
    },
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def small(*, dtype=torch.float64, **options) -> PaLM:
    return palm_of_scaled_norms(dtype=dtype, **{**SMALL, **options})


def some_tokens(batch=2, length=8):
    return torch.randint(SMALL["num_tokens"], (batch, length), generator=torch.Generator().manual_seed(1))


def normalised(x, scale, config):
    if config.norm == "layer":
        x = x - x.sum() / len(x)
    return x / (x.dot(x) / len(x) + config.norm_eps).sqrt() * scale


def frequency(pair, config):
    """Radians a token of one pair of a head, and the factor of its cosine and sine."""
    plain = config.rotary_theta ** (-2 * pair / config.dim_head)
    s = config.rotary_scaling
    if s is None:
        return plain, 1.0
    if s.rope_type == "linear":
        return plain / s.factor, 1.0
    rotations = s.original_max_position_embeddings * plain / (2 * math.pi)
    if s.rope_type == "llama3":
        if rotations > s.high_freq_factor:
            return plain, 1.0
        if rotations < s.low_freq_factor:
            return plain / s.factor, 1.0
        share = (rotations - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        return (1 - share) * plain / s.factor + share * plain, 1.0

    def pair_of(rotations):  # the pair, not a whole one, that turns so often in the context of pretraining
        length = s.original_max_position_embeddings / rotations
        return config.dim_head / 2 * math.log(length / (2 * math.pi), config.rotary_theta)

    low, high = max(math.floor(pair_of(s.beta_fast)), 0), math.ceil(pair_of(s.beta_slow))
    stretched = min(max((pair - low) / (high - low), 0), 1)
    return plain * (1 - stretched) + plain / s.factor * stretched, 1 + 0.1 * math.log(s.factor)


def turned(x, position, config):
    """One head of one token, whose pairs are complex numbers."""
    half = len(x) // 2
    rates, factors = zip(*(frequency(pair, config) for pair in range(half)), strict=True)
    factors, rates = torch.tensor((factors, rates), dtype=torch.float64)
    turn = torch.polar(factors, rates * position)
    z = torch.complex(x[:half], x[half:]) * turn
    return torch.cat((z.real, z.imag))


def attended(normed, w, c):
    """Values averaged by attention, each token and head by itself: one `(h d)` for each token."""
    d, outputs, keys, values = c.dim_head, [], [], []
    q_dim, kv_dim = c.heads * d, c.kv_heads * d
    for position, x in enumerate(normed):
        qkv = w["in_proj.weight"][: q_dim + 2 * kv_dim] @ x
        if c.qkv_bias:
            qkv = qkv + w["in_proj.bias"]
        q, k, v = (part.split(d) for part in qkv.split([q_dim, kv_dim, kv_dim]))
        if c.qk_norm:
            shared = c.norm == "rms"
            q = [normalised(x, w["q_norm.weight"] if shared else w["q_norm.weight"][h], c) for h, x in enumerate(q)]
            k = [normalised(x, w["k_norm.weight"] if shared else w["k_norm.weight"][h], c) for h, x in enumerate(k)]
        keys.append([turned(x, position, c) for x in k])
        values.append(v)
        heads = []
        for h, query in enumerate(turned(x, position, c) for x in q):
            kv = h // (c.heads // c.kv_heads)
            weights = torch.stack([query.dot(key[kv]) / math.sqrt(d) for key in keys]).softmax(dim=0)
            heads.append(sum(weight * value[kv] for weight, value in zip(weights, values, strict=True)))
        outputs.append(torch.cat(heads))
    return outputs


def hidden(x, gate_and_value):
    gate, value = (gate_and_value @ x).chunk(2)
    return gate * gate.sigmoid() * value


def recomputed(palm, tokens, config=None, *, late=True):
    """The logits of one row after another."""
    c, w, rows = config or palm.config, dict(palm.named_parameters()), []
    for row in tokens:
        stream = [w["token_emb.weight"][token] for token in row]
        for n in range(c.depth):
            layer = {name[len(f"layers.{n}.") :]: t for name, t in w.items() if name.startswith(f"layers.{n}.")}
            normed = [normalised(x, layer["norm.weight"], c) for x in stream]
            averages = [layer["attn_out.weight"] @ x for x in attended(normed, layer, c)]
            if c.block == "parallel":
                width = (c.heads + 2 * c.kv_heads) * c.dim_head
                units = [hidden(x, layer["in_proj.weight"][width:]) for x in normed]
            else:
                middle = [x + average for x, average in zip(stream, averages, strict=True)]
                read = middle if late else stream  # a mutant: the feed-forward does not see the attention
                units = [hidden(normalised(x, layer["ff_norm.weight"], c), layer["ff_proj.weight"]) for x in read]
            outputs = [layer["ff_out.weight"] @ x for x in units]
            stream = [sum(parts) for parts in zip(stream, averages, outputs, strict=True)]
        output = w["token_emb.weight"] if c.tie_embeddings else w["lm_head.weight"]
        logits = [output @ normalised(x, w["norm.weight"], c) for x in stream]
        rows.append(torch.stack(logits) * (c.dim**-0.5 if c.logit_scale is None else c.logit_scale))
    return torch.stack(rows)


def gradients(palm, scalar):
    return torch.autograd.grad(scalar, list(palm.parameters()))


def assert_all_close(got, expected, atol=1e-9):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@every_variant
def test_logits_loss_and_gradients_are_those_of_the_formulas(variant):
    palm, tokens = small(**VARIANTS[variant]), some_tokens()
    expected = recomputed(palm, tokens)
    torch.testing.assert_close(palm(tokens), expected, rtol=0, atol=1e-9)
    loss, loss_expected = palm(tokens, return_loss=True), F.cross_entropy(expected[:, :-1].mT, tokens[:, 1:])
    torch.testing.assert_close(loss, loss_expected, rtol=0, atol=1e-9)
    grads = gradients(palm, loss)
    assert all(gradient.abs().max() > 1e-6 for gradient in grads)  # no weight is left out
    assert_all_close(grads, gradients(palm, loss_expected))


def test_a_feed_forward_that_does_not_see_the_attention_is_told_apart():
    palm, tokens = small(), some_tokens()
    assert (palm(tokens) - recomputed(palm, tokens, late=False)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "switch",
    [
        {"norm": "layer"},
        {"qkv_bias": False},
        {"tie_embeddings": True},
        {"rotary_scaling": None},
        *({"rotary_scaling": RotaryScaling.from_dict(scaling)} for scaling in (STRETCHED["linear"], STRETCHED["yarn"])),
        {"qk_norm": False},
    ],
    ids=str,
)
def test_every_switch_reaches_the_logits(switch):
    """The formulas with one switch turned are told apart; heads have the same scale, so that norms may be swapped."""
    palm, tokens = small(**VARIANTS["all at once"]), some_tokens(1)
    config = dataclasses.replace(palm.config, **switch)
    if "norm" in switch:
        config = dataclasses.replace(config, qk_norm=False)
        palm = small(**{**VARIANTS["all at once"], "qk_norm": False})
    assert (palm(tokens) - recomputed(palm, tokens, config)).abs().max() > 1e-3


@every_variant
def test_gradient_checkpointing_and_eager_attention_change_nothing(variant):
    losses, grads = [], []
    for options in ({}, {"gradient_checkpointing": True}, {"flash_attn": False}):
        palm = small(**VARIANTS[variant], **options, dropout=0.3)
        torch.manual_seed(7)
        losses.append(palm(some_tokens(), return_loss=True))
        grads.append(gradients(palm, losses[-1]))
    assert torch.equal(losses[0], losses[1])
    assert_all_close(grads[0], grads[1], atol=1e-12)
    torch.testing.assert_close(losses[0], losses[2], rtol=0, atol=1e-11)
    assert_all_close(grads[0], grads[2], atol=1e-11)


def test_each_half_of_a_block_has_dropout():
    palm = small(dropout=0.5, depth=1)
    drops = []
    palm.layers[0].dropout.register_forward_hook(lambda *_: drops.append(1))
    palm(some_tokens())
    assert len(drops) == 2
    assert torch.equal(palm.eval()(some_tokens()), small(depth=1)(some_tokens()))


def test_compiles_into_one_graph_with_the_same_gradients():
    torch.compiler.reset()
    palm, tokens = small(**{**VARIANTS["all at once"], "depth": 1}), some_tokens()
    compiled = torch.compile(palm, fullgraph=True, backend="aot_eager")
    losses = palm(tokens, return_loss=True), compiled(tokens, return_loss=True)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-10)
    assert_all_close(*(gradients(palm, loss) for loss in losses), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_narrow_weights_stay_near_float64(dtype):
    """With autocast, weights and gradients stay float32; queries and keys of bfloat16 meet a norm of float32."""
    wide = {**VARIANTS["all at once"], "dim": 64, "dim_head": 32, "ff_inner_dim": 96, "depth": 2}
    exact, palm, tokens = small(**wide), small(**wide, dtype=dtype), some_tokens(2, 40)
    exact.load_state_dict(palm.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        logits, loss = palm(tokens), palm(tokens, return_loss=True)
    expected, expected_loss = exact(tokens), exact(tokens, return_loss=True)
    assert (logits.double() - expected).norm() < 0.02 * expected.norm()
    assert loss.item() == pytest.approx(expected_loss.item(), abs=0.02)
    for ours, theirs in zip(gradients(palm, loss), gradients(exact, expected_loss), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < 0.05 * theirs.norm()


def test_parameters_are_counted_by_hand_and_start_as_they_should():
    palm = PaLM(**{**SMALL, "qkv_bias": True, "qk_norm": True, "tie_embeddings": False, "dim": 256, "heads": 8})
    qkv, inner = (8 + 2 * 2) * 6, 7
    block = 256 * qkv + qkv + 8 * 6 * 256 + 2 * inner * 256 + inner * 256 + 2 * 256 + 2 * 6
    assert sum(p.numel() for p in palm.parameters()) == 2 * 11 * 256 + 2 * block + 256
    assert not any(layer.in_proj.bias.any() for layer in palm.layers)
    assert palm.lm_head.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert palm.output_weight is palm.lm_head.weight


def test_a_palm_of_old_has_neither_the_names_nor_the_fields_of_other_architectures():
    palm = PaLM(num_tokens=11, dim=8, depth=1)
    assert list(palm.state_dict()) == [
        "token_emb.weight",
        "layers.0.norm.weight",
        "layers.0.in_proj.weight",
        "layers.0.attn_out.weight",
        "layers.0.ff_out.weight",
        "norm.weight",
    ]
    assert type(palm.layers[0]) is ParallelBlock and type(small().layers[0]) is SerialBlock
    assert not {"block", "norm", "qkv_bias", "tie_embeddings", "rotary_scaling"} & set(palm.config.to_dict())


@every_variant
def test_the_config_rebuilds_the_model_and_its_files_hold_it(variant, tmp_path):
    palm, tokens = small(**VARIANTS[variant]), some_tokens()
    again = PaLM.from_config(PaLMConfig.from_dict(palm.config.to_dict())).double()
    assert again.config == palm.config
    again.load_state_dict(palm.state_dict())
    assert torch.equal(again(tokens), palm(tokens))
    palm.save_pretrained(tmp_path / "palm")
    opened = PaLM.from_pretrained(tmp_path / "palm")
    assert opened.config == palm.config and torch.equal(opened(tokens), palm(tokens))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block": "sandwich"}, "block is 'sandwich'; expected one of .*'serial'"),
        ({"norm": "batch"}, "norm is 'batch'; expected one of .*'rms'"),
        ({"qkv_bias": True, "block": "parallel"}, 'qkv_bias=True with block="parallel"'),
        ({"xpos": True, "rotary_scaling": STRETCHED["linear"]}, "xpos=True and a rotary_scaling"),
    ],
)
def test_switches_that_name_no_model_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PaLMConfig(**{**SMALL, **options})
