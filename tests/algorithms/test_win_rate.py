"""Win rates by hand, and Wilson's interval as its defining equation and its coverage have it."""

import math

import pytest
import torch

from palm_rlhf.algorithms.win_rate import WinRate, wilson_interval, win_rate

NAN = math.nan


def test_each_response_is_compared_with_each_of_the_other_s():
    ours = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 5.0]])
    theirs = torch.tensor([[2.0, 0.0], [2.0, 2.0], [9.0, 9.0]])
    # of the first prompt 1 beats 0 and 3 beats both; the second is all ties; the third all lost
    found = win_rate(ours, theirs)
    assert found.rate == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert (found.low, found.high) == wilson_interval(found.rate, 3)
    assert win_rate(theirs, ours).rate == pytest.approx(1 - found.rate)


def test_one_response_of_each_to_a_prompt():
    assert win_rate(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [0.0]])).rate == (1 + 1 / 2) / 2


def test_what_has_no_score_is_no_loss():
    ours = torch.tensor([[1.0, NAN], [NAN, NAN], [1.0, 1.0]])
    theirs = torch.tensor([[0.0, 2.0], [0.0, 0.0], [0.0, NAN]])
    found = win_rate(ours, theirs)
    assert found == WinRate(0.75, *wilson_interval(0.75, 2))
    assert win_rate(torch.tensor([[NAN]]), torch.tensor([[1.0]])) is None


@pytest.mark.parametrize("share, trials", [(0.3, 20), (0.5, 7), (0.0, 12), (1.0, 12)])
def test_the_ends_lie_where_the_share_is_just_as_far_as_the_level_allows(share, trials):
    """|share - p| = 1.96 sqrt(p (1 - p) / n), of which the ends are the two solutions."""
    for end in wilson_interval(share, trials):
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / trials), abs=1e-5)
    assert wilson_interval(share, trials, level=0.5) != wilson_interval(share, trials)


def test_the_ends_are_shares_whatever_is_rounded():
    for trials in range(1, 200):
        assert wilson_interval(0.0, trials)[0] >= 0 and wilson_interval(1.0, trials)[1] <= 1


@pytest.mark.parametrize("true", [0.2, 0.5, 0.7])
def test_the_interval_holds_the_true_share_as_often_as_it_says(true):
    """Over the exact distribution of wins in 60 trials."""
    n = 60
    held = 0.0
    for wins in range(n + 1):
        low, high = wilson_interval(wins / n, n)
        held += math.comb(n, wins) * true**wins * (1 - true) ** (n - wins) * (low <= true <= high)
    assert 0.93 < held < 0.97
