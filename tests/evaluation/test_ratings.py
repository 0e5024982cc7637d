"""Elo and Bradley-Terry against hand computations, enumeration, and their own laws."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from palm_rlhf.evaluation.ratings import Battle, bradley_terry, elo, rating_table, read_battles

MODELS = ("a", "b", "c", "d")
battles_of_four = st.lists(
    st.tuples(st.sampled_from(list(itertools.permutations(MODELS, 2))), st.sampled_from([0.0, 0.5, 1.0])),
    min_size=1,
    max_size=30,
).map(lambda rows: [Battle(*pair, score) for pair, score in rows])


def expected(first, second):
    return 1 / (1 + 10 ** ((second - first) / 400))


def test_elo_by_hand():
    battles = [Battle("a", "b", 1.0), Battle("b", "c", 0.5), Battle("a", "c", 0.0)]
    a = b = c = 1000.0
    a, b = a + 32 * 0.5, b - 32 * 0.5
    change = 32 * (0.5 - expected(b, c))
    b, c = b + change, c - change
    change = 32 * (0 - expected(a, c))
    a, c = a + change, c - change
    found = elo(battles, k=32)
    assert found == pytest.approx({"a": a, "b": b, "c": c})
    assert elo(battles[::-1], k=32) != pytest.approx(found)  # the order counts


def test_the_mean_over_shuffles_is_that_over_all_orders():
    battles = [Battle("a", "b", 1.0), Battle("b", "c", 1.0), Battle("c", "a", 0.0)]
    orders = [elo(list(order), k=32) for order in itertools.permutations(battles)]
    means = {name: np.mean([ratings[name] for ratings in orders]) for name in "abc"}
    assert elo(battles, k=32, num_shuffles=4000) == pytest.approx(means, abs=0.1)


@settings(max_examples=40)
@given(battles_of_four, st.integers(0, 3))
def test_no_points_are_made_or_lost(battles, num_shuffles):
    ratings = elo(battles, num_shuffles=num_shuffles)
    assert sum(ratings.values()) == pytest.approx(1000 * len(ratings))


def test_two_models_have_the_odds_of_their_wins():
    battles = [Battle("a", "b", 1.0)] * 30 + [Battle("b", "a", 1.0)] * 10
    ratings = bradley_terry(battles)
    assert ratings["a"] - ratings["b"] == pytest.approx(400 * math.log10(30 / 10))
    # ten draws are five wins for each
    ratings = bradley_terry([*battles, *[Battle("a", "b", 0.5)] * 10])
    assert ratings["a"] - ratings["b"] == pytest.approx(400 * math.log10(35 / 15))
    # the mutant that loses the draws
    assert ratings["a"] - ratings["b"] != pytest.approx(400 * math.log10(30 / 10), abs=1)


@settings(max_examples=40)
@given(battles_of_four)
def test_each_model_wins_as_often_as_its_rating_says(battles):
    """The likelihood equations: at the maximum, expected wins are the wins, for every model."""
    try:
        ratings = bradley_terry(battles)
    except ValueError:
        return
    for model in ratings:
        won = sum(
            score if first == model else 1 - score for first, second, score in battles if model in (first, second)
        )
        chance = sum(
            expected(ratings[model], ratings[second if first == model else first])
            for first, second, _ in battles
            if model in (first, second)
        )
        assert won == pytest.approx(chance, abs=1e-6)
    assert sum(ratings.values()) == pytest.approx(1000 * len(ratings))


def test_an_independent_optimiser_finds_the_same():
    generator = np.random.default_rng(0)
    strengths = dict(zip(MODELS, (0.9, 0.2, -0.3, -0.8)))
    battles = []
    for first, second in itertools.combinations(MODELS, 2):
        for _ in range(40):
            chance = 1 / (1 + math.exp(strengths[second] - strengths[first]))
            battles.append(
                Battle(
                    first, second, float(generator.choice([1.0, 0.5, 0.0], p=[chance * 0.8, 0.2, 0.8 - chance * 0.8]))
                )
            )

    def negative(x):
        values = dict(zip(MODELS, x))
        return -sum(
            s * -math.log1p(math.exp(values[b] - values[a])) + (1 - s) * -math.log1p(math.exp(values[a] - values[b]))
            for a, b, s in battles
        )

    found = minimize(negative, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    points = {model: 1000 + 400 / math.log(10) * (value - found.mean()) for model, value in zip(MODELS, found)}
    assert bradley_terry(battles) == pytest.approx(points, abs=1e-2)
    table = rating_table(battles, num_resamples=100)
    assert [row.model for row in table] == list(MODELS)
    for row in table:
        assert row.interval[0] < row.rating < row.interval[1]
        assert row.battles == 120
        true = 1000 + 400 / math.log(10) * strengths[row.model] * 0.8  # draws pull them together
        assert row.interval[0] - 60 < true < row.interval[1] + 60


@pytest.mark.parametrize(
    "battles, names",
    [
        ([("a", "b", 1.0)], "a"),
        ([("b", "a", 0.0)], "a"),
        ([("a", "b", 0.5), ("c", "d", 0.5)], "(a, b|c, d)"),
        ([("a", "b", 0.5), ("b", "c", 1.0)], "a, b"),
        ([("a", "b", 0.5), ("c", "b", 1.0)], "c"),
    ],
)
def test_where_no_finite_rating_is_likeliest_it_says_so(battles, names):
    battles = [Battle(*battle) for battle in battles]
    with pytest.raises(ValueError, match=rf"^{names} never lost"):
        bradley_terry(battles)
    ratings = bradley_terry(battles, prior_draws=0.5)
    assert all(math.isfinite(rating) for rating in ratings.values())
    if ("a", "b", 1.0) in battles:
        assert ratings["a"] > 1000 > ratings["b"]


def test_a_prior_draw_is_a_draw_against_a_model_of_mean_strength():
    battles = [Battle("a", "b", 1.0)] * 3
    ratings = bradley_terry(battles, prior_draws=2)
    # by symmetry the average stays at 0: a has 3 wins over b, and one win and one defeat against 0
    strength = (ratings["a"] - 1000) * math.log(10) / 400
    won, chance = 3 + 1, 3 / (1 + math.exp(-2 * strength)) + 2 / (1 + math.exp(-strength))
    assert won == pytest.approx(chance)
    with pytest.raises(ValueError, match="got prior_draws -1"):
        bradley_terry(battles, prior_draws=-1)


def test_resamples_without_a_defeat_still_have_an_end():
    battles = [Battle("a", "b", 1.0)] * 8 + [Battle("a", "b", 0.0)]
    table = rating_table(battles, num_resamples=50)
    assert all(math.isfinite(end) for row in table for end in row.interval)
    assert table[0].interval[1] > table[0].rating + 100


@settings(max_examples=15)
@given(battles_of_four)
def test_names_and_sides_do_not_matter(battles):
    turned = [Battle(second, first, 1 - score) for first, second, score in battles]
    assert bradley_terry(turned, prior_draws=1) == pytest.approx(bradley_terry(battles, prior_draws=1), abs=1e-4)


def test_battles_of_both_forms(tmp_path, write_lines, evaluate):
    arena = write_lines(
        tmp_path / "arena.jsonl",
        [
            {"model_a": "x", "model_b": "y", "winner": "model_a"},
            {"model_a": "x", "model_b": "y", "winner": "model_b"},
            {"model_a": "y", "model_b": "x", "winner": "tie (bothbad)"},
            {"model_a": "x", "model_b": "y", "winner": "model_a"},
        ],
    )
    annotations = write_lines(
        tmp_path / "annotations.jsonl",
        [
            {"generator_1": "x", "generator_2": "y", "preference": 2},
            {"generator_1": "x", "generator_2": "y", "preference": 1.25},
            {"generator_1": "x", "generator_2": "y", "preference": 0},
            {"generator_1": "x", "generator_2": "y", "preference": None},
        ],
    )
    assert read_battles(arena) == [("x", "y", 1.0), ("x", "y", 0.0), ("y", "x", 0.5), ("x", "y", 1.0)]
    assert read_battles(annotations) == [("x", "y", 0.0), ("x", "y", 0.75), ("x", "y", 0.5)]
    result, printed = evaluate("ranking", arena, annotations, "--report", tmp_path / "page.html")
    best = result["ratings"][0]
    assert (best["model"], best["battles"], best["win_rate"]) == ("x", 7, (1 + 0 + 0.5 + 1 + 0 + 0.75 + 0.5) / 7)
    assert best["rating"] - result["ratings"][1]["rating"] == pytest.approx(400 * math.log10(3.75 / 3.25))
    assert "Bradley-Terry" in printed


@pytest.mark.parametrize("record", [{"a": 1}, {"model_a": "x", "model_b": "y", "winner": "z"}, {"preference": 1}])
def test_what_is_no_battle_is_refused(tmp_path, write_lines, record):
    with pytest.raises(ValueError, match=r"line 1: .*expected a battle"):
        read_battles(write_lines(tmp_path / "battles.jsonl", [record]))


def test_a_model_cannot_meet_itself():
    with pytest.raises(ValueError, match="against itself"):
        elo([Battle("a", "a", 1.0)])
    with pytest.raises(ValueError, match="no battles"):
        bradley_terry([])
    with pytest.raises(ValueError, match="expected 0 to 1"):
        elo([Battle("a", "b", 1.5)])
