"""Laws of a PaLM: the future, the padding, the neighbours, the cache and the packing of a row change nothing."""

import dataclasses
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf import PaLM
from palm_rlhf.model.inputs import default_positions
from tests import factories

VOCABULARY = 17
VARIANTS = {
    "multi-query": {},
    "grouped-query": {"heads": 4, "kv_heads": 2, "qk_norm": True},
    "xpos": {"xpos": True, "heads": 2, "kv_heads": 2},
    "eager": {"flash_attn": False},
    "serial": {
        "block": "serial",
        "norm": "rms",
        "qkv_bias": True,
        "qk_norm": True,
        "heads": 4,
        "kv_heads": 2,
        "tie_embeddings": False,
        "rotary_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
}
every_causal = pytest.mark.parametrize("variant", VARIANTS)
every_variant = pytest.mark.parametrize("variant", [*VARIANTS, "bidirectional"])
SEEDS = st.integers(0, 2**16)
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
UNEVEN = st.lists(st.integers(2, 9), min_size=2, max_size=4, unique=True)


@functools.cache
def palm_of(variant, device) -> PaLM:
    options = {"causal": False} if variant == "bidirectional" else VARIANTS[variant]
    sizes = {"num_tokens": VOCABULARY, "dim": 12, "depth": 2, "heads": 3, "dim_head": 4, "ff_mult": 2}
    return factories.palm_of(**{**sizes, **options}).to(device, torch.float64)


def token_rows(lengths, seed, device):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).to(device) for length in lengths]


def assert_close(got, expected, atol=1e-11):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def assert_same_training(palm, loss, expected):
    """The same loss, and the same gradient of every parameter."""
    assert_close(loss, expected)
    parameters = list(palm.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected)), strict=True):
        assert_close(ours, theirs)


def mean_loss_alone(palm, rows):
    """Every row in a forward of its own, averaged over all their targets."""
    targets = [len(row) - 1 for row in rows]
    losses = [palm(row[None], return_loss=True) * n for row, n in zip(rows, targets, strict=True) if n]
    return sum(losses) / sum(targets)


# the future


@every_causal
@settings(max_examples=15)
@given(length=st.integers(2, 40), seed=SEEDS, data=st.data())
def test_future_tokens_cannot_change_the_past(variant, length, seed, data, device):
    palm, now = palm_of(variant, device), data.draw(st.integers(0, length - 2))
    tokens, other = torch.stack(token_rows([length, length], seed, device)).split(1)
    changed = torch.cat((tokens[:, : now + 1], other[:, now + 1 :]), dim=1)
    assert_close(palm(changed)[:, : now + 1], palm(tokens)[:, : now + 1], atol=1e-12)
    assert_close(palm(tokens[:, : now + 1]), palm(tokens)[:, : now + 1], atol=1e-12)


@every_causal
def test_no_gradient_comes_from_the_future(variant, device):
    """Of each place's logits with respect to each place's embedding."""
    palm, (row,) = palm_of(variant, device), token_rows([7], 0, device)
    extra = torch.zeros(1, 7, 12, dtype=torch.float64, device=device, requires_grad=True)
    logits = palm(row[None], extra_embed=extra)
    for now in range(7):
        gradient = torch.autograd.grad(logits[0, now].square().sum(), extra, retain_graph=True)[0][0]
        assert not gradient[now + 1 :].any() and gradient[: now + 1].abs().sum(dim=-1).all()


def test_a_bidirectional_model_breaks_the_law_of_causality(device):
    palm, (row,) = palm_of("bidirectional", device), token_rows([7], 0, device)
    assert (palm(row[None])[:, :3] - palm(row[None, :3])).abs().max() > 1e-3


# padding and neighbours


def padded(rows, seed, *, side, extra=0):
    """Rows side by side, with garbage ids where no row has a token, and the mask of the tokens."""
    generator, device = torch.Generator().manual_seed(seed), rows[0].device
    length = max(map(len, rows)) + extra
    tokens = torch.randint(VOCABULARY, (len(rows), length), generator=generator).to(device)
    key_mask = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
    for block, keep, row in zip(tokens, key_mask, rows, strict=True):
        places = {
            "right": torch.arange(len(row)),
            "left": torch.arange(length - len(row), length),
            "between": torch.randperm(length, generator=generator)[: len(row)].sort().values,
        }[side]
        block[places], keep[places] = row, True
    return tokens, key_mask


@every_variant
@pytest.mark.parametrize("side", ["left", "right", "between"])
@settings(max_examples=8)
@given(lengths=UNEVEN, extra=st.integers(0, 3), seed=SEEDS)
def test_padding_and_neighbours_do_not_change_the_logits(variant, lengths, extra, side, seed, device):
    palm, rows = palm_of(variant, device), token_rows(lengths, seed, device)
    tokens, key_mask = padded(rows, seed, side=side, extra=extra)
    logits = palm(tokens, key_mask=key_mask)
    assert logits.isfinite().all()
    for row, row_logits, keep in zip(rows, logits, key_mask, strict=True):
        assert_close(row_logits[keep], palm(row[None])[0])


@every_causal
@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=8)
@given(lengths=UNEVEN, extra=st.integers(0, 3), seed=SEEDS)
def test_padding_and_neighbours_do_not_change_the_training(variant, lengths, extra, side, seed, device):
    palm, rows = palm_of(variant, device), token_rows(lengths, seed, device)
    tokens, key_mask = padded(rows, seed, side=side, extra=extra)
    assert_same_training(palm, palm(tokens, return_loss=True, key_mask=key_mask), mean_loss_alone(palm, rows))


def test_a_row_of_pads_alone_is_harmless(device):
    palm, rows = palm_of("multi-query", device), token_rows([6, 4], 0, device)
    tokens, key_mask = padded([*rows, torch.empty(0, dtype=torch.long, device=device)], 1, side="left")
    assert_same_training(palm, palm(tokens, return_loss=True, key_mask=key_mask), mean_loss_alone(palm, rows))


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_its_mask_padding_is_seen(side, device):
    """What the laws above would say of a model that ignored the mask."""
    palm, rows = palm_of("multi-query", device), token_rows([6, 4], 0, device)
    tokens, key_mask = padded(rows, 1, side=side)
    assert (palm(tokens, return_loss=True) - mean_loss_alone(palm, rows)).abs() > 1e-3
    if side == "left":
        assert (palm(tokens)[1][key_mask[1]] - palm(rows[1][None])[0]).abs().max() > 1e-3


# the cache


def pieces(length, cuts):
    """Neighbouring pairs of the sorted cuts of a length."""
    return itertools.pairwise(sorted({0, length, *(cut for cut in cuts if cut < length)}))


@every_causal
@settings(max_examples=15)
@given(lengths=UNEVEN, cuts=st.lists(st.integers(1, 8), max_size=5), seed=SEEDS)
def test_cached_equals_uncached_at_every_step(variant, lengths, cuts, seed, device):
    palm, rows = palm_of(variant, device), token_rows(lengths, seed, device)
    tokens, key_mask = padded(rows, seed, side="left")
    expected = palm(tokens, key_mask=key_mask)
    cache = palm.make_cache(len(rows), tokens.shape[1], left_padding=(~key_mask).sum(dim=-1))
    with torch.no_grad():
        for start, stop in pieces(tokens.shape[1], cuts):
            logits, keep = palm(tokens[:, start:stop], cache=cache), key_mask[:, start:stop]
            assert_close(logits[keep], expected[:, start:stop][keep])
    assert cache.length == tokens.shape[1]


@every_causal
@settings(max_examples=10)
@given(lengths=UNEVEN, data=st.data(), seed=SEEDS)
def test_rows_of_a_cache_may_be_dropped_doubled_and_moved(variant, lengths, data, seed, device):
    palm, rows = palm_of(variant, device), token_rows([length + 2 for length in lengths], seed, device)
    tokens, key_mask = padded(rows, seed, side="left")
    cache = palm.make_cache(len(rows), tokens.shape[1], left_padding=(~key_mask).sum(dim=-1))
    order = torch.tensor(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5)), device=device)
    with torch.no_grad():
        palm(tokens[:, :-2], cache=cache)
        cache.select(order)
        logits = palm(tokens[order, -2:], cache=cache)
    for row, row_logits in zip(order, logits, strict=True):
        assert_close(row_logits, palm(rows[row][None])[0, -2:])


@every_causal
@settings(max_examples=10)
@given(batch=st.integers(1, 3), first=st.sampled_from([0, 254, 4094, 70_000]), seed=SEEDS)
def test_tokens_read_one_by_one_equal_those_read_at_once_wherever_they_stand(variant, batch, first, seed, device):
    """In train() mode, with dropout and a scope: neither a lookup of angles nor the short way changes a number."""
    palm = scoped(variant, seed, device)
    tokens = torch.stack(token_rows([6] * batch, seed, device))
    positions = torch.arange(first, first + 6, device=device).unsqueeze(0)
    with torch.no_grad():
        expected = palm.eval()(tokens, positions=positions, finetune_scope="scope")
        palm.train()
        cache = palm.make_cache(batch, 6)
        for i in range(6):
            one = {"cache": cache, "positions": positions[:, i : i + 1], "finetune_scope": "scope"}
            assert_close(palm(tokens[:, i : i + 1], **one)[:, 0], expected[:, i])
        assert (palm(tokens, positions=positions) - expected).abs().max() > 1e-3  # without the scope, with dropout


def scoped(variant, seed, device):
    """A copy of a variant with dropout, and with a scope that changes what it says."""
    config = dataclasses.replace(palm_of(variant, device).config, dropout=0.5)
    palm = PaLM.from_config(config).to(device, torch.float64)
    palm.load_state_dict(palm_of(variant, device).state_dict())
    palm.add_finetune_params("scope", r=2)
    torch.manual_seed(seed)
    for parameter in palm.finetune_parameters("scope"):
        torch.nn.init.normal_(parameter)
    return palm


def test_positions_and_mask_of_a_cache_by_hand(device):
    cache = palm_of("multi-query", device).make_cache(2, 6, left_padding=torch.tensor([2, 0], device=device))
    assert cache.positions(3, device).tolist() == [[0, 0, 0], [0, 1, 2]]
    assert cache.key_mask(3).tolist() == [[False, False, True], [True, True, True]]
    cache.advance(3)
    assert cache.positions(1, device).tolist() == [[1], [3]]
    assert cache.key_mask(1).tolist() == [[False, False, True, True], [True] * 4]


def test_a_cache_says_when_it_is_full_or_misused(device):
    palm, (row,) = palm_of("multi-query", device), token_rows([5], 0, device)
    cache = palm.make_cache(1, 6)
    palm(row[None], cache=cache)
    with pytest.raises(ValueError, match="7 tokens in a cache with room for 6"):
        palm(row[None, :2], cache=cache)
    with pytest.raises(ValueError, match="a cache and a mask"):
        palm(row[None, :1], cache=cache, key_mask=torch.ones(1, 1, dtype=torch.bool, device=device))
    with pytest.raises(ValueError, match="bidirectional PaLM has no cache"):
        palm_of("bidirectional", device).make_cache(1, 6)


# several documents in a row


def packed(rows_of_documents, seed):
    """Documents end to end, the rows padded with garbage on their right: tokens, document ids, mask."""
    generator = torch.Generator().manual_seed(seed)
    tokens, key_mask = padded([torch.cat(documents) for documents in rows_of_documents], seed, side="right", extra=2)
    document_ids = torch.zeros_like(tokens)
    for ids, documents in zip(document_ids, rows_of_documents, strict=True):
        names = torch.randperm(9, generator=generator)[: len(documents) + 1]  # the last one is for the pads
        lengths = torch.tensor([*map(len, documents), len(ids) - sum(map(len, documents))])
        ids.copy_(names.repeat_interleave(lengths))
    return tokens, document_ids, key_mask


@every_variant
@pytest.mark.parametrize("with_mask", [True, False], ids=["masked", "unmasked"])
@settings(max_examples=8)
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=3), seed=SEEDS)
def test_packed_documents_have_the_logits_of_separate_ones(variant, lengths, seed, with_mask, device):
    palm = palm_of(variant, device)
    documents = [token_rows(row, seed + n, device) for n, row in enumerate(lengths)]
    tokens, document_ids, key_mask = packed(documents, seed)
    logits = palm(tokens, document_ids=document_ids, key_mask=key_mask if with_mask else None)
    for row, row_logits in zip(documents, logits, strict=True):
        parts = row_logits.split([*map(len, row), len(row_logits) - sum(map(len, row))])
        for document, got in zip(row, parts[:-1], strict=True):
            assert_close(got, palm(document[None])[0])


@every_causal
@settings(max_examples=10)
@given(lengths=st.lists(UNEVEN, min_size=1, max_size=3), seed=SEEDS)
def test_packed_documents_train_as_separate_ones(variant, lengths, seed, device):
    """No document's first token is predicted from the end of another."""
    palm = palm_of(variant, device)
    documents = [token_rows(row, seed + n, device) for n, row in enumerate(lengths)]
    tokens, document_ids, key_mask = packed(documents, seed)
    loss = palm(tokens, return_loss=True, document_ids=document_ids, key_mask=key_mask)
    assert_same_training(palm, loss, mean_loss_alone(palm, [document for row in documents for document in row]))


def test_documents_that_are_not_marked_see_each_other(device):
    palm, (first, second) = palm_of("multi-query", device), token_rows([5, 4], 0, device)
    joined = torch.cat((first, second))[None]
    assert (palm(joined)[0, 5:] - palm(second[None])[0]).abs().max() > 1e-3


# positions


def test_default_positions_by_hand():
    tokens = torch.zeros(1, 6, dtype=torch.long)
    mask, documents = torch.tensor([[0, 0, 1, 1, 0, 1]]).bool(), torch.tensor([[7, 7, 7, 2, 2, 7]])
    assert default_positions(tokens, None, None).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert default_positions(tokens, None, documents).tolist() == [[0, 1, 2, 0, 1, 0]]
    counted = default_positions(tokens, mask, None)
    assert counted[mask].tolist() == [0, 1, 2] and (counted >= 0).all()
    packed_and_padded = torch.tensor([[1, 1, 1, 5, 5, 5]])
    for keep, expected in (("101011", [0, 1, 0, 1]), ("110011", [0, 1, 0, 1]), ("011101", [0, 1, 0, 1])):
        mask = torch.tensor([[bit == "1" for bit in keep]])
        assert default_positions(tokens, mask, packed_and_padded)[mask].tolist() == expected


@every_causal
@settings(max_examples=8)
@given(lengths=LENGTHS, seed=SEEDS)
def test_explicit_positions_that_restart_in_every_document_are_the_default(variant, lengths, seed, device):
    palm, documents = palm_of(variant, device), token_rows(lengths, seed, device)
    tokens = torch.cat(documents)[None]
    document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].to(device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    default = palm(tokens, document_ids=document_ids)
    assert torch.equal(palm(tokens, document_ids=document_ids, positions=positions), default)


@every_causal
@settings(max_examples=10)
@given(length=st.integers(1, 9), shift=st.integers(0, 1000), seed=SEEDS)
def test_only_distances_between_positions_matter(variant, length, shift, seed, device):
    palm, rows = palm_of(variant, device), token_rows([length] * 2, seed, device)
    positions = torch.arange(length, device=device)[None]
    moved = torch.cat((positions, positions + shift))
    assert_close(palm(torch.stack(rows), positions=moved), palm(torch.stack(rows)), atol=1e-9)
    if length > 2:
        assert (palm(torch.stack(rows), positions=3 * positions) - palm(torch.stack(rows))).abs().max() > 1e-6
