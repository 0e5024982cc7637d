"""Reviews in Vicuna's format: a judge's text about two answers to a question, and the stored scores."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from beartype import beartype

from palm_rlhf.data.files.records import read_records
from palm_rlhf.evaluation.comparisons import Comparison, UnparsedText
from palm_rlhf.evaluation.message_text import name_of, text_of
from palm_rlhf.evaluation.verdicts import Scores, parse_scores, stored_scores


class Review(NamedTuple):
    """A judge's text about two answers, and its stored scores; None if they mark it as unparsed."""

    question_id: str
    text: str
    stored: Scores | None

    @property
    def reparsed(self) -> Scores | None:
        """The scores on the text's first line."""
        return parse_scores(self.text)


@beartype
def read_reviews(path: str | os.PathLike[str]) -> list[Review]:
    """Read reviews: records of {"question_id", "text", "score": [first, second]}. Raises ValueError for others."""
    reviews = []
    for line, record in read_records(path):
        try:
            text = text_of(record.get("text"))
            if text is None:
                raise ValueError("the review has no text")
            question_id = name_of(record.get("question_id"), "question_id")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {line}: {error}; got the keys {sorted(record)[:8]}, expected a review: question_id, "
                "text and score"
            ) from error
        reviews.append(Review(question_id, text, stored_scores(record.get("score"))))
    if not reviews:
        raise ValueError(f"{path}: got no reviews, expected lines of question_id, text and score")
    return reviews


@beartype
def compare_reviews(
    reviews: Sequence[Review], *, reparse: bool = False, categories: Mapping[str, str] | None = None
) -> tuple[list[Comparison], list[UnparsedText]]:
    """Return a comparison for each review, from its stored scores or its text, and the reviews without scores."""
    comparisons, unparsed = [], []
    for review in reviews:
        scores = review.reparsed if reparse else review.stored
        if scores is None:
            unparsed.append(UnparsedText(review.question_id, 1, review.text))
        comparisons.append(
            Comparison(
                review.question_id,
                given=() if scores is None else (scores,),
                unparsed=int(scores is None),
                category=(categories or {}).get(review.question_id),
            )
        )
    return comparisons, unparsed
