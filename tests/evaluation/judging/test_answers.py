"""Questions, answers and what judges are shown of them."""

import pytest

from palm_rlhf.evaluation.judging.answers import Question, read_answers, read_questions
from palm_rlhf.evaluation.judging.judge_prompts import judge_messages


def test_the_bench_of_vicuna(shared_data):
    folder = shared_data("vicuna_bench")
    questions = read_questions(folder / "question.jsonl")
    assert len(questions) == 80 and questions[0].turns == ("How can I improve my time management skills?",)
    assert {question.category for question in questions} >= {"generic", "fermi", "coding"}
    answers = read_answers(folder / "answer_vicuna-13b.jsonl")
    assert answers.model == "vicuna-13b:20230322-clean-lang" and len(answers.turns) == 80
    assert read_answers(folder / "answer_bard.jsonl", "bard").model == "bard"


def test_the_forms(tmp_path, write_lines):
    mt_bench = [
        {"question_id": 81, "category": "math", "turns": ["a?", "b?"], "reference": ["1", "2"]},
        {"question_id": 82, "category": "writing", "turns": ["c?", "d?"]},
    ]
    assert read_questions(write_lines(tmp_path / "q.jsonl", mt_bench)) == [
        Question("81", ("a?", "b?"), ("1", "2"), "math"),
        Question("82", ("c?", "d?"), (), "writing"),
    ]
    choices = [{"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": ["x", "y"]}, {"turns": ["z"]}]}]
    assert read_answers(write_lines(tmp_path / "a.jsonl", choices)).turns == {"81": ("x", "y")}
    outputs = write_lines(tmp_path / "o.jsonl", [{"instruction": "Say a", "output": "a", "generator": "g"}])
    assert read_questions(outputs) == [Question("Say a", ("Say a",))]
    twice = write_lines(tmp_path / "t.jsonl", [{"instruction": "a", "output": o, "generator": "g"} for o in "xy"])
    assert [question.question_id for question in read_questions(twice)] == ["a", "a (2)"]
    assert read_answers(twice).turns == {"a": ("x",), "a (2)": ("y",)}
    assert read_answers(outputs).model == "g" and read_answers(outputs).turns == {"Say a": ("a",)}


@pytest.mark.parametrize(
    "records, message",
    [
        ([{"question_id": 1}], "expected an answer"),
        ([{"text": "x"}], "expected an answer"),
        ([{"question_id": 1, "choices": []}], "expected an answer"),
        ([{"question_id": 1, "text": "x"}, {"question_id": "1", "text": "y"}], "'1' twice"),
        (
            [{"question_id": 1, "text": "x", "model_id": "a"}, {"question_id": 2, "text": "y", "model_id": "b"}],
            "one model",
        ),
        ([], "expected"),
    ],
)
def test_other_answers_are_refused(tmp_path, write_lines, records, message):
    with pytest.raises(ValueError, match=message):
        read_answers(write_lines(tmp_path / "answers.jsonl", records))


@pytest.mark.parametrize("record", [{"question_id": 1}, {"text": "x"}, {"question_id": 1, "turns": [1]}])
def test_other_questions_are_refused(tmp_path, write_lines, record):
    with pytest.raises(ValueError, match="expected a question"):
        read_questions(write_lines(tmp_path / "questions.jsonl", [record]))


QUESTION = Question("1", ("FIRST?", "SECOND?"), ("RIGHT1", "RIGHT2"))
REPLIES = ("a1", "a2"), ("b1", "b2")


@pytest.mark.parametrize("method, form", [("scores", "first line"), ("evidence", "last line"), ("verdict", "[[C]]")])
def test_a_judge_sees_the_turn_and_all_before_it_and_no_more(method, form):
    system, first = judge_messages(method, QUESTION, REPLIES)
    assert system["role"] == "system" and form in first["content"]
    assert first["content"].index("FIRST?") < first["content"].index("a1") < first["content"].index("b1")
    assert "RIGHT1" in first["content"]
    assert not any(later in first["content"] for later in ("SECOND?", "a2", "b2", "RIGHT2"))
    _, second = judge_messages(method, QUESTION, REPLIES, 2)
    places = [second["content"].index(part) for part in ("RIGHT2", "FIRST?", "a1", "SECOND?", "a2", "b1", "b2")]
    assert places == sorted(places) and "last message" in second["content"]
    _, swapped = judge_messages(method, QUESTION, REPLIES[::-1])
    assert swapped["content"].index("b1") < swapped["content"].index("a1")


def test_a_single_answer_is_rated_alone():
    _, message = judge_messages("rating", QUESTION, REPLIES[:1])
    assert "a1" in message["content"] and "b1" not in message["content"] and "[[5]]" in message["content"]
    assert "Assistant 1" not in message["content"]
    assert "RIGHT1" not in judge_messages("rating", Question("1", ("FIRST?",)), REPLIES[:1])[1]["content"]
