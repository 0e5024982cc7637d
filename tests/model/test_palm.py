"""PaLM against the paper's formulas, written a second time from its state dict alone; its options, sizes and start."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf import PaLM, PaLMConfig, RewardModel
from tests.factories import palm_of_scaled_norms

SMALL = {"num_tokens": 19, "dim": 12, "depth": 2, "heads": 4, "dim_head": 6, "ff_mult": 2, "z_loss": 0.0}
VARIANTS = {
    "multi-query": {},
    "grouped-query": {"kv_heads": 2},
    "a key head for each": {"kv_heads": 4},
    "qk norm": {"qk_norm": True, "kv_heads": 2},
    "xpos": {"xpos": True},
    "bidirectional": {"causal": False},
    "all at once": {"qk_norm": True, "xpos": True, "kv_heads": 2, "norm_eps": 0.1, "rotary_theta": 100, "depth": 3},
    "inner dim": {"ff_inner_dim": 7},
    "logit scale": {"logit_scale": 0.7, "rotary_theta": 500000.0},
}


def small(*, dtype=torch.float64, **options) -> PaLM:
    return palm_of_scaled_norms(dtype=dtype, **{**SMALL, **options})


def some_tokens(*shape, seed=1):
    return torch.randint(SMALL["num_tokens"], shape or (2, 9), generator=torch.Generator().manual_seed(seed))


def normalised(x, scale, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / ((centred**2).mean(dim=-1, keepdim=True) + eps).sqrt() * scale


def turned(x, config, *, sign):
    """Rotary by complex numbers, `b n h d`; xPos multiplies by zeta^(sign position / 512)."""
    half = x.shape[-1] // 2
    m, positions = torch.arange(half).double(), torch.arange(x.shape[1]).double()
    angles = positions[:, None] * config.rotary_theta ** (-2 * m / x.shape[-1])
    lengths = torch.ones_like(angles)
    if config.xpos:
        lengths = ((2 * m / x.shape[-1] + 0.4) / 1.4) ** (sign * positions[:, None] / 512)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(lengths, angles)[:, None, :]
    return torch.cat((z.real, z.imag), dim=-1)


def recomputed(palm, tokens, *, serial=False, swapped=False):
    """Logits of arXiv:2204.02311, section 2, head by head."""
    c, w = palm.config, dict(palm.named_parameters())
    inner = c.ff_inner_dim or int(c.dim * c.ff_mult)
    group, (batch, length) = c.heads // c.kv_heads, tokens.shape
    x = w["token_emb.weight"][tokens]
    for n in range(c.depth):
        prefix = f"layers.{n}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
        normed = normalised(x, layer["norm.weight"], c.norm_eps)
        sizes = [c.heads * c.dim_head, c.kv_heads * c.dim_head, c.kv_heads * c.dim_head, inner, inner]
        q, k, v, gate, value = (normed @ rows.T for rows in layer["in_proj.weight"].split(sizes))
        q, k, v = (t.view(batch, length, -1, c.dim_head) for t in (q, k, v))
        if c.qk_norm:
            q, k = (normalised(t, layer[f"{s}_norm.weight"], c.norm_eps) for t, s in ((q, "q"), (k, "k")))
        q, k = turned(q, c, sign=1), turned(k, c, sign=-1)
        heads = []
        for h in range(c.heads):
            scores = torch.einsum("bid,bjd->bij", q[:, :, h], k[:, :, h // group]) / math.sqrt(c.dim_head)
            if c.causal:
                scores = scores + torch.full((length, length), -math.inf).triu(1)
            heads.append(scores.softmax(dim=-1) @ v[:, :, h // group])
        attended = torch.cat(heads, dim=-1) @ layer["attn_out.weight"].T
        if serial:  # a mutant: the feed-forward reads what attention wrote
            again = normalised(x + attended, layer["norm.weight"], c.norm_eps)
            gate, value = (again @ rows.T for rows in layer["in_proj.weight"].split(sizes)[3:])
        if swapped:  # a mutant: the other half is the gate
            gate, value = value, gate
        x = x + attended + (gate * gate.sigmoid() * value) @ layer["ff_out.weight"].T
    embeds = normalised(x, w["norm.weight"], c.norm_eps)
    return embeds @ w["token_emb.weight"].T * (c.dim**-0.5 if c.logit_scale is None else c.logit_scale)


def gradients(palm, scalar):
    return torch.autograd.grad(scalar, list(palm.parameters()))


def assert_all_close(got, expected, atol=1e-9):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients_are_those_of_the_paper(variant):
    palm, tokens = small(**VARIANTS[variant]), some_tokens()
    logits, expected = palm(tokens), recomputed(palm, tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    direction = torch.randn_like(logits)
    assert_all_close(gradients(palm, (logits * direction).sum()), gradients(palm, (expected * direction).sum()))

    loss, loss_expected = palm(tokens, return_loss=True), recomputed(palm, tokens[:, :-1])
    loss_expected = F.cross_entropy(loss_expected.mT, tokens[:, 1:])
    torch.testing.assert_close(loss, loss_expected, rtol=0, atol=1e-9)
    assert_all_close(gradients(palm, loss), gradients(palm, loss_expected))


@pytest.mark.parametrize("mutant", [{"serial": True}, {"swapped": True}], ids=str)
def test_mutants_of_the_paper_are_told_apart(mutant):
    palm, tokens = small(), some_tokens()
    assert (palm(tokens) - recomputed(palm, tokens, **mutant)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_eager_reference_equals_the_fast_attention(variant):
    tokens, key_mask = some_tokens(), torch.ones(2, 9, dtype=torch.bool)
    key_mask[0, :4] = False
    losses, grads = [], []
    for flash_attn in (True, False):
        palm = small(**VARIANTS[variant], flash_attn=flash_attn)
        losses.append(palm(tokens, return_loss=True) + palm(tokens, return_loss=True, key_mask=key_mask))
        grads.append(gradients(palm, losses[-1]))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-11)
    assert_all_close(*grads, atol=1e-11)


def test_gradient_checkpointing_changes_nothing_not_even_the_dropout():
    losses, grads = [], []
    for gradient_checkpointing in (True, False):
        palm = small(dropout=0.3, gradient_checkpointing=gradient_checkpointing, kv_heads=2)
        torch.manual_seed(7)
        losses.append(palm(some_tokens(), return_loss=True))
        grads.append(gradients(palm, losses[-1]))
    assert torch.equal(*losses)
    assert_all_close(*grads, atol=1e-12)


def test_dropout_is_on_in_train_and_off_in_eval():
    palm, plain, tokens = small(dropout=0.5), small(), some_tokens()
    assert not torch.equal(palm(tokens), palm(tokens))
    assert torch.equal(palm.eval()(tokens), plain(tokens))


def test_the_z_loss_counts_in_train_only():
    palm, tokens = small(z_loss=0.3), some_tokens()
    squares = palm(tokens[:, :-1]).logsumexp(dim=-1).square().mean()
    in_train, in_eval = palm(tokens, return_loss=True), palm.eval()(tokens, return_loss=True)
    torch.testing.assert_close(in_train - in_eval, 0.3 * squares, rtol=0, atol=1e-12)
    assert PaLMConfig(num_tokens=2, dim=2, depth=1).z_loss == 1e-4


def test_loss_mask_and_denominator():
    palm, tokens = small(), some_tokens()
    loss_mask = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0, 0, 0]]).bool()
    nats = F.cross_entropy(palm(tokens)[:, :-1].mT, tokens[:, 1:], reduction="none")
    counted = torch.tensor([(0, 1), (0, 2), (0, 7), (1, 4)])  # of the targets; the first token of a row is none
    expected = nats[counted[:, 0], counted[:, 1]].sum()
    torch.testing.assert_close(palm(tokens, return_loss=True, loss_mask=loss_mask), expected / 4)
    for denominator in (10, 10.0, torch.tensor(10)):
        got = palm(tokens, return_loss=True, loss_mask=loss_mask, loss_denominator=denominator)
        torch.testing.assert_close(got, expected / 10)


def test_embeddings_come_back_as_asked():
    palm, tokens = small(), some_tokens()
    logits = palm(tokens)
    embeds = palm(tokens, return_only_embedding=True)
    both = palm(tokens, return_logits_with_embedding=True)
    assert embeds.shape == (2, 9, 12)
    assert torch.equal(both[0], logits) and torch.equal(both[1], embeds)
    assert torch.equal(palm.to_logits(embeds), logits)
    expected = embeds @ palm.token_emb.weight.T * 12**-0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 9, 12), (1, 9, 12), (2, 1, 12), (9, 12), (1, 12), (12,)], ids=str)
def test_extra_embeddings_are_added_to_those_of_the_tokens(shape):
    palm, tokens = small(), some_tokens()
    extra = torch.randn(shape, dtype=torch.float64)
    logits = palm(tokens, extra_embed=extra)
    moved = torch.arange(18).view(2, 9)  # a token of its own for every place, holding the sum
    other = small(num_tokens=18)
    other.load_state_dict({**palm.state_dict(), "token_emb.weight": torch.zeros(18, 12)})
    other.token_emb.weight.data = (palm.token_emb.weight[tokens] + extra).detach().flatten(0, 1)
    expected = other(moved, return_only_embedding=True) @ palm.token_emb.weight.T * 12**-0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    loss = palm(tokens, return_loss=True, extra_embed=extra)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:]), rtol=0, atol=1e-12)


def test_initial_statistics_are_those_of_the_paper():
    """Kernels N(0, 1/fan_in), embeddings N(0, 1), scales 1, so that the first logits have a variance near 1."""
    palm = PaLM(num_tokens=2000, dim=256, depth=1, heads=2, dim_head=64, ff_mult=3, qk_norm=True)
    fan_in = {"in_proj": 256, "attn_out": 128, "ff_out": 768, "token_emb": 1}
    for name, parameter in palm.named_parameters():
        assert name.endswith("weight")  # no biases
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            std = fan_in[name.split(".")[-2]] ** -0.5
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name
            assert parameter.mean().item() == pytest.approx(0, abs=0.02 * std), name
    assert palm(torch.randint(2000, (2, 64))).std().item() == pytest.approx(1, rel=0.1)
    assert not torch.equal(palm.token_emb.weight, PaLM.from_config(palm.config).token_emb.weight)


@pytest.mark.parametrize("name, billions", [("8B", 8.63), ("62B", 62.50), ("540B", 540.35)])
def test_presets_have_the_sizes_of_table_1(name, billions):
    with torch.device("meta"):
        palm = PaLM.preset(name)
    count = sum(parameter.numel() for parameter in palm.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.01)
    assert palm.config.kv_heads == 1 and palm.config.dim_head == 256 and palm.num_tokens == 256_000
    assert palm(torch.zeros(1, 4, dtype=torch.long, device="meta")).shape == (1, 4, 256_000)


def test_a_preset_takes_overrides_and_refuses_what_it_does_not_know():
    with torch.device("meta"):
        palm = PaLM.preset("8B", num_tokens=100, depth=1)
    assert (palm.num_tokens, len(palm.layers), palm.config.dim) == (100, 1, 4096)
    with pytest.raises(ValueError, match=r"got preset '9B', expected one of .*540B"):
        PaLM.preset("9B")


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "qk_norm": True}, {"ff_inner_dim": 5}], ids=str)
def test_parameters_are_counted_by_hand(options):
    palm = small(**options)
    kv, inner = options.get("kv_heads", 1) * 6, options.get("ff_inner_dim", 24)
    block = 12 + 12 * (24 + 2 * kv + 2 * inner) + 24 * 12 + inner * 12 + (24 + kv) * ("qk_norm" in options)
    assert sum(p.numel() for p in palm.parameters()) == 19 * 12 + 2 * block + 12


def test_the_config_rebuilds_the_model():
    palm = small(kv_heads=2, qk_norm=True, xpos=True)
    again = PaLM.from_config(PaLMConfig.from_dict(dataclasses.asdict(palm.config))).double()
    again.load_state_dict(palm.state_dict())
    assert torch.equal(again(some_tokens()), palm(some_tokens()))
    with pytest.raises(ValueError, match=r"unknown fields .'rotary_dim'"):
        PaLMConfig.from_dict({**dataclasses.asdict(palm.config), "rotary_dim": 3})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 8, "kv_heads": 3}, "heads=8 is not divisible by kv_heads=3"),
        ({"heads": 2, "kv_heads": 4}, "heads=2 is not divisible by kv_heads=4"),
        ({"dim_head": 7}, "dim_head is 7; expected an even number"),
        ({"dim": 0}, "dim is 0; expected at least 1"),
        ({"num_tokens": -1}, "num_tokens is -1"),
        ({"depth": 0}, "depth is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"ff_mult": 0}, "feed-forward has 0 units"),
        ({"ff_inner_dim": 0}, "feed-forward has 0 units"),
        ({"dropout": 1.0}, "dropout is 1.0; expected 0 <= dropout < 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"rotary_theta": 0.0}, "rotary_theta is 0.0; expected above 0"),
        ({"norm_eps": -1e-5}, "norm_eps is -1e-05; expected at least 0"),
        ({"z_loss": -1.0}, "z_loss is -1.0; expected at least 0"),
    ],
)
def test_numbers_that_make_no_palm_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        PaLM(**{**SMALL, **options})


def test_a_loss_needs_two_tokens():
    with pytest.raises(ValueError, match="got 1 tokens a row, expected at least 2 for a loss"):
        small()(some_tokens(2, 1), return_loss=True)


def test_autocast_stays_near_float32():
    palm, tokens = small(dim=64, dim_head=32, dtype=torch.float32, kv_heads=2, qk_norm=True), some_tokens(2, 40)
    expected_logits, expected = palm(tokens), palm(tokens, return_loss=True)
    expected_grads = gradients(palm, expected)
    for flash_attn in (True, False):
        palm = small(dim=64, dim_head=32, dtype=torch.float32, kv_heads=2, qk_norm=True, flash_attn=flash_attn)
        with torch.autocast("cpu", torch.bfloat16):
            logits, loss = palm(tokens), palm(tokens, return_loss=True)
        assert loss.dtype == torch.float32
        assert (logits.float() - expected_logits).square().mean().sqrt() < 0.03
        assert loss.item() == pytest.approx(expected.item(), abs=0.01)
        for ours, theirs in zip(gradients(palm, loss), expected_grads, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_bfloat16_weights_stay_near_float64():
    exact, tokens = small(dim=64, dim_head=32).eval(), some_tokens(2, 40)
    palm = small(dim=64, dim_head=32, dtype=torch.bfloat16).eval()
    palm.load_state_dict(exact.state_dict())
    assert (palm(tokens).double() - exact(tokens)).square().mean().sqrt() < 0.05
    assert palm(tokens, return_loss=True).item() == pytest.approx(exact(tokens, return_loss=True).item(), abs=0.02)


MASKED = {"key_mask": torch.ones(2, 9).tril(6).bool(), "document_ids": (torch.arange(9) // 4).expand(2, 9)}


@pytest.mark.parametrize(
    "variant, masks", [("multi-query", {}), ("all at once", MASKED)], ids=["multi-query", "all at once, masked"]
)
def test_compiles_into_one_graph_with_the_same_gradients(variant, masks):
    torch.compiler.reset()
    palm, tokens = small(**{**VARIANTS[variant], "depth": 1}, z_loss=0.1), some_tokens()
    compiled = torch.compile(palm, fullgraph=True, backend="aot_eager")
    losses = palm(tokens, return_loss=True, **masks), compiled(tokens, return_loss=True, **masks)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-10)
    assert_all_close(*(gradients(palm, loss) for loss in losses), atol=1e-10)


@pytest.mark.parametrize(
    "tokens, loss, expected",
    [
        (torch.tensor([[1, 16, 2]]), False, "token id 16 is outside the vocabulary; expected 0 to 15"),
        (torch.tensor([[1, -1, 2]]), False, "token id -1 is outside the vocabulary"),
        (torch.tensor([[1, 2, 16]]), True, "token id 16 is outside"),  # a target alone
        (torch.tensor([[1, 2, -100]]), True, "token id -100 is outside"),
        (torch.tensor([1, 2]), False, r"torch.int64 of the shape \(2,\); expected ids.* `b n`.*unsqueeze"),
        (torch.tensor([1, 2]), True, r"of the shape \(2,\)"),
        (torch.tensor([[1.0, 2.0]]), False, r"torch.float32 of the shape \(1, 2\); expected ids, torch.int64"),
        (torch.tensor([[True, False]]), False, "torch.bool of the shape"),
        (torch.tensor([[1, 2]], dtype=torch.uint8), False, "torch.uint8 of the shape"),
        (torch.zeros(1, 0, dtype=torch.long), False, r"of the shape \(1, 0\)"),
    ],
)
def test_tokens_that_are_none_are_refused_in_words(tokens, loss, expected):
    palm = PaLM(num_tokens=16, dim=16, depth=1, heads=1, dim_head=8)
    with pytest.raises(ValueError, match=expected):
        palm(tokens, return_loss=loss)
    if not loss:
        with pytest.raises(ValueError, match=expected):
            RewardModel(palm)(tokens)
