"""Ranked pairs keep every majority that a chain of majorities as wide does not speak against."""

from collections import Counter
from itertools import combinations, pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.preferences.ranked_pairs_voting import ranked_pairs

EXAMPLE = [*["wxzy"] * 3, *["wyxz"] * 2, *["xyzw"] * 4, *["xzwy"] * 5, "ywxz"]

FULL = st.integers(1, 5).flatmap(lambda size: st.lists(st.permutations(range(size)), min_size=1, max_size=7))
PARTIAL = st.lists(st.lists(st.integers(0, 4), unique=True, max_size=5), max_size=7)


def margin(ballots, better, worse):
    """How many more people prefer one to the other than the other way round."""
    both = [list(ballot) for ballot in ballots if better in ballot and worse in ballot]
    return sum(1 if ballot.index(better) < ballot.index(worse) else -1 for ballot in both)


def is_stack(order, ballots):
    """Zavist and Tideman (1989): ranked pairs give exactly the stacks.

    For any two candidates a chain leads down the order from the higher to the lower, each link of which has a margin
    at least that of the lower over the higher.
    """

    def reaches(high, low, width):
        below = order[order.index(high) + 1 : order.index(low) + 1]
        return any(
            margin(ballots, high, link) >= width and (link == low or reaches(link, low, width)) for link in below
        )

    return all(reaches(high, low, margin(ballots, low, high)) for high, low in combinations(order, 2))


def test_the_example_has_one_order():
    assert ranked_pairs(EXAMPLE) == ["x", "z", "w", "y"]
    assert [order for order in permutations("wxyz") if is_stack(list(order), EXAMPLE)] == [("x", "z", "w", "y")]


def test_the_law_rejects_points_and_narrow_majorities_first():
    # A circle a > b > c > a, whose narrowest majority, c over a, must give way.
    ballots = [*["abc"] * 4, *["bca"] * 3, *["cab"] * 2]
    assert ranked_pairs(ballots) == ["a", "b", "c"] and is_stack(["a", "b", "c"], ballots)
    assert not is_stack(["b", "c", "a"], ballots) and not is_stack(["c", "a", "b"], ballots)
    # Three of five put a first, but points (2 for the first place, 1 for the second) would choose b.
    ballots = [*["abc"] * 3, *["bca"] * 2]
    points = Counter({candidate: sum(2 - ballot.index(candidate) for ballot in ballots) for candidate in "abc"})
    assert [candidate for candidate, _ in points.most_common()] == ["b", "a", "c"]
    assert not is_stack(["b", "a", "c"], ballots)
    assert ranked_pairs(ballots) == ["a", "b", "c"]


@settings(deadline=None, max_examples=150)
@given(ballots=FULL | PARTIAL)
def test_any_ballots_give_a_stack_of_all_candidates(ballots):
    order = ranked_pairs(ballots)
    assert sorted(order) == sorted({candidate for ballot in ballots for candidate in ballot})
    assert is_stack(order, ballots)


@settings(deadline=None, max_examples=100)
@given(ballots=FULL | PARTIAL)
def test_who_beats_everybody_is_first_and_who_loses_to_everybody_last(ballots):
    order = ranked_pairs(ballots)
    for candidate in order:
        margins = [margin(ballots, candidate, other) for other in order if other != candidate]
        assert order[0] == candidate or not all(width > 0 for width in margins)
        assert order[-1] == candidate or not all(width < 0 for width in margins)


@settings(deadline=None, max_examples=100)
@given(ballots=FULL | PARTIAL, data=st.data())
def test_neither_the_order_of_the_ballots_nor_asking_twice_matters(ballots, data):
    assert (
        ranked_pairs(data.draw(st.permutations(ballots))) == ranked_pairs([*ballots, *ballots]) == ranked_pairs(ballots)
    )


@settings(deadline=None, max_examples=100)
@given(ballots=FULL)
def test_what_all_agree_on_holds(ballots):
    order = ranked_pairs(ballots)
    for high, low in permutations(order, 2):
        if all(list(ballot).index(high) < list(ballot).index(low) for ballot in ballots):
            assert order.index(high) < order.index(low)


@settings(deadline=None, max_examples=30)
@given(ballot=st.lists(st.text(max_size=3), unique=True, max_size=6))
def test_one_ballot_is_the_order(ballot):
    assert ranked_pairs([ballot]) == ballot


def test_ties_go_to_the_smaller():
    assert ranked_pairs(["ab", "ba"]) == ranked_pairs(["ba", "ab"]) == ["a", "b"]
    assert ranked_pairs(["abc", "bca", "cab"]) == ["a", "b", "c"]  # a circle of equal majorities
    assert ranked_pairs([[2, 10], [10, 2]]) == [2, 10]
    assert ranked_pairs([]) == []


def test_a_long_chain_that_few_know_is_joined():
    ballots = [[place, place + 1] for place in range(20)]
    assert ranked_pairs(ballots) == list(range(21))
    assert all(low - high == 1 for high, low in pairwise(ranked_pairs(ballots[::-1])))


def test_a_candidate_named_twice_is_refused():
    with pytest.raises(ValueError, match="at most once"):
        ranked_pairs(["abc", "aba"])
