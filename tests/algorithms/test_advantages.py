"""Rewards of tokens, whitening over a rollout, and advantages of groups: by hand and by their laws."""

import statistics
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.algorithms.advantages import (
    best_and_worst,
    group_advantages,
    overlong_penalty,
    rloo_advantages,
    token_rewards,
    varied_groups,
    whiten,
)

NAN = float("nan")


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def check_token_rewards(token_rewards):
    """The second row ends after two actions; the third has a pad between two; the fourth says nothing."""
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, True], [False, False, False]])
    logprobs = doubles([-1.0, -2.0, -3.0], [-4.0, -1.0, NAN], [-1.0, NAN, -1.0], [NAN, NAN, NAN])
    ref_logprobs = doubles([-2.0, -2.0, -1.0], [-1.0, -3.0, NAN], [-1.0, NAN, -1.0], [NAN, NAN, NAN])
    got = token_rewards(doubles(10.0, 20.0, 30.0, NAN), logprobs, ref_logprobs, mask, kl_coef=0.5)
    expected = doubles([-0.5, 0.0, 11.0], [1.5, 19.0, 0.0], [0.0, 0.0, 30.0], [0.0, 0.0, 0.0])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def kl_sign_flipped(*tensors, kl_coef):
    return token_rewards(*tensors, kl_coef=-kl_coef)


def score_in_the_last_column(scores, logprobs, ref_logprobs, action_mask, *, kl_coef):
    rewards = token_rewards(torch.zeros_like(scores), logprobs, ref_logprobs, action_mask, kl_coef=kl_coef)
    rewards[:, -1] += scores.nan_to_num()
    return rewards


def score_before_the_last_action(scores, logprobs, ref_logprobs, action_mask, *, kl_coef):
    nothing = torch.zeros_like(logprobs)
    score = token_rewards(scores, nothing, nothing, action_mask, kl_coef=0).roll(-1, dims=-1)
    return score + token_rewards(0 * scores, logprobs, ref_logprobs, action_mask, kl_coef=kl_coef)


def test_token_rewards_by_hand():
    check_token_rewards(token_rewards)


@pytest.mark.parametrize(
    "mutant", [kl_sign_flipped, score_in_the_last_column, score_before_the_last_action], ids=lambda f: f.__name__
)
def test_token_rewards_see_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_token_rewards(mutant)


def check_whiten(whiten):
    """Of 1, 3, 5, 7 the mean is 4 and the variance 5."""
    mask = torch.tensor([[True, True, False], [True, False, True]])
    got = whiten(doubles([1.0, 3.0, NAN], [5.0, 1e9, 7.0]), mask)
    expected = doubles([-3.0, -1.0, 0.0], [1.0, 0.0, 3.0]) / 5**0.5
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


def unmasked(advantages, action_mask):
    return whiten(advantages.nan_to_num(), torch.ones_like(action_mask)) * action_mask


def pads_left_at_minus_the_mean(advantages, action_mask):
    kept = advantages[action_mask]
    return (advantages.nan_to_num() * action_mask - kept.mean()) / kept.std(correction=0)


def row_by_row(advantages, action_mask):
    return torch.cat([whiten(*row) for row in zip(advantages.split(1), action_mask.split(1), strict=True)])


@pytest.mark.parametrize("mask", [[False, False], [True, False]], ids=str)
def test_whitening_of_one_action_or_none_is_zero(mask):
    assert whiten(torch.tensor([[3.0, 5.0]]), torch.tensor([mask])).tolist() == [[0.0, 0.0]]


def test_whiten_by_hand():
    check_whiten(whiten)


@pytest.mark.parametrize("mutant", [unmasked, pads_left_at_minus_the_mean, row_by_row], ids=lambda f: f.__name__)
def test_whiten_sees_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_whiten(mutant)


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1000.1, 1e6 / 3])
@pytest.mark.parametrize("length", [1, 3, 1000])
def test_a_constant_is_nothing_even_in_float32(constant, length):
    got = whiten(torch.full((2, length), constant), torch.ones(2, length, dtype=torch.bool))
    assert got.abs().max() < 1e-3


def test_no_actions_give_zeros():
    assert not whiten(torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)).any()


def whiten_in_two_processes(parts, *, reduced):
    """Two threads stand in for processes: a reduction waits for both and gives both the sum."""
    barrier, given_by = threading.Barrier(2, timeout=600), [None, None]

    def whiten_part(rank):
        def reduce(total):
            given_by[rank] = total
            barrier.wait()
            both = given_by[0] + given_by[1]
            barrier.wait()
            return both

        return whiten(*parts[rank], **({"reduce": reduce} if reduced else {}))

    with ThreadPoolExecutor(2) as threads:
        return torch.cat(list(threads.map(whiten_part, range(2))))


def test_processes_whiten_together():
    advantages, mask = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5) < 0.6
    parts = [(advantages[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 4))]
    whole = whiten(advantages, mask)
    torch.testing.assert_close(whiten_in_two_processes(parts, reduced=True), whole, rtol=0, atol=1e-12)
    assert (whiten_in_two_processes(parts, reduced=False) - whole).abs().max() > 0.01


# scores, which are valid, and advantages over the sample deviation, only centred, and against the others
GROUPS = {
    "different": ([1.0, 2.0, 6.0], None, [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5], [-2.0, -1.0, 3.0], [-3.0, -1.5, 4.5]),
    "equal": ([0.1, 0.1, 0.1], None, [0.0] * 3, [0.0] * 3, [0.0] * 3),
    "one invalid": (
        [1.0, NAN, 5.0],
        [True, False, True],
        [-(0.5**0.5), 0.0, 0.5**0.5],
        [-2.0, 0.0, 2.0],
        [-4.0, 0.0, 4.0],
    ),
    "one valid": ([NAN, 3.0, NAN], [False, True, False], [0.0] * 3, [0.0] * 3, [0.0] * 3),
    "none valid": ([NAN, NAN, NAN], [False] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3),
    "equal but for an invalid": ([2.0, 2.0, 9.0], [True, True, False], [0.0] * 3, [0.0] * 3, [0.0] * 3),
    "equal, below 0, and an invalid": ([-0.1, NAN, -0.1], [True, False, True], [0.0] * 3, [0.0] * 3, [0.0] * 3),
}


def check_groups(advantages, kind, names=tuple(GROUPS)):
    """All groups in one call, so that none leaks into another."""
    rows = [GROUPS[name] for name in names]
    scores = torch.cat([doubles(*row[0]) for row in rows])
    valid = torch.cat([torch.tensor(row[1] or [True] * 3) for row in rows])
    expected = torch.cat([doubles(*row[2 + ("scaled", "centred", "others").index(kind)]) for row in rows])
    torch.testing.assert_close(advantages(scores, 3, valid=valid), expected, rtol=0, atol=1e-7)


def dr_grpo(scores, num_samples, *, valid=None):
    return group_advantages(scores, num_samples, scale="none", valid=valid)


def over_the_whole_batch(scores, num_samples, *, valid):
    return group_advantages(scores, len(scores), valid=valid)


def of_every_third_row(scores, num_samples, *, valid):
    regrouped = [x.view(num_samples, -1).T.flatten() for x in (scores, valid)]
    return group_advantages(regrouped[0], num_samples, valid=regrouped[1])


def invalid_scores_count_as_0(scores, num_samples, *, valid):
    return group_advantages(scores.masked_fill(~valid, 0.0), num_samples)


def baseline_with_itself(scores, num_samples, *, valid):
    return group_advantages(scores, num_samples, scale="none", valid=valid)


@pytest.mark.parametrize(
    "kind, advantages",
    [("scaled", group_advantages), ("centred", dr_grpo), ("others", rloo_advantages)],
    ids=["grpo", "dr_grpo", "rloo"],
)
def test_groups_by_hand(kind, advantages):
    check_groups(advantages, kind)
    check_groups(lambda scores, num_samples, valid: advantages(scores, num_samples), kind, ("different", "equal"))


@pytest.mark.parametrize(
    "kind, mutant",
    [
        ("scaled", over_the_whole_batch),
        ("scaled", of_every_third_row),
        ("scaled", invalid_scores_count_as_0),
        ("scaled", dr_grpo),
        ("others", baseline_with_itself),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_groups_see_the_mutant(kind, mutant):
    with pytest.raises(AssertionError):
        check_groups(mutant, kind)


SCORES = st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=4)


@given(SCORES, st.floats(-100, 100), st.floats(0.5, 50))
def test_a_shift_of_a_prompts_scores_is_nothing_and_a_scale_is_divided_out(groups, shift, factor):
    groups = torch.tensor(groups, dtype=torch.float64)
    scores, moved = groups.flatten(), (groups * factor + shift * torch.arange(len(groups)).unsqueeze(-1)).flatten()
    for advantages, power in ((group_advantages, 0), (dr_grpo, 1), (rloo_advantages, 1)):
        got, expected = advantages(moved, 4), advantages(scores, 4) * factor**power
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(got.view(-1, 4).sum(dim=-1), torch.zeros(len(groups)).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("constant", [0.1, 1000.1, 1e8 / 3])
@pytest.mark.parametrize("advantages", [group_advantages, rloo_advantages], ids=lambda f: f.__name__)
def test_equal_scores_are_exactly_nothing_even_in_float32(advantages, constant):
    assert not advantages(torch.full((14,), constant), 7).any()


def check_best_and_worst(best_and_worst):
    rows = {  # places in the row, of the first of equals
        (1.0, 2.0, 2.0): (1, 0),
        (3.0, 3.0, 3.0): None,
        (4.0, NAN, 5.0): (2, 0),
        (-4.0, NAN, -4.0): None,
        (NAN, -2.0, -5.0): (1, 2),
        (NAN, NAN, 5.0): None,
        (7.0, 7.0 * (1 + 1e-8), 7.0): None,  # as float32 rounds
        (-1.0, -9.0, 0.0): (2, 1),
    }
    scores = torch.tensor(list(rows)).flatten()
    best, worst = best_and_worst(scores, 3, valid=~scores.isnan())
    expected = [(3 * row + best, 3 * row + worst) for row, places in enumerate(rows.values()) if places
                for best, worst in [places]]  # fmt: skip
    assert list(zip(best.tolist(), worst.tolist(), strict=True)) == expected
    assert [rows.tolist() for rows in best_and_worst(torch.tensor([3.0, 1.0, 2.0, 2.0]), 2)] == [[0], [1]]


def worst_first(scores, num_samples, **options):
    return best_and_worst(-scores, num_samples, **options)


def places_for_rows(scores, num_samples, **options):
    return tuple(rows % num_samples for rows in best_and_worst(scores, num_samples, **options))


def missing_scores_are_worst(scores, num_samples, *, valid=None):
    return best_and_worst(scores.nan_to_num(-99.0), num_samples)


def test_the_best_and_the_worst_of_a_group_by_hand():
    check_best_and_worst(best_and_worst)


@pytest.mark.parametrize("mutant", [worst_first, places_for_rows, missing_scores_are_worst], ids=lambda f: f.__name__)
def test_the_best_and_the_worst_of_a_group_see_the_mutant(mutant):
    with pytest.raises(AssertionError):
        check_best_and_worst(mutant)


def test_varied_groups_by_hand():
    rows = {
        (1.0, 2.0, 2.0): True,
        (3.0, 3.0, 3.0): False,
        (4.0, NAN, 5.0): True,
        (4.0, NAN, 4.0): False,
        (-4.0, NAN, -4.0): False,
        (NAN, NAN, 5.0): False,
        (NAN, NAN, NAN): False,
    }
    scores = torch.tensor(list(rows)).flatten()
    got = varied_groups(scores, 3, valid=~scores.isnan())
    assert got.view(-1, 3).tolist() == [[varied] * 3 for varied in rows.values()]
    assert varied_groups(scores[:6], 6).tolist() == [True] * 6
    assert varied_groups(scores[:6], 1).tolist() == [False] * 6


@pytest.mark.parametrize("advantages", [group_advantages, rloo_advantages], ids=lambda f: f.__name__)
def test_a_valid_score_that_is_no_number_shows(advantages):
    assert advantages(torch.tensor([1.0, NAN, 2.0, 3.0]), 2).isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("function", [group_advantages, rloo_advantages, varied_groups], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scores, num_samples", [(torch.zeros(5), 2), (torch.zeros(4), 0), (torch.zeros(2, 2), 2)])
def test_rows_that_make_no_groups_are_refused(function, scores, num_samples):
    with pytest.raises(ValueError, match="got scores of shape"):
        function(scores, num_samples)


@pytest.mark.parametrize("advantages", [group_advantages, rloo_advantages], ids=lambda f: f.__name__)
def test_one_response_has_nothing_to_be_compared_with(advantages):
    assert advantages(torch.tensor([3.0, -1.0]), 1).tolist() == [0.0, 0.0]
    valid = torch.tensor([True, False])
    assert advantages(torch.tensor([3.0, -1.0]), 2, valid=valid).tolist() == [0.0, 0.0]
    both = torch.tensor([True, True])  # the smallest group that has a deviation: that of 3 and -1 is sqrt(8)
    expected = [2 / 8**0.5, -2 / 8**0.5] if advantages is group_advantages else [4.0, -4.0]
    assert advantages(torch.tensor([3.0, -1.0]), 2, valid=both).tolist() == pytest.approx(expected)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="expected one shape"):
        group_advantages(torch.zeros(4), 2, valid=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected one shape"):
        token_rewards(torch.zeros(2, 3), *torch.zeros(2, 2, 3), torch.ones(2, 3, dtype=torch.bool), kl_coef=0.1)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5])
def test_scores_that_differ_by_rounding_are_equal(size):
    """0.1 + 0.2 is not 0.3 in floating point; a deviation of that alone is no reason to learn."""
    tenths = torch.tensor([0.1, 0.2, 0.3]) * size
    rounded = torch.stack([tenths[2], tenths[0] + tenths[1], tenths[2] * (1 + 2**-23), tenths[2]])
    assert (rounded != rounded[0]).any()
    varied = torch.tensor([1.0, 1.0, 1.0, 1.0 + 1e-4]) * size
    scores = torch.cat((rounded, varied))
    assert varied_groups(scores, 4).tolist() == [False] * 4 + [True] * 4
    for advantages in (
        group_advantages(scores, 4),
        group_advantages(scores, 4, scale="none"),
        rloo_advantages(scores, 4),
    ):
        assert not advantages[:4].any() and advantages[4:].all()


def test_not_a_number_makes_a_varied_group():
    """So that it shows, and is not taken for nothing."""
    assert group_advantages(torch.tensor([NAN, 1.0]), 2).isnan().any()


def check_batch_scale(advantages, num_processes=1):
    """Each score less its group's mean, over the sample deviation of all valid scores of all processes."""
    scores = [[1.0, 4.0, -2.0], [0.5, 0.5, 0.5], [NAN, 9.0, 3.0], [8.0, NAN, NAN]]
    known = [score for group in scores for score in group if score == score]
    expected = []
    for group in scores:
        valid = [score for score in group if score == score]
        varied = len(set(valid)) > 1
        expected += [
            (score - statistics.mean(valid)) / statistics.stdev(known) if varied and score == score else 0.0
            for score in group
        ]
    every = torch.tensor(scores, dtype=torch.float64).flatten()
    shares = every.chunk(num_processes)
    totals = [  # what the processes add up, in the order of the calls
        torch.tensor(len(known)), torch.tensor(sum(known), dtype=torch.float64),
        torch.tensor(sum((score - statistics.mean(known)) ** 2 for score in known), dtype=torch.float64),
    ]  # fmt: skip
    got = []
    for share in shares:
        sums = iter(totals)
        reduce = (lambda part: part) if num_processes == 1 else (lambda part, sums=sums: next(sums))
        got.append(advantages(share, 3, scale="batch", valid=~share.isnan(), reduce=reduce))
    torch.testing.assert_close(torch.cat(got), torch.tensor(expected).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_deviation_of_a_batch_by_hand(num_processes):
    check_batch_scale(group_advantages, num_processes)


@pytest.mark.parametrize(
    "mutant, num_processes",
    [
        (lambda scores, n, scale, **rest: group_advantages(scores, n, scale="group", **rest), 1),
        (lambda scores, n, scale, **rest: group_advantages(scores, n, scale="none", **rest), 1),
        (lambda scores, n, valid, **rest: group_advantages(scores.nan_to_num(), n, **rest), 1),
        (lambda scores, n, reduce, **rest: group_advantages(scores, n, **rest), 2),
    ],
    ids=["of the group", "not scaled", "missing scores are zeros", "of one process"],
)
def test_the_deviation_of_a_batch_sees_the_mutant(mutant, num_processes):
    with pytest.raises(AssertionError):
        check_batch_scale(mutant, num_processes)


def test_scores_that_are_all_equal_are_nothing_to_a_batch():
    assert not group_advantages(torch.full((6,), 0.1), 3, scale="batch").any()


@pytest.mark.parametrize(
    "lengths, room, buffer, expected",
    [
        ([1, 5, 6, 7, 8, 9, 10, 11], 10, 4, [0, 0, 0, -0.25, -0.5, -0.75, -1, -1]),
        ([3, 3, 3, 8], torch.tensor([4, 3, 5, 9]), 2, [-0.5, -1, 0, -0.5]),
    ],
    ids=["one room", "a room for each"],
)
def test_the_overlong_penalty_by_hand(lengths, room, buffer, expected):
    """0 up to room - buffer tokens, -1 from the room on, a line between."""
    got = overlong_penalty(torch.tensor(lengths), room, buffer=buffer)
    torch.testing.assert_close(got, torch.tensor(expected).float())


def test_an_overlong_penalty_without_a_buffer_is_refused():
    assert overlong_penalty(torch.tensor([2, 3, 4]), 4, buffer=1).tolist() == [0.0, 0.0, -1.0]
    with pytest.raises(ValueError, match="got buffer=0; expected a number of tokens above 0"):
        overlong_penalty(torch.ones(2), 4, buffer=0)
