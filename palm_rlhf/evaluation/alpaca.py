"""AlpacaEval's files and win rates: in percent, of the second output over the first."""

import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import read_records
from palm_rlhf.evaluation.intervals import Interval, bootstrap_interval, exact_interval, standard_error
from palm_rlhf.evaluation.length_control import LengthEffect, Regularizer, fit_length_effect
from palm_rlhf.evaluation.message_text import finite_numbers
from palm_rlhf.model.files import write_text

DRAW = 1.5
OUTPUT_KEYS = ("instruction", "output", "generator")
GENERATORS = ("generator_1", "generator_2")
EXPECTED_ANNOTATIONS = (
    "expected an array, or lines, of objects with a preference from 1 to 2, the texts output_1 and output_2, and the "
    "names generator_1 and generator_2"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlpacaResult:
    """A model's results against the baseline; rates and errors are in percent."""

    win_rate: float
    """100 * mean(preference - 1)."""
    standard_error: float | None
    """Of the win rate, from the variance with n - 1."""
    n_wins: int
    n_losses: int
    n_draws: int
    length_controlled_win_rate: float | None
    """The win rate at equal output lengths (Dubois et al. 2024).

    None if an output is missing, or if there are too few annotations for the fit.
    """
    n_unparsed: int
    """Annotations without a preference. Of the other figures, only the length-controlled rate uses them."""
    win_rate_interval: Interval | None
    """By bootstrap."""
    decided_interval: Interval
    """Exact (Clopper-Pearson), of wins among wins and losses."""
    length_effect: LengthEffect | None

    def summary(self) -> dict[str, Any]:
        """Return the figures of AlpacaEval's leaderboards."""
        names = ("win_rate", "standard_error", "n_wins", "n_losses", "n_draws", "length_controlled_win_rate")
        return {name: getattr(self, name) for name in names}

    def numbers(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return json.loads(json.dumps(asdict(self)))


@beartype
def preference_of(annotation: Record) -> float | None:
    """Return the preference, from 1 (the first output) to 2 (the second), or None if there is no valid one.

    Old files write a draw as 0.
    """
    numbers = finite_numbers([annotation.get("preference")], 1)
    preference = None if numbers is None else numbers[0] or DRAW
    return preference if preference is not None and 1 <= preference <= 2 else None


@beartype
def read_annotations(path: str | os.PathLike[str], generator: str | None = None) -> list[Record]:
    """Read the annotations of one model against one baseline from a file in AlpacaEval's form.

    Raises ValueError if it is not clear which two models are compared.

    Args:
        path: The file.
        generator: The model (`generator_2`), for a file with several models.
    """
    annotations = []
    for line, record in read_records(path):
        if "preference" not in record or not all(isinstance(record.get(key), str | None) for key in GENERATORS):
            raise ValueError(f"{path}, line {line}: got the keys {sorted(record)[:8]}; {EXPECTED_ANNOTATIONS}")
        if not isinstance(record.get("index", 0), int):
            raise ValueError(f"{path}, line {line}: got the index {record['index']!r}, expected an integer")
        annotations.append(record)
    if not annotations:
        raise ValueError(f"{path}: got no annotations; {EXPECTED_ANNOTATIONS}")
    names = {annotation.get("generator_2") for annotation in annotations}
    if generator is not None:
        annotations = [annotation for annotation in annotations if annotation.get("generator_2") == generator]
    baselines = {annotation.get("generator_1") for annotation in annotations}
    if not annotations or (generator is None and len(names) > 1) or len(baselines) > 1:
        raise ValueError(
            f"{path}: got the models {sorted(map(str, names))} against {sorted(map(str, baselines))}, expected one "
            f"model against one baseline{'' if generator is None else f', and {generator!r} among the models'}: "
            "name the model by --generator, and split the file by its baselines"
        )
    if all(preference_of(annotation) is None for annotation in annotations):
        raise ValueError(
            f"{path}: got {len(annotations)} annotations without a preference, expected some from 1 to 2, or 0 for a "
            "draw"
        )
    return [{"index": index, **record} for index, record in enumerate(annotations)]


@beartype
def evaluate_annotations(
    annotations: Sequence[Record], *, regularizer: Regularizer | None = None, seed: int = 0
) -> AlpacaResult:
    """Compute the figures of a model's annotations. Raises ValueError if none has a preference.

    Args:
        annotations: As from `read_annotations`.
        regularizer: AlpacaEval's data for the length-controlled win rate; see `length_control`.
        seed: Of the bootstrap.
    """
    preferences = [preference_of(annotation) for annotation in annotations]
    shares = [preference - 1 for preference in preferences if preference is not None]
    if not shares:
        raise ValueError(
            f"got {len(annotations)} annotations without a preference, expected some from 1 to 2, or 0 for a draw"
        )
    wins, losses = sum(share > 0.5 for share in shares), sum(share < 0.5 for share in shares)
    error, interval = standard_error(shares), bootstrap_interval(shares, seed=seed)
    low, high = exact_interval(wins, wins + losses)
    effect = _length_effect(annotations, preferences, regularizer)
    win_rate = 100 * math.fsum(shares) / len(shares)
    if effect is not None and _is_extreme(win_rate, effect.win_rate):
        log.warning(
            "the win rate is %.1f %% at equal lengths, but %.1f %% as measured: if the lengths of the two models "
            "hardly overlap, the fit cannot separate the effect of length from the model's",
            effect.win_rate,
            win_rate,
        )
    return AlpacaResult(
        win_rate=win_rate,
        standard_error=None if error is None else 100 * error,
        n_wins=wins,
        n_losses=losses,
        n_draws=len(shares) - wins - losses,
        length_controlled_win_rate=None if effect is None else effect.win_rate,
        n_unparsed=len(annotations) - len(shares),
        win_rate_interval=None if interval is None else (100 * interval[0], 100 * interval[1]),
        decided_interval=(100 * low, 100 * high),
        length_effect=effect,
    )


def _length_effect(
    annotations: Sequence[Record], preferences: Sequence[float | None], regularizer: Regularizer | None
) -> LengthEffect | None:
    """Fit the regression on lengths. A model against itself has 50 percent by definition, as in AlpacaEval."""
    names = {annotation.get(key) for annotation in annotations for key in GENERATORS}
    if len(names) == 1 and None not in names:
        return LengthEffect(50.0, 0.0, 0.0, 0.0)
    if not all(isinstance(record.get(key), str) for record in annotations for key in ("output_1", "output_2")):
        return None
    lengths = [(len(record["output_1"]), len(record["output_2"])) for record in annotations]
    indices = [record.get("index", place) for place, record in enumerate(annotations)]
    shares = [None if preference is None else preference - 1 for preference in preferences]
    return fit_length_effect(shares, lengths, indices, regularizer)


def _is_extreme(before: float, after: float) -> bool:
    """Return whether a rate moves by more than 10 points and more than a quarter of the way to 0 or 100."""
    return after < before - max(before / 4, 10) or after > before + max((100 - before) / 4, 10)


@beartype
def read_outputs(path: str | os.PathLike[str]) -> list[Record]:
    """Read a model's outputs: records of instruction, output and generator. Raises ValueError for other records."""
    outputs = []
    for line, record in read_records(path):
        if not all(isinstance(record.get(key), str) for key in OUTPUT_KEYS):
            raise ValueError(
                f"{path}, line {line}: got the keys {sorted(record)[:8]}, expected texts as {', '.join(OUTPUT_KEYS)}"
            )
        outputs.append(record)
    return outputs


@beartype
def write_alpaca(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write outputs or annotations atomically as the JSON array that AlpacaEval reads."""
    write_text(Path(path), json.dumps(list(records), ensure_ascii=False, allow_nan=False, indent=2) + "\n")
