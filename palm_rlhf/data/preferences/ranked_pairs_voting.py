"""One ranking of several people's rankings: Tideman's ranked pairs."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import TypeVar

from beartype import beartype

Candidate = TypeVar("Candidate", str, int)


@beartype
def ranked_pairs(ballots: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Merges ballots, each with the best candidate first, into one order of all candidates.

    Tideman, "Independence of Clones as a Criterion for Voting Rules" (1987): from the widest majority to the
    narrowest, each is kept unless it closes a circle with those kept before. A ballot says nothing about candidates
    that it leaves out. Ties, of majorities and between candidates that no majority orders, go to the smaller
    candidates, so that neither the order of the ballots nor chance matters. Raises `ValueError` if a ballot names a
    candidate twice.
    """
    votes: Counter[tuple[Candidate, Candidate]] = Counter()
    for ballot in ballots:
        if len(set(ballot)) < len(ballot):
            raise ValueError(f"got the ballot {list(ballot)}, expected each candidate at most once")
        votes.update(combinations(ballot, 2))
    candidates = sorted({candidate for ballot in ballots for candidate in ballot})
    majorities = [pair for pair in votes if votes[pair] > votes[pair[::-1]]]
    majorities.sort(key=lambda pair: (votes[pair[::-1]] - votes[pair], pair))
    below: dict[Candidate, set[Candidate]] = {candidate: set() for candidate in candidates}
    for winner, loser in majorities:
        if winner not in below[loser]:
            for candidate in candidates:
                if candidate == winner or winner in below[candidate]:
                    below[candidate] |= {loser, *below[loser]}
    order: list[Candidate] = []
    while len(order) < len(candidates):
        left = [candidate for candidate in candidates if candidate not in order]
        order.append(next(top for top in left if not any(top in below[other] for other in left)))
    return order
