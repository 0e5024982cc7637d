"""The laws of the database, each as a query for the rows that break it: for tests under load, and for moderators."""

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from beartype import beartype
from sqlalchemy import Select, and_, exists, func, or_, select
from sqlalchemy.orm import Session, aliased

from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, ShownComparison
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.learning_tables import Withdrawal
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import Base
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, Tree, TreeEvent, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn

OUTCOMES = ("done", "skipped", "expired", "cancelled")
VERDICTS = ("left", "right", "tie", "both_bad")
WORK: dict[
    str, tuple[Any, str | None]
] = {  # the table that keeps the work of each kind of task, and the most of it for a message, by a setting
    "write_prompt": (TreeMessage, None),
    "reply_as_user": (TreeMessage, "max_user_replies"),
    "reply_as_assistant": (TreeMessage, "max_children"),
    "label_prompt": (MessageReview, "num_reviews"),
    "label_reply": (MessageReview, "num_reviews"),
    "rank_replies": (ReplyRanking, "num_rankings"),
}


@beartype
def broken_laws(session: Session, settings: CollectionSettings, now: datetime) -> list[str]:
    """Return a sentence for every law of the database that is broken: none in a database that is in order.

    Args:
        session: A session of the store.
        settings: The settings of the collection, which say how often each work is needed.
        now: The current time.
    """
    laws: tuple[Callable[[], Iterator[str]], ...] = (
        lambda: _tasks(session, settings, now),
        lambda: _work_of_tasks(session),
        lambda: _people(session, settings),
        lambda: _rankings(session),
        lambda: _trees(session),
        lambda: _comparisons(session),
        lambda: _withdrawals(session),
        lambda: _references(session),
    )
    return [sentence for law in laws for sentence in law()]


def _found(session: Session, query: Select, sentence: str) -> Iterator[str]:
    """Yield the sentence for each row of a query, with the values of the row."""
    for row in session.execute(query):
        yield sentence.format(*row)


def _tasks(session: Session, settings: CollectionSettings, now: datetime) -> Iterator[str]:
    """Yield where more tasks are done or open than are needed, or one person has one twice."""
    is_open = and_(Task.outcome.is_(None), Task.expires_at > now)
    for kind, (table, setting) in WORK.items():
        if setting is None:
            continue
        most, kept = getattr(settings, setting), table
        done = exists().where(kept.task_id == Task.id, not_withdrawn(kept))
        if table is TreeMessage:  # replies that were refused have made room for others
            done = exists().where(kept.task_id == Task.id, not_withdrawn(kept), kept.accepted.is_not(False))
        number = func.count()
        over = select(Task.message_id, number).where(Task.kind == kind, or_(is_open, done)).group_by(Task.message_id)
        sentence = f"the message {{}} has {{}} tasks {kind} done or open, above {most}"
        yield from _found(session, over.having(number > most), sentence)
    number = func.count()
    held = select(Task.person_id, number, Task.kind, Task.language).where(is_open)
    held = held.group_by(Task.person_id, Task.kind, Task.language).having(number > 1)
    yield from _found(session, held, "the person {} holds {} open tasks {} in {} at once")
    twice = select(Task.person_id, Task.kind, number, Task.message_id).where(Task.outcome == "done")
    twice = twice.where(Task.message_id.is_not(None)).group_by(Task.person_id, Task.kind, Task.message_id)
    yield from _found(session, twice.having(number > 1), "the person {} did the task {} {} times on the message {}")
    strange = select(Task.id, Task.kind, Task.outcome).where(
        or_(
            Task.kind.not_in(WORK),
            Task.outcome.not_in(OUTCOMES),
            Task.outcome.is_(None) != Task.closed_at.is_(None),
        )
    )
    yield from _found(session, strange, "the task {} {} has the outcome {}, or no time with it")


def _work_of_tasks(session: Session) -> Iterator[str]:
    """Yield tasks that are done without their work, and work whose task is another person's or not done."""
    for kind, (table, _) in WORK.items():
        lost = select(Task.id).join(Participant, Participant.id == Task.person_id)
        lost = lost.where(Participant.deleted_at.is_(None))  # with whom their work may have been deleted
        lost = lost.where(Task.kind == kind, Task.outcome == "done", ~exists().where(table.task_id == Task.id))
        yield from _found(session, lost, f"the task {{}} {kind} is done, but its work is not there")
    for table in (TreeMessage, MessageReview, ReplyRanking):
        name, kinds = table.__tablename__, [kind for kind, (kept, _) in WORK.items() if kept is table]
        query = select(table.id, table.task_id).outerjoin(Task, Task.id == table.task_id)
        query = query.where(
            table.task_id.is_not(None),
            or_(
                Task.id.is_(None),
                Task.outcome.is_distinct_from("done"),
                Task.kind.not_in(kinds),
                Task.person_id != table.person_id,
            ),
        )
        yield from _found(
            session, query, f"{name} {{}} rest on the task {{}}, which is missing, not done, or another's"
        )


def _people(session: Session, settings: CollectionSettings) -> Iterator[str]:
    """Yield ratings of one person for one message, and work on a person's own messages unless that is allowed."""
    number = func.count()
    twice: tuple[tuple[Any, Any], ...] = (
        (MessageReview, MessageReview.message_id),
        (ReplyRanking, ReplyRanking.parent_id),
    )
    for table, message in twice:
        query = select(table.person_id, number, message).where(table.person_id.is_not(None))
        query = query.group_by(table.person_id, message).having(number > 1)
        yield from _found(session, query, f"the person {{}} gave {{}} {table.__tablename__} of the message {{}}")
    if settings.allow_own:
        return
    reviews = select(MessageReview.person_id, TreeMessage.id).join(
        TreeMessage, TreeMessage.id == MessageReview.message_id
    )
    yield from _found(
        session, reviews.where(TreeMessage.person_id == MessageReview.person_id), "the person {} labelled their own {}"
    )
    replies = select(ReplyRanking.person_id, ReplyRanking.parent_id).join(
        TreeMessage, TreeMessage.parent_id == ReplyRanking.parent_id
    )
    yield from _found(
        session,
        replies.where(TreeMessage.person_id == ReplyRanking.person_id),
        "the person {} ranked a reply of their own to {}",
    )
    parent = aliased(TreeMessage)
    answers = select(TreeMessage.person_id, parent.id).join(parent, parent.id == TreeMessage.parent_id)
    yield from _found(
        session, answers.where(TreeMessage.person_id == parent.person_id), "the person {} answered their own {}"
    )


def _rankings(session: Session) -> Iterator[str]:
    """Yield rankings that do not order the replies that were shown, and labels outside 0 to 1."""
    replies: dict[str | None, set[str]] = {}
    for reply, parent in session.execute(select(TreeMessage.id, TreeMessage.parent_id)):
        replies.setdefault(parent, set()).add(reply)
    for ranking in session.scalars(select(ReplyRanking)):
        if sorted(ranking.best_first) != sorted(ranking.shown):
            yield f"the ranking {ranking.id} does not order the replies that were shown"
        if not replies.get(ranking.parent_id, set()).issuperset(ranking.shown):
            yield f"the ranking {ranking.id} is of replies to another message than {ranking.parent_id}"
    for review in session.scalars(select(MessageReview)):
        if not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in review.labels.values()):
            yield f"the review {review.id} has a label outside 0 to 1"


def _trees(session: Session) -> Iterator[str]:
    """Yield trees without one root, messages out of place, and states that no event tells of."""
    number = func.count(TreeMessage.id)
    roots = select(Tree.id, number).outerjoin(
        TreeMessage, and_(TreeMessage.tree_id == Tree.id, TreeMessage.parent_id.is_(None))
    )
    yield from _found(session, roots.group_by(Tree.id).having(number != 1), "the tree {} has {} prompts, expected one")
    parent = aliased(TreeMessage)
    placed = select(TreeMessage.id).outerjoin(parent, parent.id == TreeMessage.parent_id)
    is_prompt = and_(TreeMessage.parent_id.is_(None), TreeMessage.role == "prompter", TreeMessage.depth == 0)
    is_reply = and_(
        parent.tree_id == TreeMessage.tree_id,
        parent.depth + 1 == TreeMessage.depth,
        parent.role != TreeMessage.role,
        TreeMessage.role.in_(("prompter", "assistant")),
    )
    yield from _found(
        session,
        placed.where(~func.coalesce(or_(is_prompt, is_reply), False)),
        "the message {} has another tree, depth or role than its parent calls for",
    )
    newest = select(func.max(TreeEvent.at)).where(TreeEvent.tree_id == Tree.id).correlate(Tree).scalar_subquery()
    told = exists().where(TreeEvent.tree_id == Tree.id, TreeEvent.at == newest, TreeEvent.state == Tree.state)
    yield from _found(
        session, select(Tree.id, Tree.state).where(~told), "the tree {} is in the state {} without its event"
    )


def _comparisons(session: Session) -> Iterator[str]:
    """Yield comparisons of one answer or of two prompts, votes of others, and prompts under another's key."""
    left, right = aliased(Answer), aliased(Answer)
    pairs = select(ShownComparison.id).join(left, left.id == ShownComparison.left_id)
    pairs = pairs.join(right, right.id == ShownComparison.right_id)
    key = ShownComparison.prompt_key
    of_one_prompt = and_(left.id != right.id, left.prompt_key == key, right.prompt_key == key)
    yield from _found(session, pairs.where(~of_one_prompt), "the comparison {} is not of two answers to its prompt")
    votes = select(ComparisonVote.id).outerjoin(ShownComparison, ShownComparison.id == ComparisonVote.comparison_id)
    wrong = or_(
        ShownComparison.id.is_(None),
        ComparisonVote.person_id != ShownComparison.person_id,
        ComparisonVote.verdict.not_in(VERDICTS),
    )
    yield from _found(
        session, votes.where(wrong), "the vote {} is on no comparison that its person was shown, or no verdict"
    )
    for answer in session.scalars(select(Answer)):
        if answer.prompt and answer.prompt_key != prompt_key_of(answer.prompt):  # emptied where a person was deleted
            yield f"the answer {answer.id} has the key of another prompt"


def _withdrawals(session: Session) -> Iterator[str]:
    """Yield withdrawals of rows that are not there."""
    for (name,) in session.execute(select(Withdrawal.table).distinct()):
        table = Base.metadata.tables.get(name)
        if table is None:
            yield f"there are withdrawals from the table {name}, which does not exist"
            continue
        lost = select(Withdrawal.id).where(Withdrawal.table == name, ~exists().where(table.c.id == Withdrawal.row_id))
        yield from _found(session, lost, f"the withdrawal {{}} is of a row that {name} does not have")


def _references(session: Session) -> Iterator[str]:
    """Yield rows that refer to rows which are not there."""
    for table in Base.metadata.sorted_tables:
        for key in table.foreign_keys:
            target = key.column.table.alias()
            query = select(table.c.id).where(
                key.parent.is_not(None), ~exists().where(target.c[key.column.name] == key.parent)
            )
            sentence = (
                f"the row {{}} of {table.name} has a {key.parent.name} that {key.column.table.name} does not have"
            )
            yield from _found(session, query, sentence)
