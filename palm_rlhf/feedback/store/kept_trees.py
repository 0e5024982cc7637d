"""Message trees as they stand: messages that were accepted and not withdrawn, with the merged ranks of replies."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from beartype import beartype
from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.data.formats.oasst_messages import OASST_ROLES
from palm_rlhf.data.preferences.ranked_pairs_voting import ranked_pairs
from palm_rlhf.feedback.store.tree_tables import ReplyRanking, Tree, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn

RANKED_STATES = ("ready_for_export", "exported")  # of trees that are complete: their replies have all their rankings
ENDED_STATES = ("aborted_low_grade", "halted_by_moderator")


@dataclass(eq=False)
class KeptMessage:
    """A message of a tree, between the message that it answers and its replies, the best ones first.

    `rank` is its place among the ranked replies to one message, from 0, the best; `ranked_at` is when the last person
    ranked them. Both are None of a message that is not ranked.
    """

    row: TreeMessage
    parent: "KeptMessage | None" = field(default=None, repr=False)
    replies: "list[KeptMessage]" = field(default_factory=list, repr=False)
    rank: int | None = None
    ranked_at: datetime | None = None

    def conversation(self) -> list[dict[str, str]]:
        """Return the messages from the prompt to this one, with the roles user and assistant."""
        before = [] if self.parent is None else self.parent.conversation()
        return [*before, {"role": OASST_ROLES[self.row.role], "content": self.row.text}]

    def walk(self) -> "Iterator[KeptMessage]":
        """Yield this message and all below it, each before its replies."""
        ahead = [self]
        while ahead:
            message = ahead.pop()
            yield message
            ahead += reversed(message.replies)


@beartype
def kept_trees(session: Session, *, states: Collection[str] | None = None) -> Iterator[tuple[Tree, KeptMessage]]:
    """Yield trees with their roots, the oldest tree first.

    A tree holds the messages that were accepted and not withdrawn, whose parents are in it. A tree without any is left
    out. Replies have ranks in complete trees only: merged from the rankings that were not withdrawn, or those of the
    imported file.

    Args:
        session: A session of the store.
        states: The states of trees to read; None reads all but those that ended early.
    """
    query = select(Tree).where(not_withdrawn(Tree)).order_by(Tree.created_at, Tree.id)
    query = query.where(Tree.state.not_in(ENDED_STATES) if states is None else Tree.state.in_(states))
    for trees in session.scalars(query).partitions(100):
        messages, ballots = _messages_of(session, trees), _ballots_of(session, trees)
        for tree in trees:
            root = _linked(messages[tree.id])
            if root is not None:
                if tree.state in RANKED_STATES:
                    _rank(root, ballots)
                yield tree, root


def _messages_of(session: Session, trees: Collection[Tree]) -> dict[str, list[TreeMessage]]:
    query = select(TreeMessage).where(
        TreeMessage.tree_id.in_([tree.id for tree in trees]), TreeMessage.accepted.is_(True), not_withdrawn(TreeMessage)
    )
    found: dict[str, list[TreeMessage]] = defaultdict(list)
    for message in session.scalars(query.order_by(TreeMessage.depth, TreeMessage.created_at, TreeMessage.id)):
        found[message.tree_id].append(message)
    return found


def _ballots_of(session: Session, trees: Collection[Tree]) -> dict[str, list[ReplyRanking]]:
    query = (
        select(ReplyRanking)
        .join(TreeMessage, TreeMessage.id == ReplyRanking.parent_id)
        .where(TreeMessage.tree_id.in_([tree.id for tree in trees]), not_withdrawn(ReplyRanking))
    )
    found: dict[str, list[ReplyRanking]] = defaultdict(list)
    for ranking in session.scalars(query):
        found[ranking.parent_id].append(ranking)
    return found


def _linked(messages: list[TreeMessage]) -> KeptMessage | None:
    """Return the root of messages that come with the parents first, or None if it was not kept."""
    kept: dict[str, KeptMessage] = {}
    root = None
    for row in messages:
        if row.parent_id is None:
            root = kept[row.id] = KeptMessage(row)
        elif (parent := kept.get(row.parent_id)) is not None:
            kept[row.id] = KeptMessage(row, parent)
            parent.replies.append(kept[row.id])
    return root


def _rank(root: KeptMessage, ballots: dict[str, list[ReplyRanking]]) -> None:
    for message in root.walk():
        rankings = ballots.get(message.row.id, [])
        ids = {reply.row.id for reply in message.replies}
        order = ranked_pairs([[each for each in ranking.best_first if each in ids] for ranking in rankings])
        for reply in message.replies:
            if reply.row.id in order:
                reply.rank = order.index(reply.row.id)
                reply.ranked_at = max(ranking.created_at for ranking in rankings)
            elif not rankings and reply.row.imported is not None:
                reply.rank, reply.ranked_at = reply.row.rank, reply.row.created_at
        message.replies.sort(key=lambda reply: (reply.rank is None, reply.rank))
