"""The simulation of how many votes the choice of pairs saves."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize

from benchmarks.pair_selection import HOW, REGIMES, Regime, Taste, candidates, fit, learn, main, summary, votes_to_reach

CERTAIN = "10% of votes wrong"


def test_uncertain_pairs_need_fewer_votes_than_random_ones(tmp_path, capsys):
    main(["--seeds", "6", "--rounds", "5", "--regimes", CERTAIN, "--plot", str(tmp_path / "curves.png")])
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])["regimes"][CERTAIN]
    assert found["random"]["votes"] == 160
    assert found["uncertainty"]["votes"] < 140 and found["uncertainty, a quarter random"]["votes"] < 140
    assert [len(found[how]["accuracy"]) for how in HOW] == [5, 5, 5]
    assert found["random"]["accuracy"][0] < found["random"]["accuracy"][-1] < 1
    assert any(line.startswith(f"| {CERTAIN} | 160 (") for line in printed)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_depends_on_its_seed_alone():
    runs = [learn(Regime(num_prompts=8), "uncertainty", seed, 2, 8) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_the_fit_is_the_mode_of_the_posterior():
    rng = np.random.default_rng(0)
    differences, wins = rng.normal(size=(40, 3)), (rng.random(40) < 0.7).astype(float)

    def minus_log_posterior(weights):
        signs = np.where(wins == 1, 1, -1)
        return np.log1p(np.exp(-signs * (differences @ weights))).sum() + 0.5 * weights @ weights

    assert fit(differences, wins) == pytest.approx(minimize(minus_log_posterior, np.zeros(3), tol=1e-12).x, abs=1e-5)


def test_votes_are_wrong_as_often_as_the_regime_says():
    taste = Taste(Regime(flips=0.1), np.random.default_rng(0))
    assert np.mean([taste.prefers_first(1e-9) for _ in range(4000)]) == pytest.approx(0.9, abs=0.02)
    unsure = Taste(Regime(flips=0.1, sharpness=2.0), np.random.default_rng(0))
    chance = 1 / (1 + np.exp(-2 * 0.4))
    expected = 0.9 * chance + 0.1 * (1 - chance)
    assert np.mean([unsure.prefers_first(0.4) for _ in range(4000)]) == pytest.approx(expected, abs=0.02)


def test_a_taste_bends_as_far_as_the_regime_says():
    answers = np.random.default_rng(1).normal(size=(20000, 16))
    tastes = [Taste(Regime(bend=bend), np.random.default_rng(2)) for bend in (0.0, 0.25)]
    linear = np.linalg.lstsq(answers, np.stack([taste.scores(answers) for taste in tastes], axis=1), rcond=None)[0]
    left = [np.var(taste.scores(answers) - answers @ linear[:, place]) for place, taste in enumerate(tastes)]
    assert left[0] == pytest.approx(0, abs=1e-12) and left[1] > 0.1


def test_pairs_of_one_prompt_are_candidates():
    answers = np.arange(12.0).reshape(2, 3, 2)
    pairs = candidates(answers, np.array([1.0, 0.0]))
    assert [(pair.prompt_key, pair.first_id, pair.second_id, pair.score_difference) for pair in pairs[:3]] == [
        ("0", "0", "1", -2.0),
        ("0", "0", "2", -4.0),
        ("0", "1", "2", -2.0),
    ]
    assert len(pairs) == 6 and {pair.score_difference for pair in candidates(answers, None)} == {None}


def test_votes_to_reach_an_accuracy():
    curve = np.array([0.5, 0.7, 0.6, 0.8])
    assert votes_to_reach(0.55, curve, 10) == pytest.approx(12.5)
    assert votes_to_reach(0.7, curve, 10) == pytest.approx(35)  # for good, after it was lost again
    assert votes_to_reach(0.4, curve, 10) == 10 and votes_to_reach(0.9, curve, 10) == np.inf
    runs = {"random": np.array([curve, curve, curve]), "other": np.array([curve + 0.2, curve, curve - 0.1])}
    found = summary(runs, 10)
    assert (found["random"]["votes"], found["other"]["votes"]) == (40, 40)
    assert (found["other"]["votes_p20"], found["other"]["votes_p80"]) == (15, None)
    assert found["other"]["accuracy"] == pytest.approx(curve.tolist())
    assert len(REGIMES) == 5
