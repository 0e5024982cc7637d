"""Krippendorff's alpha: how far people's labels agree beyond chance.

Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011, https://repository.upenn.edu/asc_papers/43), sections
C and D. The libraries that have it are under the GPL, or install transformers, pandas, scikit-learn and NLTK with it.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Literal

import numpy as np
from beartype import beartype

Scale = Literal["nominal", "ordinal", "interval"]


@beartype
def krippendorff_alpha(labels: Iterable[tuple[Hashable, float | int]], scale: Scale) -> float | None:
    """Return 1 - (observed disagreement) / (disagreement by chance): 1 for full agreement, 0 for labels by chance.

    None where no unit has two labels, or where all labels are the same, so that chance would agree as well.

    Args:
        labels: A unit and its label, for each person that labelled it; people may leave units out.
        scale: Labels of a nominal scale differ or not; ordinal ones differ by the labels between them; the difference
            of interval ones is squared.
    """
    units: dict[Hashable, list[float]] = defaultdict(list)
    for unit, label in labels:
        units[unit].append(float(label))
    pairable = [found for found in units.values() if len(found) > 1]
    values = sorted({label for found in pairable for label in found})
    if len(values) < 2:
        return None
    place = {value: index for index, value in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for found in pairable:
        counts = np.bincount([place[label] for label in found], minlength=len(values)).astype(float)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(found) - 1)
    totals = coincidences.sum(axis=1)
    distances = _distances(np.array(values), totals, scale)
    by_chance = (np.outer(totals, totals) * distances).sum() / (totals.sum() - 1)
    return float(1 - (coincidences * distances).sum() / by_chance)


def _distances(values: np.ndarray, totals: np.ndarray, scale: Scale) -> np.ndarray:
    """Return the squared difference of each two labels, by how often each label was given: `v v`."""
    if scale == "nominal":
        return 1 - np.eye(len(values))
    if scale == "ordinal":  # the labels from one to the other, of which the two at the ends count half
        values = np.cumsum(totals) - totals / 2
    return (values[:, None] - values[None, :]) ** 2
