"""The consequences of a withdrawal for a tree."""

from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.table_base import Base
from palm_rlhf.feedback.store.tree_tables import ReplyRanking, Task, Tree, TreeMessage
from palm_rlhf.feedback.trees.completion import advance, merge_rankings
from palm_rlhf.feedback.trees.states import HALTED, LOW_GRADE, OPEN_STATES, enter


def settle_withdrawal(session: Session, row: Base, settings: CollectionSettings, now: datetime) -> None:
    """Let a tree go on after a message, a review or a ranking of it was withdrawn, in the same transaction.

    A withdrawn prompt ends its tree. Messages below a withdrawn message leave the tree with it, and their open tasks
    are cancelled; while the tree is growing, the places are free again. A review or ranking that was withdrawn while it
    was still counted is asked of somebody else; ranks that rest on a withdrawn ranking or reply are merged anew.
    """
    if isinstance(row, TreeMessage):
        tree = session.get_one(Tree, row.tree_id)
        _drop(session, row, now)
        if row.parent_id is None and tree.state not in (LOW_GRADE, HALTED):
            enter(session, tree, HALTED, now, reason="the prompt was withdrawn")
    elif isinstance(row, ReplyRanking):
        tree = session.get_one(Tree, session.get_one(TreeMessage, row.parent_id).tree_id)
    else:  # a message that has its verdict keeps it, and one that has none is reviewed once more
        return
    if tree.state in OPEN_STATES:
        advance(session, tree, settings, now)
    elif tree.state not in (LOW_GRADE, HALTED):
        merge_rankings(session, tree, settings)


def _drop(session: Session, message: TreeMessage, now: datetime) -> None:
    """Cancel the open tasks on a message and on all below it, and accept none of those below any more."""
    open_tasks = update(Task).where(Task.message_id == message.id, Task.outcome.is_(None))
    session.execute(open_tasks.values(outcome="cancelled", closed_at=now))
    for reply in session.scalars(select(TreeMessage).where(TreeMessage.parent_id == message.id)).all():
        reply.accepted = False
        _drop(session, reply, now)
