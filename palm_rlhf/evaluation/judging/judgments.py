"""Judgments: the requests to a judge, their collection in a journal, and the comparisons and ratings they give."""

import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple

from beartype import beartype
from tqdm import tqdm

from palm_rlhf.evaluation.comparisons import Comparison, UnparsedText
from palm_rlhf.evaluation.judging.answers import ModelAnswers, Pair, Question, answer_to
from palm_rlhf.evaluation.judging.journal import Entry, Journal
from palm_rlhf.evaluation.judging.judge_prompts import Method
from palm_rlhf.evaluation.judging.judges import Judge, JudgeRequest
from palm_rlhf.evaluation.message_text import finite_numbers
from palm_rlhf.evaluation.verdicts import Scores, parse_rating, parse_scores, parse_verdict


@beartype
def pairwise_requests(
    pairs: Sequence[Pair], models: tuple[str, str], method: Method, *, samples: int = 1, sees_order: bool = True
) -> list[JudgeRequest]:
    """Return the requests to compare two models: each turn in both orders, `samples` times.

    A judge that sees no order is asked in one order. Raises ValueError for several samples of such a judge, because
    they would be the same.
    """
    if method == "rating":
        raise ValueError("got the method 'rating', which rates single answers; expected scores, evidence or verdict")
    _check_samples(samples, sees_order)
    return [
        JudgeRequest(
            question,
            turn,
            models[::-1] if swapped else models,
            (second, first) if swapped else (first, second),
            method,
            swapped,
            sample,
        )
        for question, first, second in pairs
        for turn in range(1, len(question.turns) + 1)
        for swapped in ((False, True) if sees_order else (False,))
        for sample in range(samples)
    ]


@beartype
def rating_requests(
    questions: Sequence[Question], answers: ModelAnswers, *, samples: int = 1, sees_order: bool = True
) -> list[JudgeRequest]:
    """Return the requests to rate a model's answers: each turn `samples` times. Errors as in `pairwise_requests`."""
    _check_samples(samples, sees_order)
    return [
        JudgeRequest(question, turn, (answers.model,), (answer_to(question, answers),), "rating", sample=sample)
        for question in questions
        for turn in range(1, len(question.turns) + 1)
        for sample in range(samples)
    ]


def _check_samples(samples: int, sees_order: bool) -> None:
    if samples < 1 or (samples > 1 and not sees_order):
        expected = "at least 1" if sees_order else "1: this judge gives the same judgment each time"
        raise ValueError(f"got samples {samples}, expected {expected}")


@beartype
def collect_judgments(
    requests: Sequence[JudgeRequest], judge: Judge, journal: Journal, *, concurrency: int = 1
) -> list[Entry]:
    """Return the judgments in the order of the requests; ask the judge for those that the journal lacks.

    A thread writes each judgment to disk before it asks for the next, so that a killed run continues where it stopped.
    If a judgment fails, no more are requested, running requests are awaited and stored, and the OSError is raised.
    """
    if concurrency < 1:
        raise ValueError(f"got concurrency {concurrency}, expected at least 1")
    keys = [request.key(judge) for request in requests]
    for key in journal.entries.keys() & set(keys):
        _check_entry(journal, key)
    missing = {key: request for key, request in zip(keys, requests) if key not in journal}
    bar = tqdm(desc=f"asking {judge.name}", total=len(missing), unit="judgment", disable=None)

    failed = threading.Event()

    def ask(key: str, request: JudgeRequest) -> None:
        if failed.is_set():
            return
        try:
            journal.add(_entry(key, request, judge))
        except BaseException:
            failed.set()
            raise
        bar.update()

    with bar, ThreadPoolExecutor(min(concurrency, judge.max_concurrency or concurrency)) as pool:
        futures = [pool.submit(ask, key, request) for key, request in missing.items()]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            failed.set()
            judge.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [journal.entries[key] for key in keys]


def _check_entry(journal: Journal, key: str) -> None:
    """Raise ValueError if a stored judgment is damaged."""
    entry = journal.entries[key]
    scores = entry.get("scores")
    count = 1 if entry.get("method") == "rating" else 2
    has_scores = scores is not None and finite_numbers(scores, count) is not None
    if not (has_scores or (scores is None and isinstance(entry.get("text"), str))) or "swapped" not in entry:
        raise ValueError(
            f"{journal.path}: got a damaged judgment under the key {key[:12]!r}, expected method, swapped, and a text "
            f"or {count} scores: delete the line, and the judgment is requested again"
        )


def _entry(key: str, request: JudgeRequest, judge: Judge) -> Entry:
    reply = judge(request)
    return {
        "key": key,
        "judge": judge.name,
        "method": request.method,
        "question_id": request.question.question_id,
        "turn": request.turn,
        "models": list(request.models),
        "swapped": request.swapped,
        "sample": request.sample,
        "text": reply.text,
        "scores": None if reply.scores is None else list(reply.scores),
        "usage": reply.usage,
    }


@beartype
def scores_of(entry: Entry) -> Scores | None:
    """Return the two scores of a pairwise judgment in the order of the models; None if it is not parsed."""
    scores: Scores | None
    if entry["scores"] is not None:
        first, second = entry["scores"]
        scores = float(first), float(second)
    elif entry["method"] == "verdict":
        scores = parse_verdict(entry["text"])
    else:
        scores = parse_scores(entry["text"], "first" if entry["method"] == "scores" else "last")
    return scores if scores is None or not entry["swapped"] else scores[::-1]


@beartype
def compare(requests: Sequence[JudgeRequest], entries: Sequence[Entry]) -> tuple[list[Comparison], list[UnparsedText]]:
    """Return the comparison of each turn of each question, and the unparsed judgments."""
    groups: dict[tuple[str, int], list[Entry]] = defaultdict(list)
    categories = {}
    for request, entry in zip(requests, entries, strict=True):
        groups[request.question.question_id, request.turn].append(entry)
        categories[request.question.question_id] = request.question.category
    comparisons, unparsed = [], []
    for (question_id, turn), group in groups.items():
        parsed: dict[bool, list[Scores]] = {False: [], True: []}
        failed = []
        for entry in group:
            scores = scores_of(entry)
            if scores is None:
                failed.append(UnparsedText(question_id, turn, entry["text"]))
            else:
                parsed[entry["swapped"]].append(scores)
        given, swapped = (tuple(parsed[order]) for order in (False, True))
        comparisons.append(Comparison(question_id, given, swapped, len(failed), turn, categories[question_id]))
        unparsed += failed
    return comparisons, unparsed


class SingleAnswerRatings(NamedTuple):
    """Single-answer ratings of a model: the mean for each turn of each question, and the unparsed judgments."""

    model: str
    means: dict[tuple[str, int], float]
    num_parsed: int
    unparsed: list[UnparsedText]

    def by_turn(self) -> dict[int, list[float]]:
        """Return the means of each turn."""
        turns: dict[int, list[float]] = defaultdict(list)
        for (_, turn), mean in self.means.items():
            turns[turn].append(mean)
        return dict(sorted(turns.items()))


@beartype
def rate(model: str, requests: Sequence[JudgeRequest], entries: Sequence[Entry]) -> SingleAnswerRatings:
    """Return the ratings of a model, with means over the parsed samples."""
    numbers: dict[tuple[str, int], list[float]] = defaultdict(list)
    unparsed = []
    for request, entry in zip(requests, entries, strict=True):
        place = request.question.question_id, request.turn
        rating = entry["scores"][0] if entry["scores"] is not None else parse_rating(entry["text"])
        if rating is None:
            unparsed.append(UnparsedText(*place, entry["text"]))
        else:
            numbers[place].append(float(rating))
    means = {place: sum(values) / len(values) for place, values in numbers.items()}
    return SingleAnswerRatings(model, means, sum(map(len, numbers.values())), unparsed)


@beartype
def annotations_of(
    comparisons: Iterable[Comparison], pairs: Sequence[Pair], models: tuple[str, str], judge: str
) -> list[dict]:
    """Return the comparisons of first turns as AlpacaEval's annotations, with a preference of 1, 1.5, 2 or None."""
    by_id = {pair.question.question_id: pair for pair in pairs}
    preferences = {"win": 1.0, "tie": 1.5, "loss": 2.0, None: None}
    return [
        {
            "instruction": by_id[comparison.question_id].question.turns[0],
            "output_1": by_id[comparison.question_id].first[0],
            "generator_1": models[0],
            "output_2": by_id[comparison.question_id].second[0],
            "generator_2": models[1],
            "annotator": judge,
            "preference": preferences[comparison.outcome],
        }
        for comparison in comparisons
        if comparison.turn == 1
    ]
