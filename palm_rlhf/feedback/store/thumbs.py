"""The thumbs under answers, summed over people."""

from collections import Counter
from datetime import datetime

from beartype import beartype
from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.store.answer_tables import Answer, Reaction
from palm_rlhf.feedback.store.withdrawals import not_withdrawn


@beartype
def answers_with_thumbs(session: Session) -> list[tuple[Answer, int, datetime]]:
    """Return the answers under which people put thumbs: thumbs up less thumbs down, and the time of the last one.

    Of one person's thumbs under an answer the newest counts; nothing that was withdrawn does, nor a blank answer, as
    those are whose person was deleted.
    """
    query = (
        select(Reaction, Answer)
        .join(Answer, Answer.id == Reaction.answer_id)
        .where(not_withdrawn(Reaction), not_withdrawn(Answer), Answer.text != "")
        .order_by(Reaction.created_at, Reaction.id)
    )
    newest = {(row.answer_id, row.person_id): (row, answer) for row, answer in session.execute(query)}
    sums: Counter[str] = Counter()
    found: dict[str, tuple[Answer, datetime]] = {}
    for reaction, answer in sorted(newest.values(), key=lambda pair: pair[0].created_at):
        sums[answer.id] += reaction.value
        found[answer.id] = answer, reaction.created_at
    return [(answer, sums[answer.id], at) for answer, at in found.values()]
