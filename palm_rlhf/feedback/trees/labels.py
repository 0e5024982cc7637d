"""The labels of messages, by the names that Open-Assistant's files have, and the acceptance that follows from them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from palm_rlhf.feedback.refusals import FeedbackError

SPAM, LANG_MISMATCH = "spam", "lang_mismatch"
REQUIRED = (SPAM, LANG_MISMATCH)
FLAGS = (  # yes or no
    *REQUIRED,
    "not_appropriate",
    "pii",
    "hate_speech",
    "sexual_content",
    "political_content",
    "violence",
)
SCALES = ("quality", "toxicity", "humor", "helpfulness", "creativity")  # from 0 to 1


def labels_of(role: str) -> tuple[str, ...]:
    """Return the labels that are asked for a message of a role: only an assistant's is helpful or not."""
    return tuple(name for name in FLAGS + SCALES if role == "assistant" or name != "helpfulness")


def check_labels(labels: Mapping[str, Any], role: str) -> dict[str, float]:
    """Return labels as numbers: 0 or 1 of a flag, 0 to 1 of a scale.

    Raises FeedbackError for a name that is not asked for, a missing flag of `REQUIRED`, or another value.
    """
    asked = labels_of(role)
    if unknown := [name for name in labels if name not in asked]:
        raise FeedbackError(f"got the label {unknown[0]!r}, expected some of {', '.join(asked)}")
    if missing := [name for name in REQUIRED if name not in labels]:
        raise FeedbackError(f"the label {missing[0]} is missing: spam and lang_mismatch are asked of everybody")
    numbers = {}
    for name, value in labels.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
            raise FeedbackError(f"got {name}={value!r}, expected a number from 0 to 1")
        if name in FLAGS and value not in (0, 1):
            raise FeedbackError(f"got {name}={value!r}, expected 0 (no) or 1 (yes)")
        numbers[name] = float(value)
    return numbers


def acceptance(reviews: Sequence[Mapping[str, Any]]) -> float:
    """Return 1 - (mean spam + mean wrong language) of at least one review, as Open-Assistant's tree manager does."""
    return 1 - sum(labels[SPAM] + labels[LANG_MISMATCH] for labels in reviews) / len(reviews)
