"""The distribution that is sampled from: its laws, its definition in plain Python, and the frequencies of draws."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from palm_rlhf.ops.sampling import (
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    sample,
    sampling_logprobs,
)

LOGITS = st.lists(st.floats(-8, 8), min_size=1, max_size=12).map(lambda row: torch.tensor([row], dtype=torch.float64))
SHARES = st.floats(0.01, 1.0)


def kept(logits):
    return (logits > -torch.inf)[0]


def masses(logits, keep):
    """Probabilities before the cut of the kept and of the dropped tokens."""
    probs = logits.softmax(dim=-1)[0]
    return probs[keep], probs[~keep]


@given(LOGITS, st.integers(1, 14))
def test_top_k_keeps_the_k_largest_and_their_equals(logits, k):
    keep = kept(keep_top_k(logits, k))
    kth = sorted(logits[0].tolist(), reverse=True)[min(k, logits.shape[-1]) - 1]
    assert keep.tolist() == [value >= kth for value in logits[0].tolist()]


@given(LOGITS, SHARES)
def test_top_p_keeps_at_least_p_of_the_mass_and_no_more_than_it_must(logits, p):
    keep = kept(keep_top_p(logits, p))
    inside, outside = masses(logits, keep)
    assert inside.sum() >= p - 1e-12
    assert inside.sum() - inside.min() < p + 1e-12  # without its unlikeliest token it would hold less than p
    if len(outside):
        assert inside.min() >= outside.max()


def test_top_p_by_hand():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64).log()
    for p, expected in ((1e-9, [1]), (0.49, [1]), (0.51, [1, 3]), (0.9, [0, 1, 3]), (0.96, [0, 1, 2, 3])):
        assert kept(keep_top_p(logits, p)).nonzero().flatten().tolist() == expected


@given(LOGITS, SHARES)
def test_min_p_keeps_what_is_likely_enough(logits, p):
    probs = logits.softmax(dim=-1)[0]
    expected = probs >= p * probs.max()
    assume(((probs / probs.max() - p).abs() > 1e-9)[probs < probs.max()].all())
    assert torch.equal(kept(keep_min_p(logits, p)), expected)


@given(LOGITS, st.floats(0.2, 5), st.data())
def test_penalty_moves_seen_tokens_only_and_always_down_above_one(logits, penalty, data):
    seen = torch.tensor([data.draw(st.lists(st.booleans(), min_size=logits.shape[-1], max_size=logits.shape[-1]))])
    got = penalise_repetition(logits, seen, penalty)
    for before, after, was_seen in zip(logits[0].tolist(), got[0].tolist(), seen[0].tolist(), strict=True):
        expected = (before / penalty if before > 0 else before * penalty) if was_seen else before
        assert after == pytest.approx(expected, abs=1e-15)
        assert penalty < 1 or after <= before


def test_penalty_by_hand():
    logits, seen = torch.tensor([[2.0, -2.0, 1.0, 0.0]]), torch.tensor([[True, True, False, True]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, 0.0]]


def plainly(
    logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, presence_penalty=0.0,
    frequency_penalty=0.0, seen=(), sampled=()
):  # fmt: skip
    """The definition in plain Python: a dictionary of the tokens left and their probabilities."""
    scores = dict(enumerate(logits))
    for token in seen:
        scores[token] *= repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
    for token in set(sampled):
        scores[token] -= presence_penalty
    for token in sampled:
        scores[token] -= frequency_penalty
    if temperature == 0:
        return {max(scores, key=lambda token: (scores[token], -token)): 1.0}

    def normalised(left):
        total = sum(left.values())
        return {token: mass / total for token, mass in left.items()}

    probs = normalised({token: math.exp(score / temperature) for token, score in scores.items()})
    if top_k is not None:
        least = sorted(probs.values(), reverse=True)[min(top_k, len(probs)) - 1]
        probs = normalised({token: mass for token, mass in probs.items() if mass >= least})
    if top_p is not None:
        left, total = {}, 0.0
        for token in sorted(probs, key=lambda token: -probs[token]):
            if total < top_p:
                left[token] = probs[token]
            total += probs[token]
        probs = normalised(left)
    if min_p is not None:
        probs = normalised({token: mass for token, mass in probs.items() if mass >= min_p * max(probs.values())})
    return probs


@given(
    st.lists(st.integers(-400, 400), min_size=2, max_size=10, unique=True),
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0, 0.5, 0.77, 2.0]),
            "top_k": st.integers(1, 12),
            "top_p": st.sampled_from([0.3, 0.611, 0.9, 1.0]),
            "min_p": st.sampled_from([0.0, 0.0503, 0.3]),
            "repetition_penalty": st.sampled_from([0.8, 1.3]),
            "presence_penalty": st.sampled_from([0.7031, -0.5017]),
            "frequency_penalty": st.sampled_from([0.3013, -0.2019]),
        },
    ),
    st.data(),
)
def test_all_options_together_equal_the_definition(hundredths, options, data):
    logits = [value / 100 for value in hundredths]
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), unique=True))
    sampled = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=6))
    expected = plainly(logits, **options, seen=seen if "repetition_penalty" in options else (), sampled=sampled)
    mask = torch.zeros(1, len(logits), dtype=torch.bool)
    mask[0, seen] = True
    counts = torch.tensor(sampled, dtype=torch.long).bincount(minlength=len(logits))[None]
    rows = torch.tensor([logits], dtype=torch.float64)
    got = sampling_logprobs(rows, Sampling(**options), seen=mask, counts=counts)[0].exp()
    for token, probability in enumerate(got.tolist()):
        assert probability == pytest.approx(expected.get(token, 0.0), abs=1e-12)


@given(LOGITS, st.sampled_from([{}, {"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}]))
def test_a_distribution_sums_to_one_and_each_row_stands_alone(logits, options):
    rows = torch.cat((logits, logits.flip(-1), logits * 2))
    logprobs = sampling_logprobs(rows, Sampling(**options))
    torch.testing.assert_close(logprobs.exp().sum(dim=-1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(logprobs[:1], sampling_logprobs(logits, Sampling(**options)))


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    logprobs = sampling_logprobs(logits, Sampling(temperature=0))
    assert logprobs.tolist() == [[-torch.inf, 0.0, -torch.inf, -torch.inf], [0.0, *[-torch.inf] * 3]]
    assert sample(logprobs).tolist() == [1, 0]


def test_bfloat16_logits_give_float32_logprobs():
    logits = torch.randn(4, 1000).bfloat16()
    logprobs = sampling_logprobs(logits, Sampling(temperature=0.7))
    assert logprobs.dtype == torch.float32
    exact = (logits.double() / 0.7).log_softmax(dim=-1)
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=1e-5)


def test_the_logits_are_left_as_they_were():
    logits = torch.randn(2, 9)
    before = logits.clone()
    options = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    sampling_logprobs(logits, Sampling(**options), seen=torch.ones(2, 9, dtype=torch.bool))
    sampling_logprobs(logits, Sampling(temperature=0))
    assert torch.equal(logits, before)


def chi_square(counts, probs):
    expected = probs * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def drawn(probs, num_draws=20_000, *, seed=0):
    """How often each token comes."""
    logprobs = probs.log().expand(num_draws, -1)
    return torch.bincount(sample(logprobs, torch.Generator().manual_seed(seed)), minlength=len(probs)).double()


PROBS = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
CRITICAL = 20.515  # chi-square, 5 degrees of freedom, 0.1%


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_draws_come_as_often_as_they_should(seed, dtype):
    assert chi_square(drawn(PROBS.to(dtype), seed=seed), PROBS) < CRITICAL


def test_chi_square_sees_a_small_bias():
    biased = PROBS + torch.tensor([-0.03, 0.03, 0, 0, 0, 0])
    assert chi_square(drawn(biased), PROBS) > CRITICAL


def test_draws_of_neighbouring_rows_are_independent():
    pairs = sample(torch.full((20_000, 2), 0.5).log(), torch.Generator().manual_seed(0)).view(-1, 2)
    counts = torch.bincount(pairs[:, 0] * 2 + pairs[:, 1], minlength=4).double()
    assert chi_square(counts, torch.full((4,), 0.25)) < 16.27  # 3 degrees of freedom, 0.1%


def test_what_has_no_probability_never_comes():
    logprobs = sampling_logprobs(torch.zeros(50_000, 8), Sampling(top_k=8)).clone()
    logprobs[:, 3:] = -torch.inf
    assert set(sample(logprobs).tolist()) == {0, 1, 2}


def test_a_draw_without_data_has_the_shape_of_one_with_data():
    """On the meta device, as in a dry run of a model."""
    assert sample(torch.empty(3, 5, device="meta")).shape == (3,)


def test_the_same_generator_gives_the_same_draws():
    logprobs = torch.randn(100, 50).log_softmax(dim=-1)
    first, second, other = (sample(logprobs, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
