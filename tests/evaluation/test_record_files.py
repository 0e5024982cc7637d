"""What the commands of evaluation read is the same in lines of JSON, printed objects, CSV and parquet."""

import json

import pytest

from palm_rlhf.data.files.records import read_records, write_records
from palm_rlhf.evaluation.alpaca import evaluate_annotations, read_annotations, read_outputs
from palm_rlhf.evaluation.judging.answers import read_answers, read_questions
from palm_rlhf.evaluation.judging.reviews import read_reviews
from palm_rlhf.evaluation.measures.answer_statistics import read_output_texts
from palm_rlhf.evaluation.measures.reward_bench import read_trios
from palm_rlhf.evaluation.ratings import read_battles

KINDS = ["csv", "csv.gz", "parquet", "printed"]
USER = [{"role": "user", "content": "Which colour has the sky?"}]
MADE = {
    "mt-bench questions": (read_questions, [{"question_id": 81, "turns": ["Hi", "1, 2"], "reference": ["3", "4"]}]),
    "mt-bench answers": (
        read_answers,
        [{"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": ["Ho", "3"]}]}],
    ),
    "alpaca outputs": (read_outputs, [{"instruction": "Hi", "output": "12", "generator": "m"}]),
    "answers of alpaca": (read_answers, [{"instruction": "Hi", "output": "[1]", "generator": "m"}]),
    "battles": (
        read_battles,
        [{"model_a": "a", "model_b": "b", "winner": "model_a"}, {"model_a": "a", "model_b": "b", "winner": "tie"}],
    ),
    "scored reviews": (read_reviews, [{"question_id": 1, "text": "9 8\nGood.", "score": [9.0, 8.0]}]),
    "texts": (read_output_texts, [{"output": "7", "lang": "en"}, {"output": "two words", "lang": "de"}]),
    "conversations": (
        read_output_texts,
        [{"messages": [*USER, {"role": "assistant", "content": "Blue."}]}],
    ),
    "trios": (
        read_trios,
        [{"prompt": "Which colour?", "chosen": "Blue.", "rejected": "Red.", "subset": "mt-bench-easy", "id": 3}],
    ),
}


def in_kind(folder, kind, rows):
    if kind == "printed":
        path = folder / "rows.json"
        path.write_text("\n".join(json.dumps(row, indent=2) for row in rows))
        return path
    write_records(folder / f"rows.{kind}", rows)
    return folder / f"rows.{kind}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("read", "rows"), MADE.values(), ids=MADE)
def test_every_reader_reads_every_kind_of_file(tmp_path, kind, read, rows):
    write_records(tmp_path / "rows.jsonl", rows)
    expected = read(tmp_path / "rows.jsonl")
    assert expected and read(in_kind(tmp_path, kind, rows)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("question.jsonl", read_questions),
        ("answer_bard.jsonl", read_answers),
        ("answer_vicuna-13b.jsonl", read_output_texts),
        ("review_bard_vicuna-13b.jsonl", read_reviews),
    ],
)
def test_the_real_files_too(tmp_path, shared_data, kind, name, read):
    path = shared_data(f"vicuna_bench/{name}")
    assert read(in_kind(tmp_path, kind, [record for _, record in read_records(path)])) == read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_preferences_of_annotations_are_numbers_in_tables_too(tmp_path, kind):
    row = {"instruction": "Hi", "output_1": "12", "output_2": "Ho", "generator_1": "a", "generator_2": "b"}
    rows = [{**row, "preference": preference} for preference in (1.0, 2.0, 1.25, None)]
    write_records(tmp_path / "rows.jsonl", rows)
    expected = evaluate_annotations(read_annotations(tmp_path / "rows.jsonl"))
    assert evaluate_annotations(read_annotations(in_kind(tmp_path, kind, rows))) == expected
    assert read_battles(in_kind(tmp_path, kind, rows)) == read_battles(tmp_path / "rows.jsonl")
