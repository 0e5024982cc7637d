"""AlpacaEval's figures beside those of the package `alpaca-eval` itself, on made-up annotations."""

import json
import math
import warnings

import numpy as np
import pytest

from palm_rlhf.evaluation.alpaca import evaluate_annotations
from palm_rlhf.evaluation.length_control import read_regularizer

DIFFICULTIES = np.random.default_rng(7).normal(size=80).round(3).tolist()
MODES = {"length_controlled_v1": True, "length_controlled_minimal": False}  # whether with df_gamed.csv


@pytest.fixture(scope="module")
def gamed(tmp_path_factory):
    """A file like df_gamed.csv: two baselines, told to write less and more, one preference of which is missing."""
    generator = np.random.default_rng(1)
    rows = ["index,model,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for model, shift in (("concise", 1.5), ("verbose", -1.5)):
        for index, difficulty in enumerate(DIFFICULTIES):
            delta = shift + 0.1 * generator.normal()
            share = 1 / (1 + math.exp(2 * math.tanh(delta) - 0.3 * difficulty))
            rows.append(f"{index},{model},{'' if index == 3 else share},{delta},{difficulty},False")
    path = tmp_path_factory.mktemp("gamed") / "df_gamed.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def alpaca_eval(gamed):
    """The figures of the package, which takes our file for the one that it would download."""
    reason = "needs the extra peers: pip install -e '.[peers]'"
    pytest.importorskip("alpaca_eval", reason=reason, exc_type=ImportError)
    pandas = pytest.importorskip("pandas", reason=reason)
    from alpaca_eval.metrics import glm_winrate

    def figures(records, mode):
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")
            patch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(gamed))
            options = {"glm_name": mode, "save_weights_dir": None}
            return glm_winrate.get_length_controlled_winrate(pandas.DataFrame(records), **options)

    return figures


def made_up(count, share_of_nulls, seed, model="m"):
    """Annotations by a judge who likes long outputs and easy instructions, with draws of both kinds and nulls."""
    generator = np.random.default_rng(seed)
    records = []
    for index in range(count):
        first, second = (int(length) for length in generator.integers(1, 500, size=2))
        share = 1 / (1 + math.exp((first - second) / 150 - DIFFICULTIES[index]))
        preference = 1 + (share if generator.random() < 0.7 else round(share))
        if generator.random() < 0.15:
            preference = float(generator.choice([0, 1.5]))
        if generator.random() < share_of_nulls:
            preference = None
        names = {"generator_1": "baseline", "generator_2": model, "annotator": "judge"}
        outputs = {"output_1": "é" * first, "output_2": "x" * second}
        records.append({"instruction": f"Do {index}.", "preference": preference, **outputs, **names})
    return records


@pytest.mark.parametrize(
    ("count", "share_of_nulls", "seed"), [(80, 0, 0), (80, 0.3, 1), (60, 0.7, 2), (25, 0.2, 3), (9, 0.2, 4), (5, 0, 5)]
)
@pytest.mark.parametrize("mode", MODES)
def test_the_figures_are_those_of_the_package(alpaca_eval, gamed, mode, count, share_of_nulls, seed):
    records = made_up(count, share_of_nulls, seed)
    expected = alpaca_eval(records, mode)
    found = evaluate_annotations(records, regularizer=read_regularizer(gamed) if MODES[mode] else None)
    assert found.win_rate == pytest.approx(expected["win_rate"])
    assert found.standard_error == pytest.approx(expected["standard_error"])
    counts = (expected["n_wins"], expected["n_wins_base"], expected["n_draws"])
    assert (found.n_wins, found.n_losses, found.n_draws) == counts
    # Its solver stops at a tolerance of 1e-4; to leave the nulls out of the mean is an error of whole points.
    assert found.length_controlled_win_rate == pytest.approx(expected["length_controlled_winrate"], abs=0.02)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_where_the_package_has_no_figure_there_is_none(alpaca_eval, gamed, mode, count):
    records = made_up(count, 0, 6)
    found = evaluate_annotations(records, regularizer=read_regularizer(gamed) if MODES[mode] else None)
    try:
        expected = alpaca_eval(records, mode)["length_controlled_winrate"]
    except ValueError:  # it cannot fit
        assert found.length_controlled_win_rate is None
    else:
        assert found.length_controlled_win_rate == pytest.approx(expected, abs=0.02)


def test_a_model_against_itself_wins_half(alpaca_eval):
    records = made_up(20, 0, 7, model="baseline")
    found = evaluate_annotations(records)
    expected = alpaca_eval(records, "length_controlled_minimal")
    assert found.length_controlled_win_rate == expected["length_controlled_winrate"] == 50
    assert found.win_rate == pytest.approx(expected["win_rate"])


def test_each_of_several_models_in_a_file_is_alone_against_the_baseline(alpaca_eval, gamed, evaluate, tmp_path):
    models = {"m": made_up(40, 0.3, 8), "other": made_up(40, 0.5, 9, "other")}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([record for pair in zip(*models.values()) for record in pair]))
    for model, records in models.items():
        expected = alpaca_eval(records, "length_controlled_v1")
        found, _ = evaluate("alpaca", path, "--generator", model, "--regularizer", gamed)
        rate = found["length_controlled_win_rate"]
        assert rate == pytest.approx(expected["length_controlled_winrate"], abs=0.02)
