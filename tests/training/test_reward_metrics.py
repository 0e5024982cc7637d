"""The metrics of reward models against books, and against numbers worked out by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.algorithms.win_rate import wilson_interval
from palm_rlhf.training.reward_metrics import (
    accuracy_by_margin,
    calibration_error,
    correlation,
    effective_count,
    ranking_metrics,
)


def test_wilson_intervals_are_those_of_the_books():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, and 29 of 29
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1.0, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    assert all(wilson_interval(0.0, n)[0] >= 0 and wilson_interval(1.0, n)[1] <= 1 for n in range(1, 200))


@settings(max_examples=40)
@given(st.lists(st.booleans(), min_size=2, max_size=30), st.integers(1, 4))
def test_pairs_of_one_prompt_count_for_less(outcomes, copies):
    correct = torch.tensor(outcomes).double()
    clusters = torch.arange(len(outcomes))
    alone = effective_count(correct, clusters)
    assert alone == pytest.approx(len(outcomes))  # one pair a prompt
    copied = effective_count(correct.repeat_interleave(copies), clusters.repeat_interleave(copies))
    assert copied == pytest.approx(len(outcomes))  # the same pair again tells nothing new


def test_the_effective_count_by_hand():
    correct = torch.tensor([1.0, 1, 1, 0, 1, 0])  # two of a mean of 2/3, and prompts of 3, 2 and 1 pairs
    residuals = (3 - 2, 1 - 4 / 3, 0 - 2 / 3)
    variance = sum(r * r for r in residuals) / 36
    expected = (2 / 3) * (1 / 3) / variance
    assert effective_count(correct, torch.tensor([0, 0, 0, 1, 1, 2])) == pytest.approx(expected)
    assert effective_count(correct, torch.zeros(6, dtype=torch.long)) == 1
    assert effective_count(torch.tensor([1.0, 0, 1, 0]), torch.tensor([0, 0, 1, 1])) == 4  # never more than the pairs


def test_calibration_and_margins_by_hand():
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    differences = torch.tensor([logit(0.92), logit(0.94), -logit(0.93), logit(0.61), -logit(0.67), 0.0])
    by_hand = (3 * abs((0.92 + 0.94 + 0.93) / 3 - 2 / 3) + abs(0.61 - 1) + abs(0.67 - 0) + 0) / 6
    assert calibration_error(differences) == pytest.approx(by_hand, abs=1e-6)
    assert calibration_error(torch.tensor([50.0, 60.0])) == pytest.approx(0, abs=1e-6)
    in_the_last_two_bins = torch.tensor([-logit(0.99), logit(0.93)])
    assert calibration_error(in_the_last_two_bins) == pytest.approx((0.99 + (1 - 0.93)) / 2, abs=1e-6)
    groups = accuracy_by_margin(torch.tensor([-4.0, 1.0, 0.0, 3.0, -2.0, 5.0, 6.0, 7.0]))
    assert groups == ((0, 1, 0.75, 2), (2, 3, 0.5, 2), (4, 5, 0.5, 2), (6, 7, 1.0, 2))
    assert [group.num_pairs for group in accuracy_by_margin(torch.ones(2))] == [1, 1]


def test_ranking_metrics_by_hand():
    scores = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.5, 0.5])]
    lengths = [torch.tensor([4, 5, 1]), torch.tensor([7, 2])]
    measured = ranking_metrics(scores, lengths, score_mean=1.0, score_std=2.0)
    differences = [2.0, 1.0, -1.0, 0.0]
    assert (measured.num_pairs, measured.num_prompts) == (4, 2)
    assert measured.accuracy == (1 + 1 + 0 + 0.5) / 4
    assert measured.longer_accuracy == (0 + 1 + 1 + 1) / 4
    assert measured.log_loss == pytest.approx(sum(math.log1p(math.exp(-d)) for d in differences) / 4)
    flat, sizes = [3.0, 1.0, 2.0, 0.5, 0.5], [4, 5, 1, 7, 2]
    assert measured.length_correlation == pytest.approx(np.corrcoef(flat, sizes)[0, 1])
    assert measured.score_mean == pytest.approx((np.mean(flat) - 1) / 2)
    assert measured.score_std == pytest.approx(np.std(flat) / 2)
    assert measured.accuracy_low < measured.accuracy < measured.accuracy_high
    assert correlation(torch.ones(3), torch.arange(3)) == 0
    numbers = json.loads(json.dumps(measured.numbers()))
    assert [numbers[f"accuracy_margin_{group}"] for group in (1, 2, 3, 4)] == [0.5, 1.0, 0.0, 1.0]
    assert "62.5% (95% interval" in str(measured) and "4 pairs of 2 prompts" in str(measured)
