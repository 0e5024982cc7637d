"""The reward model: padding and batch-mates do not matter, what the head reads, its losses, and what is saved."""

import copy
import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import join
from tests.factories import palm_of

NUM_TOKENS = 23
POOLINGS = ("last", "mean", "mean_all")


def make_palm(**options) -> PaLM:
    return palm_of(**{"num_tokens": NUM_TOKENS, **options})


def make_model(*, palm: dict | None = None, **options) -> RewardModel:
    """A model of which no part is at rest: embeddings and adapters are not zero."""
    model = RewardModel(make_palm(**(palm or {})), **options)
    generator = torch.Generator().manual_seed(1)
    parameters = [model.prompt_embed, model.response_embed, *model.palm.finetune_modules.parameters()]
    with torch.no_grad():
        for parameter in parameters if model.head.bias is None else [*parameters, model.head.bias]:
            parameter.normal_(generator=generator)
    return model


def rows(seed: int, lengths: list[tuple[int, int]]) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda length: torch.randint(NUM_TOKENS, (length,), generator=generator)  # noqa: E731
    return [draw(p) for p, _ in lengths], [draw(r) for _, r in lengths]


@settings(max_examples=25)
@given(
    st.sampled_from(POOLINGS),
    st.booleans(),
    st.sampled_from([0, 4]),
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    st.sampled_from(["right", "left", "both"]),
    st.integers(0, 99),
)
def test_a_row_alone_equals_the_row_among_others_and_pads(device, pooling, causal, bins, lora, lengths, side, seed):
    model = make_model(palm={"causal": causal}, pooling=pooling, num_binned_output=bins, use_lora=lora)
    model.to(device, torch.float64)
    prompts, responses = ([row.to(device) for row in part] for part in rows(seed, lengths))
    width = max(p + r for p, r in lengths) + 3
    tokens = torch.randint(NUM_TOKENS, (len(lengths), width), device=device)  # garbage where the pads are
    key_mask, prompt_mask = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        size = len(prompt) + len(response)
        start = {"right": 0, "left": width - size, "both": 1}[side]
        tokens[row, start : start + size] = torch.cat((prompt, response))
        key_mask[row, start : start + size] = True
        prompt_mask[row, start : start + len(prompt)] = True
    with torch.no_grad():
        together = model(tokens, key_mask, prompt_mask=prompt_mask)
        alone = torch.cat([model.score(join([p], [r])) for p, r in zip(prompts, responses, strict=True)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
        by_lengths = model(tokens, key_mask, prompt_lengths=torch.tensor([p for p, _ in lengths], device=device))
        torch.testing.assert_close(by_lengths, alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(model.score(join(prompts, responses), batch_size=2), alone, rtol=0, atol=1e-10)


def test_pads_enter_no_loss_and_no_gradient():
    model = make_model().double()
    sequences = join(*rows(0, [(3, 4), (2, 1)]))
    labels = torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = []
    for pads in (0, 5):
        tokens = F.pad(sequences.tokens, (0, pads), value=7)
        tokens[1, 3:] = torch.randint(NUM_TOKENS, (len(tokens[1, 3:]),))
        masks = (F.pad(mask, (0, pads)) for mask in (sequences.key_mask, sequences.prompt_mask))
        key_mask, prompt_mask = masks
        loss = model(tokens, key_mask, prompt_mask=prompt_mask, labels=labels)
        found.append((loss, *torch.autograd.grad(loss, model.finetune_parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


class LastColumn(RewardModel):
    """Reads the last column, whether a token stands there or a pad."""

    def _pool(self, embeds, key_mask, prompt_mask):
        return embeds[:, -1]


def test_reading_the_last_column_is_told_from_reading_the_last_token():
    sequences = join(*rows(0, [(3, 4), (2, 1)]))
    for kind, agrees in ((RewardModel, True), (LastColumn, False)):
        model = kind(make_palm())
        together = model.score(sequences)
        alone = torch.cat([model.score(sequences.select(slice(row, row + 1))) for row in range(2)])
        assert torch.allclose(together, alone, rtol=0, atol=1e-5) == agrees


def planted(pooling: str) -> tuple[RewardModel, torch.Tensor]:
    """A model whose blocks add nothing, and whose head reads a token's id where its embedding has been planted."""
    model = make_model(palm={"dim": 32}, pooling=pooling)
    with torch.no_grad():
        for parameter in (model.prompt_embed, model.response_embed):
            parameter.zero_()
        for layer in model.palm.layers:
            layer.attn_out.weight.zero_(), layer.ff_out.weight.zero_()
        embeds = model.palm.norm(model.palm.token_emb.weight)
        model.head.weight.copy_(torch.linalg.lstsq(embeds, torch.arange(NUM_TOKENS).float()[:, None]).solution.mT)
    return model, torch.tensor([[11, 5, 0, 9, 22]])


def test_the_head_reads_the_last_real_token_or_means():
    def score(pooling, key_mask=None, **options):
        model, tokens = planted(pooling)
        return float(model(tokens, None if key_mask is None else torch.tensor([key_mask]), **options).detach())

    prompt_mask = torch.tensor([[True, True, False, False, False]])
    real = [False, True, True, True, False]
    assert score("last") == pytest.approx(22, abs=1e-3)
    assert score("last", real) == pytest.approx(9, abs=1e-3)
    assert score("last", [True, True, True, False, False]) == pytest.approx(0, abs=1e-3)  # token 0 is a token
    assert score("last", prompt_mask=prompt_mask) == pytest.approx(22, abs=1e-3)
    assert score("mean") == pytest.approx((11 + 5 + 0 + 9 + 22) / 5, abs=1e-3)
    assert score("mean", real) == pytest.approx((5 + 0 + 9) / 3, abs=1e-3)
    assert score("mean", prompt_mask=prompt_mask) == pytest.approx((0 + 9 + 22) / 3, abs=1e-3)
    assert score("mean", real, prompt_mask=prompt_mask) == pytest.approx((0 + 9) / 2, abs=1e-3)
    assert score("mean_all", real, prompt_mask=prompt_mask) == pytest.approx((5 + 0 + 9) / 3, abs=1e-3)


@torch.no_grad()
def test_a_binned_head_reports_its_expectation():
    model = RewardModel(make_palm(), num_binned_output=3)
    model.head.weight.zero_()
    model.head.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    tokens = torch.randint(NUM_TOKENS, (2, 5))
    for _ in range(2):
        torch.testing.assert_close(model(tokens), torch.full((2,), 0.3 * 1 + 0.5 * 2))
    loss = model(tokens, labels=torch.tensor([0, 2]))
    assert float(loss) == pytest.approx(-(math.log(0.2) + math.log(0.5)) / 2)


@torch.no_grad()
def test_the_losses_of_labels_by_hand_and_in_parts():
    tokens = torch.randint(NUM_TOKENS, (3, 5))
    scalar, binned = make_model(), make_model(num_binned_output=4)
    labels, bins = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([3, 0, 1])
    squares = [(a - b) ** 2 for a, b in zip(scalar(tokens).tolist(), labels.tolist(), strict=True)]
    assert float(scalar(tokens, labels=labels)) == pytest.approx(sum(squares) / 3)
    for model, wanted in ((scalar, labels), (binned, bins)):
        whole = model(tokens, labels=wanted)
        parts = [model(tokens[part], labels=wanted[part], denominator=3) for part in (slice(0, 1), slice(1, 3))]
        torch.testing.assert_close(sum(parts), whole)
        model.normalise(model(tokens) + torch.arange(3))
        torch.testing.assert_close(model(tokens, labels=wanted), whole)  # labels are in units of the raw scores
    with pytest.raises(ValueError, match="expected 3, one for each row"):
        scalar(tokens, labels=labels[:, None])


def test_prompt_and_response_are_told_apart():
    model = make_model()
    tokens = torch.randint(NUM_TOKENS, (1, 6))
    scores = [float(model(tokens).detach())]
    scores += [float(model(tokens, prompt_lengths=torch.tensor([n])).detach()) for n in (0, 2, 6)]
    assert len(set(scores)) == 4
    fresh = RewardModel(make_palm())  # both embeddings start at zero
    torch.testing.assert_close(fresh(tokens), fresh(tokens, prompt_lengths=torch.tensor([2])))
    with pytest.raises(ValueError, match="expected one of them"):
        model(tokens, prompt_mask=torch.ones_like(tokens).bool(), prompt_lengths=torch.tensor([2]))


def test_the_given_palm_is_left_alone_and_dropout_is_off_in_the_copy():
    palm = make_palm(dropout=0.5)
    palm.layers[0].in_proj.weight.requires_grad_(False)
    before = copy.deepcopy(palm)
    model = RewardModel(palm, use_lora=True).train()
    tokens = torch.randint(NUM_TOKENS, (2, 7))
    torch.testing.assert_close(model(tokens), model(tokens), rtol=0, atol=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(tokens).sum().backward()
    optimizer.step()
    assert palm.dropout.p == 0.5 and not palm.finetune_modules
    for (name, one), other in zip(palm.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad and one.grad is None, name


@pytest.mark.parametrize("use_lora", [False, True])
def test_what_is_trained(use_lora):
    palm = make_palm()
    palm.add_finetune_params("other")
    model = RewardModel(palm, use_lora=use_lora, lora_r=3)
    model(torch.randint(NUM_TOKENS, (2, 5)), prompt_lengths=torch.tensor([2, 3])).square().sum().backward()
    has_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    head = {"prompt_embed", "response_embed", "head.weight"}
    names = {name for name, _ in model.named_parameters() if name.startswith("palm.")}
    adapters = {name for name in names if ".finetune_modules.reward." in name}
    base = {name for name in names if ".finetune_modules." not in name}
    assert has_gradient == head | (adapters if use_lora else base)
    assert bool(adapters) == use_lora
    by_name = dict(model.named_parameters())
    assert {id(p) for p in model.finetune_parameters()} == {id(by_name[name]) for name in has_gradient}


@pytest.mark.parametrize("targets", [["v", "ff_out"], "all-linear"], ids=str)
def test_the_adapters_of_a_reward_model_are_on_the_matrices_asked_for(targets, tmp_path):
    model = RewardModel(make_palm(), use_lora=True, lora_r=2, lora_targets=targets)
    everything = ("q", "k", "v", "out", "gate", "value", "ff_out")
    expected = everything if targets == "all-linear" else tuple(targets)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if "finetune" in name} == set(expected)
    model.save_pretrained(tmp_path)
    assert RewardModel.from_pretrained(tmp_path).palm.finetune_modules["reward"][0].targets == expected
    with pytest.raises(ValueError, match="and use_lora=False, expected use_lora=True"):
        RewardModel(make_palm(), lora_targets=targets)


def test_lora_can_be_switched_off():
    model, base = make_model(use_lora=True), make_model()
    tokens = torch.randint(NUM_TOKENS, (2, 5))
    model.load_state_dict({**base.state_dict(), **{k: v for k, v in model.state_dict().items() if "finetune" in k}})
    torch.testing.assert_close(model(tokens, disable_lora=True), base(tokens))
    assert (model(tokens) - base(tokens)).abs().min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("bins", [0, 4])
def test_normalisation_is_applied_once_and_composes(bins):
    model = make_model(num_binned_output=bins)
    one, other = (join(*rows(seed, [(2, n % 5 + 1) for n in range(40)])) for seed in (0, 1))
    raw = model.score(one)
    model.normalise(raw)
    scores = model.score(one)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(scores, (raw - raw.mean()) / raw.std(correction=0))
    torch.testing.assert_close(model.score(one, raw=True), raw)
    model.normalise(scores)  # the same set again changes nothing
    torch.testing.assert_close(model.score(one), scores, rtol=0, atol=1e-5)
    old = model.score(other)
    model.normalise(old * 3 + 2)
    torch.testing.assert_close(model.score(other), (old - 3 * old.mean() - 2) / (3 * old.std(correction=0)))
    for useless in (torch.ones(3), torch.tensor([1.0, math.nan]), torch.ones(1), torch.rand(2, 2)):
        with pytest.raises(ValueError, match="two that differ"):
            model.normalise(useless)


def test_scores_are_float32_under_autocast_and_of_a_bfloat16_model():
    tokens = torch.randint(NUM_TOKENS, (8, 5))
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(tokens)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, model(tokens), rtol=0, atol=0.1)
    assert model.bfloat16()(tokens).dtype == torch.float32


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bins", [0, 2])
def test_the_head_without_bins_read_at_the_last_token_gives_one_score_a_token_and_has_no_bias(pooling, bins):
    model = make_model(pooling=pooling, num_binned_output=bins)
    assert model.reads_one_score_a_token == (pooling == "last" and bins == 0)
    assert (model.head.bias is None) == (bins == 0) and model.head.out_features == max(bins, 1)


@pytest.mark.parametrize("options", [{"num_binned_output": 1}, {"num_binned_output": -1}])
def test_a_single_bin_is_refused(options):
    with pytest.raises(ValueError, match="expected 2 or more bins"):
        RewardModel(make_palm(), **options)


# ---- files


def saved_model(**options) -> RewardModel:
    model = make_model(**{"num_binned_output": 4, "pooling": "mean", "use_lora": True, "lora_r": 2, **options})
    model.normalise(torch.tensor([0.5, 2.0, 7.0]))
    return model


def assert_same(one: RewardModel, other: RewardModel) -> None:
    sequences = join(*rows(3, [(2, 3), (4, 1), (1, 6)]))
    assert torch.equal(one.score(sequences), other.score(sequences))
    one_state, other_state = one.state_dict(), other.state_dict()
    assert one_state.keys() == other_state.keys()
    assert all(torch.equal(one_state[name], other_state[name]) for name in one_state)
    assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in other.parameters()]


def test_a_folder_opens_as_the_same_model(tmp_path):
    model = saved_model(palm={"dropout": 0.3, "causal": False})
    model.save_pretrained(tmp_path)
    opened = RewardModel.from_pretrained(tmp_path)
    assert_same(opened, model)
    assert (opened.pooling, opened.num_binned_output, opened.lora_scope) == ("mean", 4, "reward")
    assert {m.p for m in opened.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
    into = RewardModel(make_palm(causal=False), num_binned_output=4)  # without LoRA, and read at the last token
    assert_same(into.load(tmp_path), model)
    other = saved_model(palm={"causal": False}, num_binned_output=0)
    other.save_pretrained(tmp_path, max_shard_size=3000)
    assert_same(RewardModel.from_pretrained(tmp_path), other)


def test_a_state_dict_loads(tmp_path):
    model = saved_model()
    torch.save(model.state_dict(), tmp_path / "reward_model.pt")
    into = RewardModel(make_palm(), num_binned_output=4, pooling="mean", use_lora=True, lora_r=2)
    assert_same(into.load(tmp_path / "reward_model.pt"), model)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_nothing_is_executed_and_nothing_changes_where_loading_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = saved_model()
    before = copy.deepcopy(model)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"head.weight": Harmful()}, protocol=2))
    torch.save({"head.weight": Harmful()}, "zip.pt")
    make_palm().save_pretrained("palm")
    torch.save(make_palm().state_dict(), "palm.pt")
    saved_model(num_binned_output=0).save_pretrained("scalar")
    saved_model(palm={"dim": 32}).save_pretrained("wide")
    saved_model(lora_r=3).save_pretrained("rank")
    saved_model(palm={"xpos": True}).save_pretrained("xpos")
    for name, message in {
        "pickle.pt": "tensors only",
        "zip.pt": "tensors only",
        "palm": "expected 'palm_reward'",
        "palm.pt": "lacks head.bias",
        "scalar": "num_binned_output=0, and this model 4",
        "wide": "dim=32 there and 16 here",
        "rank": "finetune scope 'reward'",
        "xpos": "xpos=True there",
    }.items():
        with pytest.raises(ValueError, match=message):
            model.load(name)
    with pytest.raises(FileNotFoundError):
        model.load("nowhere.pt")
    with pytest.raises(ValueError, match="palm_reward"):
        PaLM.from_pretrained("scalar")
    assert_same(model, before)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "change", [{"pooling": "max"}, {"num_binned_output": 1}, {"lora_scope": "none"}, {"palm": 3}, {"unknown": 1}]
)
def test_a_spoilt_config_is_refused_by_name(tmp_path, change):
    import json

    saved_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=r"config\.json does not describe a RewardModel"):
        RewardModel.from_pretrained(tmp_path)


# ---- palm-rlhf-pytorch


def their_model(bins: int, use_lora: bool, causal: bool, **options):
    theirs = pytest.importorskip("palm_rlhf_pytorch", reason="needs the bench extra: palm-rlhf-pytorch is missing")
    torch.manual_seed(0)
    palm = theirs.PaLM(num_tokens=NUM_TOKENS, dim=16, depth=2, heads=2, dim_head=8, causal=causal)
    model = theirs.RewardModel(
        palm, num_binned_output=bins, use_lora=use_lora, lora_r=2, sample_from_bins=False, **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("bins", [0, 5])
@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_scores_of_palm_rlhf_pytorch_are_the_same(tmp_path, bins, use_lora, causal):
    model = their_model(bins, use_lora, causal)
    torch.save(model.state_dict(), tmp_path / "reward_model.pt")
    opened = RewardModel.from_palm_rlhf_pytorch(tmp_path / "reward_model.pt", causal=causal)
    loaded = RewardModel(PaLM.from_palm_rlhf_pytorch(make_state(model), causal=causal), num_binned_output=bins).load(
        tmp_path / "reward_model.pt"
    )
    tokens = torch.randint(NUM_TOKENS, (3, 9))
    for ours in (opened, loaded):
        for options in ({}, {"prompt_mask": torch.arange(9).expand(3, 9) < 4}):
            expected = model(tokens, **options)
            if bins:
                expected = (expected.softmax(-1) * torch.arange(5.0)).sum(-1)
            assert expected.std() > 0.02
            torch.testing.assert_close(ours(tokens, **options), expected, rtol=0, atol=1e-5)
        if use_lora:
            off = model(tokens, disable_lora=True)
            off = (off.softmax(-1) * torch.arange(5.0)).sum(-1) if bins else off
            torch.testing.assert_close(ours(tokens, disable_lora=True), off, rtol=0, atol=1e-5)
    if causal:  # their attention sees pads, but not to the right
        key_mask = torch.arange(9).expand(3, 9) < torch.tensor([[9], [4], [6]])
        expected = model(tokens, key_mask)
        expected = (expected.softmax(-1) * torch.arange(5.0)).sum(-1) if bins else expected
        torch.testing.assert_close(opened(tokens, key_mask), expected, rtol=0, atol=1e-5)
    labels = torch.tensor([0, 4, 2]) if bins else torch.tensor([0.5, -1.0, 2.0])
    torch.testing.assert_close(opened(tokens, labels=labels), model(tokens, labels=labels), rtol=0, atol=1e-5)


def make_state(model) -> dict:
    """The state dict of the base inside their reward model."""
    return {name: tensor for name, tensor in model.palm.state_dict().items() if not name.startswith("finetune_modules")}


def test_a_lora_of_theirs_by_another_name_is_asked_for():
    state = their_model(0, True, True, reward_lora_scope="mine").state_dict()
    with pytest.raises(ValueError, match=r"finetune scopes \['mine'\]"):
        RewardModel.from_palm_rlhf_pytorch(state)
    assert RewardModel.from_palm_rlhf_pytorch(state, reward_lora_scope="mine").lora_scope == "mine"
    state["to_pred.0.weight"] = state["to_pred.0.weight"][:, 1:]
    with pytest.raises(ValueError, match=r"another shape of to_pred\.0\.weight"):
        RewardModel.from_palm_rlhf_pytorch(state, reward_lora_scope="mine")
