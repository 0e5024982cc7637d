"""How far people agree: on labels and votes by Krippendorff's alpha, on rankings by Kendall's tau."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from beartype import beartype
from scipy.stats import kendalltau
from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.evaluation.intervals import bootstrap_interval
from palm_rlhf.feedback.measures.krippendorff_alpha import Scale, krippendorff_alpha
from palm_rlhf.feedback.measures.vote_records import VoteRecord
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.feedback.trees.labels import FLAGS, SCALES


@dataclass(frozen=True)
class LabelAgreement:
    """Krippendorff's alpha of one label; None where it is undefined. `num_shared` messages have it of two people."""

    label: str
    scale: Scale
    alpha: float | None
    num_shared: int


@dataclass(frozen=True)
class RankingAgreement:
    """The mean of Kendall's tau between two people's rankings of the same replies, over all sets of replies.

    1 is the same order, 0 no relation, -1 the reverse. The interval is a bootstrap interval with sets of replies as
    clusters, None for fewer than two sets; all are None without two rankings of a set.
    """

    tau: float | None
    low: float | None
    high: float | None
    num_sets: int
    num_rankings: int


@dataclass(frozen=True)
class VoteAgreement:
    """How far votes of different people on the same two answers agree.

    `share` of the pairs of votes is the same verdict, where a tie and two bad answers are one verdict. `alpha` is that
    of an interval scale on which a tie lies halfway; each comparison counts from both sides, since no answer is the
    first by nature. Both are None where no two people compared the same answers.
    """

    share: float | None
    alpha: float | None
    num_shared: int


@beartype
def label_agreement(session: Session) -> list[LabelAgreement]:
    """Return the agreement on each label that two people gave to a message. Flags are nominal, scales are ordinal."""
    given: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for message, labels in session.execute(
        select(MessageReview.message_id, MessageReview.labels).where(not_withdrawn(MessageReview))
    ):
        for name, value in labels.items():
            given[name].append((message, value))
    found = []
    for name in (*FLAGS, *SCALES):
        people = Counter(message for message, _ in given[name])
        if num_shared := sum(number > 1 for number in people.values()):
            scale: Scale = "nominal" if name in FLAGS else "ordinal"
            found.append(LabelAgreement(name, scale, krippendorff_alpha(given[name], scale), num_shared))
    return found


@beartype
def tau_of(rankings: Sequence[Sequence[str]]) -> float | None:
    """Return the mean of Kendall's tau over pairs of rankings, best first, by the replies that both have.

    None where no two rankings share two replies.
    """
    found = []
    for one, other in combinations(rankings, 2):
        shared = [reply for reply in one if reply in other]
        if len(shared) > 1:
            found.append(float(kendalltau(range(len(shared)), [other.index(reply) for reply in shared]).statistic))
    return fmean(found) if found else None


@beartype
def ranking_agreement(session: Session) -> RankingAgreement:
    """Return how far people agree on the order of replies."""
    sets: dict[str, list[list[str]]] = defaultdict(list)
    for parent, best_first in session.execute(
        select(ReplyRanking.parent_id, ReplyRanking.best_first).where(not_withdrawn(ReplyRanking))
    ):
        sets[parent].append(best_first)
    taus = {parent: tau for parent, rankings in sets.items() if (tau := tau_of(rankings)) is not None}
    num_rankings = sum(len(sets[parent]) for parent in taus)
    if not taus:
        return RankingAgreement(None, None, None, 0, num_rankings)
    low, high = bootstrap_interval(list(taus.values())) or (None, None)
    return RankingAgreement(fmean(taus.values()), low, high, len(taus), num_rankings)


@beartype
def vote_agreement(votes: Sequence[VoteRecord]) -> VoteAgreement:
    """Return how far people agree on which of two answers is better."""
    shares: dict[frozenset[str], dict[str, float]] = defaultdict(dict)
    for vote in votes:
        pair = frozenset((vote.left_id, vote.right_id))
        shares[pair][vote.person_id] = vote.left_share if vote.left_id == min(pair) else 1 - vote.left_share
    shared = {pair: list(given.values()) for pair, given in shares.items() if len(given) > 1}
    if not shared:
        return VoteAgreement(None, None, 0)
    same = [one == other for given in shared.values() for one, other in combinations(given, 2)]
    from_first = [((pair, "first"), share) for pair, given in shared.items() for share in given]
    from_second = [((pair, "second"), 1 - share) for (pair, _), share in from_first]
    return VoteAgreement(fmean(same), krippendorff_alpha(from_first + from_second, "interval"), len(shared))
