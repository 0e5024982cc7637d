"""Comparisons of two models on the same questions: calibrated scores, outcomes, and the effect of the order."""

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
    """The judgments of one turn of a question. Scores are always in the order of the models.

    `given` holds the parsed scores of judgments that showed model 1 first, `swapped` those that showed it second.
    """

    question_id: str
    given: tuple[Scores, ...] = ()
    swapped: tuple[Scores, ...] = ()
    unparsed: int = 0
    turn: int = 1
    category: str | None = None
    verdict: Scores | None = None
    """The verdict of a person on a doubtful question, as shares of the win. It decides the outcome, but is no score."""

    @property
    def parsed(self) -> int:
        return len(self.given) + len(self.swapped)

    @property
    def scores(self) -> Scores | None:
        return calibrated_scores(self.given, self.swapped)

    @property
    def outcome(self) -> str | None:
        """The outcome for model 1; None without a parsed judgment or a person's verdict."""
        decisive = self.verdict or self.scores
        return None if decisive is None else outcome(decisive)

    @property
    def conflicts(self) -> bool | None:
        """Whether the two orders have different outcomes; None if only one order was judged."""
        given, swapped = (calibrated_scores(scores, ()) for scores in (self.given, self.swapped))
        return None if given is None or swapped is None else outcome(given) != outcome(swapped)

    @property
    def entropy(self) -> float:
        return position_entropy(self.given, self.swapped)


def outcome(scores: Scores) -> str:
    """Return the outcome for the first of two scores."""
    first, second = scores
    return WIN if first > second else LOSS if first < second else TIE


@beartype
def calibrated_scores(given: Sequence[Scores], swapped: Sequence[Scores]) -> Scores | None:
    """Return the mean scores over orders and samples, CS = sum over i of (S_i + S'_i) / 2k, or None without samples.

    Wang et al. 2023 (arXiv:2305.17926), equation 2. Both arguments hold parsed scores in the order of the models.
    """
    samples = [*given, *swapped]
    if not samples:
        return None
    first, second = (math.fsum(column) / len(samples) for column in zip(*samples, strict=True))
    return first, second


@beartype
def position_entropy(given: Sequence[Scores], swapped: Sequence[Scores]) -> float:
    """Return the balanced position diversity entropy in nats (Wang et al. 2023, equation 3).

    It is the entropy of win, tie and loss over the samples of both orders: 0 if all agree, at most ln 3. A person
    should look at questions with a high entropy.
    """
    counts = Counter(outcome(scores) for scores in (*given, *swapped))
    total = counts.total()
    return max(-math.fsum(count / total * math.log(count / total) for count in counts.values()), 0.0)


@beartype
def most_doubtful(comparisons: Sequence[Comparison], count: int) -> list[Comparison]:
    """Return the comparisons for a person to decide: first those without a parsed judgment, then by falling entropy."""
    ranked = sorted(comparisons, key=lambda comparison: (comparison.parsed > 0, -comparison.entropy))
    return [comparison for comparison in ranked if comparison.parsed == 0 or comparison.entropy > 0][:count]


@dataclass(frozen=True)
class Summary:
    """The results of model 1 against model 2. Unparsed judgments count in `unparsed` only."""

    model_1: str
    model_2: str
    score_1: float
    """Sum of the calibrated scores, over the questions with parsed judgments."""
    score_2: float
    relative: float | None
    """score_1 / score_2; None unless score_2 is above 0."""
    wins: int
    losses: int
    ties: int
    parsed: int
    """Parsed judgments."""
    unparsed: int
    questions: int
    """Turns of questions with an outcome."""
    win_rate: float | None
    """Share of the questions that model 1 wins; a tie counts a half."""
    win_rate_interval: Interval | None
    """By bootstrap over questions, with all turns of a question drawn together."""
    decided_share: float | None
    """Share of the questions with a winner that model 1 wins."""
    decided_interval: Interval
    """Exact (Clopper-Pearson)."""
    agreed_wins: int
    agreed_losses: int
    """Wins and losses in both orders; MT-bench counts all other questions as ties (Zheng et al. 2023)."""
    conflict_rate: float | None
    """Share of the questions judged in both orders that have different outcomes in them."""

    def numbers(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@beartype
def summarise(comparisons: Sequence[Comparison], model_1: str, model_2: str) -> Summary:
    """Compute the figures of many comparisons of the same two models."""
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
    """Group the comparisons by the category of their question, in order of first appearance."""
    groups: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        groups[comparison.category or "other"].append(comparison)
    return dict(groups)


class UnparsedText(NamedTuple):
    """A judgment that could not be parsed, for a person to read."""

    question_id: str
    turn: int
    text: str
