"""Where top-p cuts off, found by counting in bins, is where a sort of the whole vocabulary in float64 has it."""

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from palm_rlhf.ops import nucleus as module
from palm_rlhf.ops.sampling import Sampling, keep_top_p, sample, sampling_logprobs

# few values, so that many tokens are equally likely; some are left out already
ROWS = st.lists(st.sampled_from([-torch.inf, -40.0, -3.0, -1.0, -0.999, 0.0, 0.5, 2.0]), min_size=2, max_size=40)
SHARES = st.floats(0.0, 0.9999)


def by_definition(logits, p):
    """Token after token, the likeliest first, of equals that with the smaller id: kept while less than p is."""
    probs = logits.double().softmax(dim=-1).tolist()
    kept, held = [], 0.0
    for token in sorted(range(len(probs)), key=lambda token: (-probs[token], token)):
        if kept and abs(held - p) < 1e-6:
            return None  # the last bit decides
        if kept and held >= p:
            break
        kept.append(token)
        held += probs[token]
    return sorted(kept)


OURS = vars(module)


def counted(logits, p, names=OURS):
    """The tokens that are kept, counted however small the vocabulary, some of them no candidates for sorting."""
    cut = names["_by_counting"](logits, p)
    return [row.nonzero().flatten().tolist() for row in names["Cut"](*cut).keeps(logits)]


@settings(max_examples=100)
@given(ROWS, SHARES, st.floats(0.01, 30), st.sampled_from([torch.float32, torch.float64]))
def test_equals_are_kept_by_their_ids(row, p, scale, dtype):
    assume(max(row) > -torch.inf)
    logits = torch.tensor(row, dtype=dtype) * scale
    padded = torch.cat((logits, logits.new_full((400,), -torch.inf)))[None]  # then the bin holds few of the tokens
    expected = by_definition(logits, p)
    assume(expected is not None)
    assert counted(padded, p) == counted(logits[None], p) == [expected]
    assert (keep_top_p(logits, p) > -torch.inf).nonzero().flatten().tolist() == expected


def test_a_share_of_one_cuts_nothing_off():
    assert not module.truncates(None, None) and not module.truncates(None, 1.0)
    assert module.truncates(None, 1 - 1e-9) and module.truncates(1, None) and module.truncates(1, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 9.0, 1e4])
def test_large_vocabularies(scale, dtype):
    torch.manual_seed(0)
    logits = (torch.randn(3, 4000) * scale).to(dtype)
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    for p in (0.0, 0.4321, 0.9012):
        expected = [by_definition(row, p) for row in logits]
        assert counted(logits, p) == expected
        kept = keep_top_p(logits.view(3, 1, -1), p) > -torch.inf
        assert [row.nonzero().flatten().tolist() for row in kept[:, 0]] == expected


def test_equals_by_hand():
    logits = torch.tensor([[0.1, 0.25, 0.2, 0.25, 0.2]]).log().expand(3, -1)
    for p, expected in ((0.2, [1]), (0.3, [1, 3]), (0.6, [1, 2, 3]), (0.8, [1, 2, 3, 4])):
        assert [row.nonzero().flatten().tolist() for row in keep_top_p(logits, p) > -torch.inf] == [expected] * 3


def require_the_border(names):
    """Of 4000 tokens of known masses: what is kept, with the border between tokens of one bin, and among equals."""
    ranks = torch.arange(4000.0, dtype=torch.float64)
    shuffled = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    distinct = -ranks[shuffled] / 300
    equal = -(ranks[shuffled] / 8).floor() / 30
    for logits in (distinct, equal):
        for p in (0.1234, 0.5678, 0.9123):
            assert counted(logits[None], p, names) == [by_definition(logits, p)]


MUTANTS = {
    "one token too many": ("counts).clamp_(min=1)", "counts).clamp_(min=1).add_(1)"),
    "the token that crosses the border is left out": ("+ masses.cumsum(dim=-1) - masses < share",
                                                      "+ masses.cumsum(dim=-1) < share"),
    "the bin counts before its tokens": ("(reached - held)", "reached"),
    "the bins before do not count": ("(reached - held)", "0 * reached"),
    "the last of the equals is left out": ("<= self.last", "< self.last"),
    "all equals stay": ("follower != floor", "follower == follower"),
    "places are not those of tokens": ("tokens.gather(-1, order), logits", "order, logits"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant):
    old, new = MUTANTS[mutant]
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    names = {"__name__": "palm_rlhf.ops.mutant", "__package__": "palm_rlhf.ops"}
    exec(source.replace(old, new), names)
    require_the_border(OURS)
    with pytest.raises((AssertionError, RuntimeError)):
        require_the_border(names)


def test_seeded_draws_are_those_from_the_sorted_vocabulary():
    torch.manual_seed(1)
    logits = torch.randn(64, 3000) * 2
    sets = [by_definition(row, 0.9) for row in logits]
    logits, sets = logits[[one is not None for one in sets]], list(filter(None, sets))
    assert len(sets) > 50
    kept = torch.zeros_like(logits, dtype=torch.bool)
    for row, tokens in zip(kept, sets, strict=True):
        row[tokens] = True
    expected = logits.masked_fill(~kept, -torch.inf).log_softmax(dim=-1)
    found = sampling_logprobs(logits, Sampling(top_p=0.9))
    assert torch.equal(found, expected)
    draws = [sample(logprobs, torch.Generator().manual_seed(7)) for logprobs in (found, expected)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("num_tokens", [50, 4000])
def test_what_is_no_number_stays_to_be_seen(num_tokens):
    rows = torch.randn(4, num_tokens)
    rows[0, 7], rows[1, 7], rows[2] = torch.nan, torch.inf, -torch.inf
    assert sampling_logprobs(rows, Sampling(top_p=0.5)).isnan().any(dim=-1).tolist() == [True, True, True, False]
    kept = keep_top_p(rows, 0.5)
    assert torch.equal(kept[3], keep_top_p(rows[3], 0.5))


def test_the_gradient_is_that_of_the_tokens_that_stay():
    logits = torch.randn(2, 3000, dtype=torch.float64, requires_grad=True)
    kept = keep_top_p(logits, 0.6)
    count = torch.randn(2, 3000, dtype=torch.float64)
    (count * kept.masked_fill(kept == -torch.inf, 0.0)).sum().backward()
    assert torch.equal(logits.grad, torch.where(kept > -torch.inf, count, 0.0))
