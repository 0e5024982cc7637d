"""A blind preference study: people see two answers in random order and say which one they prefer."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from beartype import beartype

from palm_rlhf.evaluation.intervals import Interval, bootstrap_interval, exact_interval
from palm_rlhf.evaluation.judging.answers import Pair, Question, Turns
from palm_rlhf.evaluation.judging.journal import Entry, Journal

CHOICES = {"a": "first", "b": "second", "t": "tie", "s": "skip", "q": "quit"}
HELP = "[a] the first is better   [b] the second is better   [t] a tie   [s] skip   [q] stop here"
RULE = "─" * 72


class Person:
    """A person at a terminal: a text stream to read answers from, and one to write to."""

    @beartype
    def __init__(self, answers: Any, screen: Any):
        self.answers, self.screen = answers, screen

    @beartype
    def prefers(self, question: Question, first: Turns, second: Turns, progress: str = "") -> str:
        """Show two answers as A and B, and return "first", "second", "tie", "skip" or "quit"."""
        self._say(RULE, progress)
        for turn, asked in enumerate(question.turns):
            self._say("", f"QUESTION{f' (turn {turn + 1})' if len(question.turns) > 1 else ''}", asked)
            for name, reply in (("A", first), ("B", second)):
                self._say("", f"── ANSWER {name}", reply[turn])
        self._say("")
        while True:
            self.screen.write(f"{HELP}: ")
            self.screen.flush()
            line = self.answers.readline()
            if not line:  # end of the input
                return "quit"
            choice = CHOICES.get(line.strip().lower())
            if choice is not None:
                return choice
            self._say(f"got {line.strip()!r}, expected one of {', '.join(CHOICES)}")

    def _say(self, *lines: str) -> None:
        self.screen.write("".join(f"{line}\n" for line in lines))


@dataclass(frozen=True)
class Vote:
    """One person's vote on a question: 1 for model 1, 0 for model 2, 0.5 for a tie, None for no opinion."""

    question_id: str
    participant: str
    share: float | None


@beartype
def run_study(
    pairs: Sequence[Pair],
    models: tuple[str, str],
    person: Person,
    journal: Journal,
    *,
    participant: str = "anonymous",
    seed: int = 0,
) -> bool:
    """Ask a participant the unanswered questions, store each vote at once, and return whether all are answered.

    The order of questions and answers is random, differs between participants, and stays the same when a participant
    continues later. Each model comes first in half of the questions. The screen names no model.
    """
    generator = random.Random(repr((seed, participant)))
    order = generator.sample(list(pairs), len(pairs))
    swaps = [place % 2 == 0 for place in range(len(pairs))]
    generator.shuffle(swaps)
    for place, ((question, first, second), swapped) in enumerate(zip(order, swaps), start=1):
        key = vote_key(models, question, first, second, participant)
        if key in journal:
            continue
        shown = (second, first) if swapped else (first, second)
        choice = person.prefers(question, *shown, progress=f"{place} of {len(order)}")
        if choice == "quit":
            return False
        share = {"first": 1.0, "second": 0.0, "tie": 0.5, "skip": None}[choice]
        journal.add(
            {
                "key": key,
                "question_id": question.question_id,
                "participant": participant,
                "models": list(models),
                "swapped": swapped,
                "choice": choice,
                "share": 1 - share if swapped and share is not None else share,
            }
        )
    return True


@beartype
def vote_key(models: tuple[str, str], question: Question, first: Turns, second: Turns, participant: str) -> str:
    """Return the identity of a vote: a digest of the participant, the question and both answers."""
    decisive = repr((models, question.question_id, question.turns, first, second, participant))
    return hashlib.sha256(decisive.encode("utf-8", "surrogatepass")).hexdigest()


@beartype
def read_votes(journal: Journal, models: tuple[str, str]) -> list[Vote]:
    """Read the votes of all participants on two models. Raises ValueError if the file has votes on others only."""
    entries = [entry for entry in journal.entries.values() if "participant" in entry]
    for entry in entries:
        texts = [entry.get("question_id"), entry["participant"], *_models_of(entry)]
        share = entry.get("share")
        if (
            len(texts) != 4
            or not all(isinstance(text, str) for text in texts)
            or not (share is None or (isinstance(share, int | float) and 0 <= share <= 1))
        ):
            raise ValueError(
                f"{journal.path}: got a damaged vote under the key {entry['key'][:12]!r}, expected question_id, "
                "participant, two models, and a share from 0 to 1: delete the line"
            )
    votes = [
        Vote(entry["question_id"], entry["participant"], entry.get("share"))
        for entry in entries
        if entry["models"] == list(models)
    ]
    if entries and not votes:
        others = sorted({tuple(entry["models"]) for entry in entries})
        raise ValueError(f"{journal.path}: got votes on {others}, expected votes on {models}: name another file")
    return votes


def _models_of(entry: Entry) -> list[Any]:
    return entry["models"] if isinstance(entry.get("models"), list) else []


@dataclass(frozen=True)
class Shares:
    """The votes for each model; a tie counts a half for both."""

    votes: int
    wins_1: int
    wins_2: int
    ties: int

    @property
    def share_1(self) -> float | None:
        return (self.wins_1 + self.ties / 2) / self.votes if self.votes else None

    @property
    def share_2(self) -> float | None:
        return None if self.share_1 is None else 1 - self.share_1


@dataclass(frozen=True)
class StudyResult:
    """The shares of each question and of all votes, with confidence intervals of model 1's share."""

    overall: Shares
    questions: dict[str, Shares]
    skipped: int
    participants: int
    interval: Interval | None
    """By bootstrap over the questions."""
    decided_interval: Interval
    """Exact (Clopper-Pearson), of model 1 among the votes for one of the two."""

    def numbers(self, models: tuple[str, str]) -> dict[str, Any]:
        """Return the figures of all votes as JSON values."""
        return {
            "model_1": models[0],
            "model_2": models[1],
            "share_1": self.overall.share_1,
            "share_2": self.overall.share_2,
            "votes": self.overall.votes,
            "wins_1": self.overall.wins_1,
            "wins_2": self.overall.wins_2,
            "ties": self.overall.ties,
            "skipped": self.skipped,
            "questions": len(self.questions),
            "participants": self.participants,
            "share_1_interval": None if self.interval is None else list(self.interval),
            "decided_interval": list(self.decided_interval),
        }


@beartype
def count_votes(votes: Sequence[Vote]) -> StudyResult:
    """Count the votes of a study. Votes without an opinion count as skipped only."""
    cast = [(vote.question_id, vote.share) for vote in votes if vote.share is not None]
    by_question: dict[str, list[float]] = defaultdict(list)
    for question_id, share in cast:
        by_question[question_id].append(share)
    overall = _shares([share for _, share in cast])
    return StudyResult(
        overall=overall,
        questions={question_id: _shares(shares) for question_id, shares in by_question.items()},
        skipped=len(votes) - len(cast),
        participants=len({vote.participant for vote in votes if vote.share is not None}),
        interval=bootstrap_interval([share for _, share in cast], clusters=[question_id for question_id, _ in cast]),
        decided_interval=exact_interval(overall.wins_1, overall.wins_1 + overall.wins_2),
    )


def _shares(shares: Sequence[float]) -> Shares:
    return Shares(len(shares), shares.count(1.0), shares.count(0.0), shares.count(0.5))
