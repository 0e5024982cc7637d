"""One ranking from several people's rankings: Tideman's method of ranked pairs."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import TypeVar

from beartype import beartype

Candidate = TypeVar("Candidate", str, int)


@beartype
def ranked_pairs(ballots: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Merge ballots, each with the best candidate first, into one order of all candidates.

    Majorities are kept from the widest to the narrowest, except those that would close a cycle with the majorities kept
    before (Tideman, "Independence of Clones as a Criterion for Voting Rules", 1987). A ballot does not rank the
    candidates that it leaves out. Ties between majorities, and between candidates that no majority orders, favour the
    smaller candidate, so that neither the order of the ballots nor chance matters.

    Raises ValueError if a ballot names a candidate twice.
    """
    votes: Counter[tuple[Candidate, Candidate]] = Counter()
    for ballot in ballots:
        if len(set(ballot)) < len(ballot):
            raise ValueError(
                f"got the ballot {list(ballot)}, expected each candidate at most once: remove the repetition"
            )
        votes.update(combinations(ballot, 2))
    candidates = sorted({candidate for ballot in ballots for candidate in ballot})
    majorities = [pair for pair in votes if votes[pair] > votes[pair[::-1]]]
    majorities.sort(key=lambda pair: (votes[pair[::-1]] - votes[pair], pair))
    below: dict[Candidate, set[Candidate]] = {candidate: set() for candidate in candidates}
    for winner, loser in majorities:
        if winner not in below[loser]:
            for candidate in candidates:
                if candidate == winner or winner in below[candidate]:
                    below[candidate].add(loser)
                    below[candidate] |= below[loser]
    order: list[Candidate] = []
    while len(order) < len(candidates):
        left = [candidate for candidate in candidates if candidate not in order]
        order.append(next(top for top in left if not any(top in below[other] for other in left)))
    return order
