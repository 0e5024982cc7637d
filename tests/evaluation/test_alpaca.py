"""AlpacaEval's figures against its own leaderboard, by hand, and against an independent fit."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from palm_rlhf.evaluation.alpaca import (
    evaluate_annotations,
    preference_of,
    read_annotations,
    read_outputs,
    write_alpaca,
)
from palm_rlhf.evaluation.length_control import (
    GAMED_WEIGHT,
    fit_l1_logistic,
    fit_length_effect,
    read_regularizer,
)


def annotations(preferences, **fields):
    common = {"generator_1": "base", "generator_2": "model", **fields}
    return [{"preference": preference, **common} for preference in preferences]


# A row of AlpacaEval 2's public leaderboard whose judge gives wins, losses and draws only: Ein-70B-v0.1.
PUBLISHED = {"win_rate": 24.84472049689441, "standard_error": 1.521406431103307, "n_wins": 199, "n_draws": 2}


def test_a_published_row_of_the_leaderboard():
    result = evaluate_annotations(annotations([2] * 199 + [1] * 604 + [1.5] + [0]))
    assert result.win_rate == pytest.approx(PUBLISHED["win_rate"], rel=1e-12)
    assert result.standard_error == pytest.approx(PUBLISHED["standard_error"], rel=1e-12)
    assert (result.n_wins, result.n_losses, result.n_draws) == (199, 604, 2)
    # the mutants: n in place of n - 1, and draws that are lost
    shares = np.array([1.0] * 199 + [0.0] * 604 + [0.5] * 2)
    assert 100 * shares.std() / math.sqrt(805) != pytest.approx(PUBLISHED["standard_error"], rel=1e-5)
    assert 100 * 199 / 803 != pytest.approx(PUBLISHED["win_rate"], rel=1e-5)


def test_figures_by_hand():
    result = evaluate_annotations(annotations([1.0, 2.0, 1.75, 1.5, 0, None, 3.0]))
    shares = [0.0, 1.0, 0.75, 0.5, 0.5]
    mean = sum(shares) / 5
    assert result.win_rate == pytest.approx(100 * mean)
    assert result.standard_error == pytest.approx(100 * math.sqrt(sum((s - mean) ** 2 for s in shares) / 4 / 5))
    assert (result.n_wins, result.n_losses, result.n_draws, result.n_unparsed) == (2, 1, 2, 2)
    assert result.length_controlled_win_rate is None  # without outputs there are no lengths
    low, high = result.win_rate_interval
    assert 0 <= low <= result.win_rate <= high <= 100


@pytest.mark.parametrize(
    "value, expected",
    [(1, 1.0), (2.0, 2.0), (1.5, 1.5), (0, 1.5), (0.0, 1.5), (1.25, 1.25)]
    + [(value, None) for value in (None, 3, 0.5, -1, "1", True, float("nan"))],
)
def test_preferences(value, expected):
    assert preference_of({"preference": value}) == expected


def with_lengths(shares, lengths):
    return [
        {
            "preference": 1 + share,
            "output_1": "x" * first,
            "output_2": "y" * second,
            "generator_1": "b",
            "generator_2": "m",
        }
        for share, (first, second) in zip(shares, lengths)
    ]


def test_equal_lengths_leave_the_win_rate_nearly_as_it_is():
    shares = [1.0] * 130 + [0.0] * 70
    result = evaluate_annotations(with_lengths(shares, [(50, 50)] * 200))
    assert result.win_rate == 65
    assert result.length_controlled_win_rate == pytest.approx(65, abs=0.5)  # the penalty pulls a little to the middle


def test_a_preference_for_length_alone_is_taken_out():
    generator = np.random.default_rng(0)
    lengths = [(300, int(length)) for length in generator.normal(400, 80, size=600).clip(1)]
    delta = np.array([first - second for first, second in lengths])
    chances = 1 / (1 + np.exp(3 * np.tanh(delta / delta.std(ddof=1))))  # the longer, the better, and nothing else
    shares = (generator.random(600) < chances).astype(float).tolist()
    result = evaluate_annotations(with_lengths(shares, lengths))
    assert result.win_rate > 75
    assert result.length_controlled_win_rate == pytest.approx(50, abs=6)
    assert result.length_effect.length == pytest.approx(-3, abs=0.7)
    swapped = evaluate_annotations(with_lengths([1 - share for share in shares], [pair[::-1] for pair in lengths]))
    assert swapped.length_controlled_win_rate == pytest.approx(100 - result.length_controlled_win_rate, abs=0.5)


def objective(found, rows, targets, weights):
    logits = rows @ found
    return np.abs(found).sum() + (weights * (np.logaddexp(0, logits) - targets * logits)).sum()


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1e-1, 1.0, 30.0, 1e4]))
def test_the_fit_is_that_of_an_independent_optimiser(seed, strength):
    generator = np.random.default_rng(seed)
    rows = np.stack([np.tanh(generator.normal(size=60)), generator.normal(size=60), np.ones(60)], axis=1)
    targets = (1 / (1 + np.exp(-rows @ generator.normal(size=3)))).round(generator.integers(0, 3))
    weights = np.full(60, strength)
    found = fit_l1_logistic(rows, targets, weights)
    # |b| as the sum of a positive and a negative part, which makes the problem smooth with bounds

    def split(x):
        parts = x[:3] - x[3:]
        slope = rows.T @ (weights * (1 / (1 + np.exp(-rows @ parts)) - targets))
        logits = rows @ parts
        value = x.sum() + (weights * (np.logaddexp(0, logits) - targets * logits)).sum()
        return value, np.concatenate([slope, -slope]) + 1

    other = minimize(split, np.full(6, 0.1), jac=True, bounds=[(0, None)] * 6, options={"ftol": 1e-15, "gtol": 1e-10})
    best = objective(other.x[:3] - other.x[3:], rows, targets, weights)
    assert objective(found, rows, targets, weights) <= best * (1 + 1e-9) + 1e-12


def test_at_the_weakest_data_all_is_zero_and_at_the_strongest_the_likelihood_rules():
    rows, targets = np.ones((10, 1)), np.array([1.0] * 7 + [0.0] * 3)
    assert fit_l1_logistic(rows, targets, np.full(10, 1e-4))[0] == 0
    assert fit_l1_logistic(rows, targets, np.full(10, 1e6))[0] == pytest.approx(math.log(7 / 3), abs=1e-5)
    # |b| + c * (10 log(1 + e^b) - 7 b): where the slope is zero by hand, 10 sigmoid(b) = 7 - 1 / c
    assert fit_l1_logistic(rows, targets, np.ones(10))[0] == pytest.approx(math.log(0.6 / 0.4), abs=1e-7)


@pytest.mark.parametrize("shares", [[1.0] * 12, [0.0] * 5, [0.5] * 5])
def test_one_sided_sets_have_a_finite_figure(shares):
    result = evaluate_annotations(with_lengths(shares, [(place + 1, 9) for place in range(len(shares))]))
    assert 0 <= result.length_controlled_win_rate <= 100
    assert all(math.isfinite(number) for number in result.length_effect)


@pytest.mark.parametrize("shares", [[1.0], [0.5], [0.0] * 3, [1.0, 0.0, 0.5, 1.0]])
def test_too_few_annotations_have_no_length_controlled_win_rate(shares):
    result = evaluate_annotations(with_lengths(shares, [(place + 1, 9) for place in range(len(shares))]))
    assert result.length_controlled_win_rate is None and result.length_effect is None
    assert result.win_rate == 100 * sum(shares) / len(shares)


def test_an_output_that_is_missing_leaves_no_length_controlled_win_rate():
    records = with_lengths([1.0, 0.0] * 10, [(5, 9)] * 20)
    assert evaluate_annotations(records).length_controlled_win_rate is not None
    unjudged = {**records[3], "preference": None, "output_2": None}
    assert evaluate_annotations([*records, unjudged]).length_controlled_win_rate is None


def gamed_file(path, difficulties):
    rows = ["index,model,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    generator = np.random.default_rng(1)
    for model, shift in (("concise", 1.5), ("verbose", -1.5)):
        for index, difficulty in enumerate(difficulties):
            delta = shift + generator.normal() * 0.1
            share = 1 / (1 + math.exp(2 * math.tanh(delta)))
            rows.append(f"{index},{model},{share},{delta},{difficulty},False")
    path.write_text("\n".join(rows) + "\n")
    return path


def test_the_regularizer_gives_difficulties_and_holds_the_length_term(tmp_path):
    generator = np.random.default_rng(2)
    difficulties = generator.normal(size=40).round(3).tolist()
    regularizer = read_regularizer(gamed_file(tmp_path / "df_gamed.csv", difficulties))
    assert regularizer.difficulties == dict(enumerate(difficulties))
    lengths = [(100, 100)] * 40  # the model's own rows say nothing about lengths
    shares = (1 / (1 + np.exp(-(0.8 * np.array(difficulties) - 1)))).tolist()
    effect = fit_length_effect(shares, lengths, range(40), regularizer)
    assert effect.length < -0.5  # learnt from the gamed rows
    assert effect.difficulty > 0.3 and effect.model < -0.5
    expected = np.mean([1 / (1 + math.exp(-(effect.model + effect.difficulty * d))) for d in difficulties])
    assert effect.win_rate == pytest.approx(100 * expected)
    # The rows of the gamed baselines count by their weight: the optimum of the whole objective is found.
    rows = np.concatenate([regularizer.features, np.stack([np.zeros(40), difficulties, np.ones(40)], axis=1)])
    targets = np.concatenate([regularizer.shares, shares])
    weights = np.concatenate([np.full(80, GAMED_WEIGHT), np.ones(40)])
    found = np.array([effect.length, effect.difficulty, effect.model])
    strengths = np.logspace(-4, 4, 10)
    assert any(
        np.allclose(found, fit_l1_logistic(rows, targets, strength * weights), atol=1e-6) for strength in strengths
    )
    with pytest.raises(ValueError, match="no difficulty"):
        fit_length_effect(shares, lengths, range(1, 41), regularizer)


def test_instructions_without_a_preference_count_at_equal_lengths_only(tmp_path):
    generator = np.random.default_rng(3)
    difficulties = generator.normal(size=40).round(3).tolist()
    regularizer = read_regularizer(gamed_file(tmp_path / "df_gamed.csv", difficulties))
    lengths = [tuple(map(int, pair)) for pair in generator.integers(1, 300, size=(40, 2))]
    shares = [float(difficulty > 0) for difficulty in difficulties]
    known = [share if difficulty > -0.5 else None for share, difficulty in zip(shares, difficulties)]
    records = [
        {**record, "preference": None if share is None else 1 + share}
        for record, share in zip(with_lengths(shares, lengths), known)
    ]
    effect = evaluate_annotations(records, regularizer=regularizer).length_effect
    logits = effect.model + effect.difficulty * np.array(difficulties)
    assert effect.win_rate == pytest.approx(100 * (1 / (1 + np.exp(-logits))).mean())
    # The fit is that to the others, with the lengths measured by the deviation over all.
    delta = np.array([first - second for first, second in lengths])
    rows = np.stack([np.tanh(delta / delta.std(ddof=1)), difficulties, np.ones(40)], axis=1)
    kept = [place for place, share in enumerate(known) if share is not None]
    rows = np.concatenate([regularizer.features, rows[kept]])
    targets = np.concatenate([regularizer.shares, np.array(shares)[kept]])
    weights = np.concatenate([np.full(80, GAMED_WEIGHT), np.ones(len(kept))])
    fits = [fit_l1_logistic(rows, targets, strength * weights) for strength in np.logspace(-4, 4, 10)]
    assert any(np.allclose([effect.length, effect.difficulty, effect.model], fit, atol=1e-6) for fit in fits)


@pytest.mark.parametrize("row", ["0,concise,x,1,1,False", "0,concise,1,,1,False", "0,concise,1,1,inf,False", "0"])
def test_a_broken_row_of_the_regularizer_is_named(tmp_path, row):
    path = gamed_file(tmp_path / "df_gamed.csv", [0.5])
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(ValueError, match=r"df_gamed\.csv, record 3: .*download"):
        read_regularizer(path)


def test_another_file_is_no_regularizer(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"df_gamed\.csv"):
        read_regularizer(tmp_path / "other.csv")


def test_the_command_ends_with_the_figures(tmp_path, evaluate):
    path = tmp_path / "annotations.json"
    records = with_lengths([1.0, 0.0, 1.0, 0.5, 0.75], [(3, 4), (9, 2), (5, 5), (6, 4), (7, 7)])
    path.write_text(json.dumps(records))
    result, printed = evaluate("alpaca", path)
    keys = ["win_rate", "standard_error", "n_wins", "n_losses", "n_draws", "length_controlled_win_rate"]
    assert list(result) == keys
    assert (result["win_rate"], result["n_wins"], result["n_losses"], result["n_draws"]) == (65.0, 3, 1, 1)
    assert "by bootstrap" in printed
    path.write_text(json.dumps(records + with_lengths([1.0], [(1, 1)])[:0] + [{**records[0], "generator_2": "other"}]))
    with pytest.raises(ValueError, match="expected one model against one baseline"):
        evaluate("alpaca", path)
    assert evaluate("alpaca", path, "--generator", "m")[0] == result
    with pytest.raises(ValueError, match="'nobody' among"):
        evaluate("alpaca", path, "--generator", "nobody")


def test_files_go_in_and_out(tmp_path):
    outputs = [{"instruction": "Say ü", "output": "ü", "generator": "m"}]
    write_alpaca(tmp_path / "outputs.json", outputs)
    assert json.loads((tmp_path / "outputs.json").read_text()) == outputs == read_outputs(tmp_path / "outputs.json")
    write_alpaca(tmp_path / "annotations.json", annotations([2, None]))
    assert [record["preference"] for record in read_annotations(tmp_path / "annotations.json")] == [2, None]
    with pytest.raises(ValueError, match="instruction, output, generator"):
        read_outputs(tmp_path / "annotations.json")
    with pytest.raises(ValueError, match=r"outputs\.json, line 2: got the keys .* expected an array"):
        read_annotations(tmp_path / "outputs.json")
    with pytest.raises(ValueError, match="got 1 annotations without a preference"):
        evaluate_annotations(annotations([None]))
