"""Parsing of a judge's reply: two scores, a rating or a verdict; None if the reply is not clear."""

import re
from collections.abc import Sequence
from typing import Literal

from beartype import beartype

from palm_rlhf.evaluation.message_text import finite_numbers, without_thoughts

Scores = tuple[float, float]
LOWEST, HIGHEST = 1.0, 10.0

NUMBER = r"(-?\d+(?:\.\d+)?)(?:\s*/\s*10)?"
LABEL = r"(?:the\s+)?(?:scores?\s+(?:of|for)\s+)?(?:assistant|answer|response)\s*{}\s*(?:'s\s+score)?\s*[:=]\s*"
PAIR = re.compile(rf"{NUMBER}(?:\s*[,;]\s*|\s+){NUMBER}")
LABELLED = re.compile(
    rf"{LABEL.format('(?:1|A)')}{NUMBER}[\s,;.]+{LABEL.format('(?:2|B)')}{NUMBER}", re.IGNORECASE | re.ASCII
)
MARKUP = str.maketrans("", "", "*_`#")
RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?\]\]", re.ASCII)
VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
VERDICT_SCORES = {"A": (1.0, 0.0), "B": (0.0, 1.0), "C": (0.5, 0.5)}


@beartype
def parse_scores(text: str, where: Literal["first", "last"] = "first") -> Scores | None:
    """Return the two scores, 1 to 10, on the first or last line of a text that is not blank; None without them.

    The line holds nothing else: ``9 8.5``, ``9, 8``, ``9/10 8/10`` or ``Assistant 1: 9, Assistant 2: 8``. At the end
    of a text, the scores may also have a line each. Numbers elsewhere belong to the explanation and are ignored, and so
    is the judge's reasoning (``<think>...</think>``).
    """
    lines = [line for line in without_thoughts(text).translate(MARKUP).splitlines() if line.strip()]
    candidates = [lines[:1]] if where == "first" else [lines[-1:], lines[-2:]]
    for candidate in candidates:
        line = " ".join(candidate).strip().rstrip(".")
        match = PAIR.fullmatch(line) or LABELLED.fullmatch(line)
        if match is not None:
            return _on_the_scale(match.groups())
    return None


@beartype
def parse_rating(text: str) -> float | None:
    """Return the rating in ``[[7]]``, 1 to 10; None without one, or if a text has different ones."""
    ratings = {float(number) for number in RATING.findall(without_thoughts(text))}
    if len(ratings) != 1:
        return None
    (rating,) = ratings
    return rating if LOWEST <= rating <= HIGHEST else None


@beartype
def parse_verdict(text: str) -> Scores | None:
    """Return the shares of the win for ``[[A]]``, ``[[B]]`` or ``[[C]]`` (a tie); None unless there is exactly one."""
    verdicts = set(VERDICT.findall(without_thoughts(text)))
    return VERDICT_SCORES[verdicts.pop()] if len(verdicts) == 1 else None


@beartype
def stored_scores(value: object) -> Scores | None:
    """Return the two scores stored in a file; None unless both are at least 0 (-1 marks an unparsed review)."""
    numbers = finite_numbers(value, 2)
    return (numbers[0], numbers[1]) if numbers is not None and min(numbers) >= 0 else None


def _on_the_scale(numbers: Sequence[str]) -> Scores | None:
    first, second = map(float, numbers)
    return (first, second) if LOWEST <= min(first, second) and max(first, second) <= HIGHEST else None
