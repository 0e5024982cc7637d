"""Two models on the same questions: calibrated scores, who wins, how far the order of the answers decides."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from beartype import beartype

from palm_rlhf.evaluation.intervals import Interval, bootstrap_interval, exact_interval
from palm_rlhf.evaluation.verdicts import Scores

WIN, TIE, LOSS = "win", "tie", "loss"


@beartype
@dataclass(frozen=True)
class Comparison:
    """All that was judged of one turn of a question, with the scores always in the order of the models.

    `given` are the parsed samples of judgments that showed model 1 first, `swapped` of those that showed it second.
    """

    question_id: str
    given: tuple[Scores, ...] = ()
    swapped: tuple[Scores, ...] = ()
    unparsed: int = 0
    turn: int = 1
    category: str | None = None
    verdict: Scores | None = None
    """What a person who was asked in doubt says: shares of the win, which decide the outcome, but are no scores."""

    @property
    def parsed(self) -> int:
        return len(self.given) + len(self.swapped)

    @property
    def scores(self) -> Scores | None:
        return calibrated_scores(self.given, self.swapped)

    @property
    def outcome(self) -> str | None:
        """For model 1; None where nothing was parsed, and nobody asked."""
        decisive = self.verdict or self.scores
        return None if decisive is None else outcome(decisive)

    @property
    def conflicts(self) -> bool | None:
        """Whether the two orders come to different outcomes; None where one of them was not judged."""
        given, swapped = (calibrated_scores(scores, ()) for scores in (self.given, self.swapped))
        return None if given is None or swapped is None else outcome(given) != outcome(swapped)

    @property
    def entropy(self) -> float:
        return position_entropy(self.given, self.swapped)


def outcome(scores: Scores) -> str:
    """What two scores mean for the first."""
    first, second = scores
    return WIN if first > second else LOSS if first < second else TIE


@beartype
def calibrated_scores(given: Sequence[Scores], swapped: Sequence[Scores]) -> Scores | None:
    """The means over orders and evidences, CS = sum over i of (S_i + S'_i) / 2k (Wang et al. 2023, equation 2).

    Only parsed samples are there, and only they are counted; None where there is none. Both arguments have the scores
    in the order of the models.
    """
    samples = [*given, *swapped]
    if not samples:
        return None
    first, second = (math.fsum(column) / len(samples) for column in zip(*samples, strict=True))
    return first, second


@beartype
def position_entropy(given: Sequence[Scores], swapped: Sequence[Scores]) -> float:
    """Balanced position diversity entropy, in nats (Wang et al. 2023, equation 3): 0 if all agree, at most ln 3.

    The entropy of win, tie and loss over the samples of both orders; where it is high, a person should look.
    """
    counts = Counter(outcome(scores) for scores in (*given, *swapped))
    total = counts.total()
    return max(-math.fsum(count / total * math.log(count / total) for count in counts.values()), 0.0)


@beartype
def most_doubtful(comparisons: Sequence[Comparison], count: int) -> list[Comparison]:
    """Those for people to decide: first what no judgment was understood of, then by entropy, the highest first."""
    ranked = sorted(comparisons, key=lambda comparison: (comparison.parsed > 0, -comparison.entropy))
    return [comparison for comparison in ranked if comparison.parsed == 0 or comparison.entropy > 0][:count]


@dataclass(frozen=True)
class Summary:
    """How model 1 does against model 2. What was not understood is in `unparsed` and nowhere else."""

    model_1: str
    model_2: str
    score_1: float
    """Sum of the calibrated scores of the questions that have some."""
    score_2: float
    relative: float | None
    """score_1 / score_2, sum over sum; None where score_2 is not above 0."""
    wins: int
    losses: int
    ties: int
    parsed: int
    """Judgments that were understood."""
    unparsed: int
    questions: int
    """Turns of questions that have an outcome."""
    win_rate: float | None
    """Share of the questions that model 1 wins; a tie counts a half."""
    win_rate_interval: Interval | None
    """By bootstrap, the turns of a question together."""
    decided_share: float | None
    """Share of the questions with a winner that model 1 wins."""
    decided_interval: Interval
    """Exact (Clopper-Pearson)."""
    agreed_wins: int
    agreed_losses: int
    """Where both orders have the same winner; MT-bench counts all others as ties (Zheng et al. 2023)."""
    conflict_rate: float | None
    """Share of the questions judged in both orders whose outcome depends on the order."""

    def numbers(self) -> dict[str, Any]:
        """All of them, as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@beartype
def summarise(comparisons: Sequence[Comparison], model_1: str, model_2: str) -> Summary:
    """The figures of many comparisons of the same two models."""
    scores = [comparison.scores for comparison in comparisons if comparison.scores is not None]
    score_1, score_2 = (math.fsum(column) for column in zip(*scores)) if scores else (0.0, 0.0)
    decided = [(comparison.question_id, found) for comparison in comparisons if (found := comparison.outcome)]
    outcomes = Counter(found for _, found in decided)
    wins, losses = outcomes[WIN], outcomes[LOSS]
    shares = [{WIN: 1.0, TIE: 0.5, LOSS: 0.0}[found] for _, found in decided]
    both_orders = [
        (comparison.scores, comparison.conflicts) for comparison in comparisons if comparison.conflicts is not None
    ]
    agreed = Counter(outcome(means) for means, conflicts in both_orders if means is not None and not conflicts)
    num_conflicts = sum(conflicts for _, conflicts in both_orders if conflicts)
    return Summary(
        model_1=model_1,
        model_2=model_2,
        score_1=score_1,
        score_2=score_2,
        relative=score_1 / score_2 if score_2 > 0 else None,
        wins=wins,
        losses=losses,
        ties=outcomes[TIE],
        parsed=sum(comparison.parsed for comparison in comparisons),
        unparsed=sum(comparison.unparsed for comparison in comparisons),
        questions=len(decided),
        win_rate=math.fsum(shares) / len(shares) if shares else None,
        win_rate_interval=bootstrap_interval(shares, clusters=[question_id for question_id, _ in decided]),
        decided_share=wins / (wins + losses) if wins + losses else None,
        decided_interval=exact_interval(wins, wins + losses),
        agreed_wins=agreed[WIN],
        agreed_losses=agreed[LOSS],
        conflict_rate=num_conflicts / len(both_orders) if both_orders else None,
    )


@beartype
def by_category(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """The comparisons under the category of their question, in the order in which categories come."""
    groups: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        groups[comparison.category or "other"].append(comparison)
    return dict(groups)


class UnparsedText(NamedTuple):
    """A judgment that was not understood, for a person to see."""

    question_id: str
    turn: int
    text: str
