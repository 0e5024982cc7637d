"""Questions and the answers of models, in the file formats of Vicuna, MT-bench and AlpacaEval."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import read_records
from palm_rlhf.evaluation.message_text import name_of, text_of, texts_of_choice, texts_of_turns

Turns = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question with one or more turns; `references` are correct answers that a judge may see."""

    question_id: str
    turns: Turns
    references: Turns = ()
    category: str | None = None


@dataclass(frozen=True)
class ModelAnswers:
    """A model's answers, one for each turn, by question id."""

    model: str
    turns: dict[str, Turns]


class Pair(NamedTuple):
    """A question with the answers of two models."""

    question: Question
    first: Turns
    second: Turns


@beartype
def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Read the questions of a file. Raises ValueError for another format or a repeated id.

    Vicuna's records are {"question_id", "text", "category"}, MT-bench's {"question_id", "turns", "reference",
    "category"}. AlpacaEval's outputs are questions too, with the "instruction" as the id.
    """
    questions, ids = [], _Ids()
    for line, record in read_records(path):
        try:
            turns, references = _turns(record, "turns", "text", "instruction"), _turns(record, "reference")
            question_id = ids.of(record)
            if not turns:
                raise ValueError("the question is empty")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {line}: {error}; got the keys {sorted(record)[:8]}, expected a question: question_id "
                "with text or turns, or an instruction"
            ) from error
        category = _first(record, "category", "dataset")
        category = None if category is None else str(category)
        questions.append(Question(question_id, tuple(turns), tuple(references), category))
    _require_unique([question.question_id for question in questions], path, "questions")
    return questions


@beartype
def read_answers(path: str | os.PathLike[str], model: str | None = None) -> ModelAnswers:
    """Read a model's answers. Raises ValueError for another format, several models, or a question answered twice.

    Vicuna's records are {"question_id", "model_id", "text"}, MT-bench's {"question_id", "model_id", "choices":
    [{"turns"}]}, AlpacaEval's {"instruction", "output", "generator"}. `model` replaces the name in the file.
    """
    answers: list[tuple[str, Turns]] = []
    names, ids = [], _Ids()
    for line, record in read_records(path):
        try:
            turns, question_id = _answer(record), ids.of(record)
            name = _first(record, "model_id", "generator")
            names.append(os.fspath(path) if name is None else name_of(name, "model_id"))
            if not turns:
                raise ValueError("the answer is empty")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {line}: {error}; got the keys {sorted(record)[:8]}, expected an answer: question_id, "
                "model_id and text or choices, or instruction, output and generator"
            ) from error
        answers.append((question_id, tuple(turns)))
    if len(set(names)) != 1:
        raise ValueError(f"{path}: got answers of {sorted(set(names))}, expected those of one model: split the file")
    _require_unique([question_id for question_id, _ in answers], path, "answers")
    return ModelAnswers(names[0] if model is None else model, dict(answers))


@beartype
def pair_answers(questions: Sequence[Question], first: ModelAnswers, second: ModelAnswers) -> list[Pair]:
    """Pair the answers of two models by question. Raises ValueError if an answer to a turn is missing."""
    return [Pair(question, *(answer_to(question, answers) for answers in (first, second))) for question in questions]


@beartype
def answer_to(question: Question, answers: ModelAnswers) -> Turns:
    """Return a model's answers to all turns of a question. Raises ValueError if one is missing."""
    turns = answers.turns.get(question.question_id, ())
    if len(turns) < len(question.turns):
        raise ValueError(
            f"got {len(turns)} answers of {answers.model} to question {question.question_id!r}, expected "
            f"{len(question.turns)}, one for each turn: complete the file of the answers"
        )
    return turns[: len(question.turns)]


def _answer(record: Record) -> list[str]:
    choices = record.get("choices")
    if isinstance(choices, list) and choices:
        return texts_of_choice(choices[0])
    return _turns(record, "text", "output", "turns")


def _turns(record: Record, *keys: str) -> list[str]:
    """Return the texts of all turns under the first of the keys that a record has."""
    value = _first(record, *keys)
    if isinstance(value, list) and (value is record.get("turns") or all(isinstance(part, str) for part in value)):
        return texts_of_turns(value)
    text = text_of(value)
    return [] if text is None else [text]


def _first(record: Record, *keys: str) -> Any:
    """Return the value of the first of the keys that a record has."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


class _Ids:
    """The ids of a file's records. A repeated instruction gets a number, which is the same in all files."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def of(self, record: Record) -> str:
        if "question_id" in record:
            return name_of(record["question_id"], "question_id")
        instruction = record.get("instruction")
        if not isinstance(instruction, str):
            raise ValueError("no question_id, and no instruction that is a string")
        self.seen[instruction] += 1
        return instruction if self.seen[instruction] == 1 else f"{instruction} ({self.seen[instruction]})"


def _require_unique(ids: Sequence[str], path: str | os.PathLike[str], what: str) -> None:
    twice = next((one for place, one in enumerate(ids) if one in ids[:place]), None) if len({*ids}) < len(ids) else None
    if not ids or twice is not None:
        got = f"{twice!r} twice" if ids else "nothing"
        raise ValueError(f"{path}: got {got} among the {what}, expected each question once, and at least one")
