"""Vicuna's reviews: the published figures, and what counts as understood."""

import json

import pytest

from palm_rlhf.evaluation.comparisons import summarise
from palm_rlhf.evaluation.judging.reviews import compare_reviews, read_reviews

REVIEWS = "vicuna_bench/review_bard_vicuna-13b.jsonl"


def summary_of(path, **options):
    comparisons, unparsed = compare_reviews(read_reviews(path), **options)
    return summarise(comparisons, "bard", "vicuna-13b"), unparsed


def test_the_stored_scores_give_the_published_figures(shared_data):
    summary, unparsed = summary_of(shared_data(REVIEWS))
    assert (summary.score_1, summary.score_2) == (664.0, 655.5)
    assert (summary.wins, summary.losses, summary.ties) == (30, 40, 10)
    assert (summary.parsed, summary.unparsed, unparsed) == (80, 0, [])
    assert summary.relative == 664 / 655.5
    assert summary.win_rate == (30 + 10 / 2) / 80


def test_the_first_line_of_all_but_three_texts_is_the_stored_scores(shared_data):
    reviews = read_reviews(shared_data(REVIEWS))
    different = [review.question_id for review in reviews if review.reparsed != review.stored]
    assert different == ["68", "69", "70"]
    assert [review.reparsed for review in reviews if review.question_id in different] == [None] * 3


def test_what_is_not_understood_is_counted_and_shown_and_never_scored(shared_data, evaluate):
    path = shared_data(REVIEWS)
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    left = [record["score"] for record in stored if record["question_id"] not in (68, 69, 70)]
    result, printed = evaluate("reviews", path, "--models", "bard", "vicuna-13b", "--reparse")
    assert result == {
        "model_1": "bard",
        "model_2": "vicuna-13b",
        "score_1": sum(first for first, _ in left),
        "score_2": sum(second for _, second in left),
        "relative": sum(first for first, _ in left) / sum(second for _, second in left),
        "wins": 27,
        "losses": 40,
        "ties": 10,
        "parsed": 77,
        "unparsed": 3,
    }
    assert "First, I will solve the problem independently" in printed


def test_the_command_names_the_models_by_default(shared_data, evaluate):
    result, printed = evaluate(
        "reviews", shared_data(REVIEWS), "--questions", shared_data("vicuna_bench/question.jsonl")
    )
    assert (result["model_1"], result["model_2"]) == ("model_1", "model_2")
    assert (result["score_1"], result["score_2"], result["wins"]) == (664.0, 655.5, 30)
    assert "common-sense" in printed and "roleplay" in printed


def test_a_stored_minus_one_is_not_scored(tmp_path, write_lines):
    records = [{"question_id": 1, "text": "?", "score": [-1, -1]}, {"question_id": 2, "text": "8 6", "score": [8, 6]}]
    summary, unparsed = summary_of(write_lines(tmp_path / "reviews.jsonl", records))
    assert (summary.score_1, summary.parsed, summary.unparsed, summary.ties) == (8.0, 1, 1, 0)
    assert [text.question_id for text in unparsed] == ["1"]


@pytest.mark.parametrize("record", [{"question_id": 1}, {"text": "9 8"}, {"question_id": 1, "text": 5}])
def test_another_file_is_refused(tmp_path, write_lines, record):
    with pytest.raises(ValueError, match="expected a review"):
        read_reviews(write_lines(tmp_path / "reviews.jsonl", [record]))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no reviews"):
        read_reviews(tmp_path / "empty.jsonl")
