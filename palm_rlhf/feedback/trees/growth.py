"""The growth of trees: which messages want a reply of a person or of the model, and when a tree is grown."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.tree_tables import Task, Tree, TreeMessage
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.feedback.trees.states import GROWING
from palm_rlhf.feedback.trees.task_queries import holds_a_slot

REPLY_KINDS = {"prompter": "reply_as_assistant", "assistant": "reply_as_user"}  # by the role of the message answered
SPARE_TRIES = 3  # replies of the model to a message that may come out blank, or the same as a reply that is there


@dataclass(frozen=True)
class ReplySlot:
    """A message that wants a person's reply; `num_replies` counts those that it has, whoever wrote them."""

    message_id: str
    kind: str
    author_id: str | None
    num_replies: int


@dataclass(frozen=True)
class Growth:
    """A growing tree as far as its growth depends on it: the messages that the reviews have not refused.

    Messages that were withdrawn, and messages below them, are left out.
    """

    messages: list[TreeMessage]
    refused: list[TreeMessage]  # of the model's, which count as tries
    open_tasks: Counter[str]  # reply tasks that hold a slot, by the message to answer

    def model_replies_wanted(self, settings: CollectionSettings) -> list[tuple[TreeMessage, int]]:
        """Return the messages that want replies of the model, and how many, as far as the tree has room."""
        room = settings.max_tree_size - len(self.messages) - self.open_tasks.total()
        wanted = []
        for parent in self.messages:
            if parent.role == "prompter" and parent.accepted and parent.depth < settings.max_depth:
                given = sum(reply.model_id is not None for reply in self._replies(parent))
                tries_left = settings.num_model_replies + SPARE_TRIES - self.num_model_tries(parent)
                missing = min(settings.num_model_replies - given, tries_left, room)
                if missing > 0:
                    wanted.append((parent, missing))
                    room -= missing
        return wanted

    def num_model_tries(self, parent: TreeMessage) -> int:
        """Return how many replies to a message the model has generated, refused ones included."""
        tries = [*self.messages, *self.refused]
        return sum(reply.parent_id == parent.id and reply.model_id is not None for reply in tries)

    def reply_slots(self, settings: CollectionSettings) -> list[ReplySlot]:
        """Return the messages that want a person's reply; room for the replies of the model is kept free."""
        reserved = sum(number for _, number in self.model_replies_wanted(settings))
        if len(self.messages) + self.open_tasks.total() + reserved >= settings.max_tree_size:
            return []
        return list(self._slots(settings))

    def _slots(self, settings: CollectionSettings) -> Iterator[ReplySlot]:
        for parent in self.messages:
            if not parent.accepted or parent.depth >= settings.max_depth:
                continue
            replies = self._replies(parent)
            of_people = sum(reply.model_id is None for reply in replies) + self.open_tasks[parent.id]
            most = settings.max_children if parent.role == "prompter" else settings.max_user_replies
            if of_people < most:
                yield ReplySlot(parent.id, REPLY_KINDS[parent.role], parent.person_id, len(replies))

    def is_grown(self, settings: CollectionSettings) -> bool:
        """Return whether nothing is left to write or to review."""
        waits_for_reviews = any(message.accepted is None for message in self.messages)
        idle = Growth(self.messages, self.refused, Counter())  # an open task is a reply that is still missing
        return not (waits_for_reviews or idle.reply_slots(settings) or idle.model_replies_wanted(settings))

    def _replies(self, parent: TreeMessage) -> list[TreeMessage]:
        return [message for message in self.messages if message.parent_id == parent.id]


def growing_trees(
    session: Session, now: datetime, *, language: str | None = None, tree_id: str | None = None
) -> list[Growth]:
    """Return the growing trees, of a language or of one id, the oldest first."""
    wanted = [Tree.state == GROWING]
    if language is not None:
        wanted.append(Tree.language == language)
    if tree_id is not None:
        wanted.append(Tree.id == tree_id)
    query = select(TreeMessage).join(Tree, TreeMessage.tree_id == Tree.id).where(*wanted, not_withdrawn(TreeMessage))
    trees: dict[str, list[TreeMessage]] = {}
    for message in session.scalars(query.order_by(Tree.created_at, Tree.id, TreeMessage.depth, TreeMessage.created_at)):
        trees.setdefault(message.tree_id, []).append(message)
    held = select(Task.message_id, func.count()).join(Tree, Task.tree_id == Tree.id).where(*wanted, holds_a_slot(now))
    held = held.where(Task.kind.in_(REPLY_KINDS.values())).group_by(Task.message_id)
    open_tasks = {row[0]: row[1] for row in session.execute(held)}
    return [_growth(messages, open_tasks) for messages in trees.values()]


def _growth(messages: list[TreeMessage], open_tasks: dict[str | None, int]) -> Growth:
    inside: dict[str, TreeMessage] = {}  # parents come before their replies
    refused = []
    for message in messages:
        if message.parent_id is not None and message.parent_id not in inside:
            continue
        if message.accepted is not False:
            inside[message.id] = message
        elif message.model_id is not None:
            refused.append(message)
    return Growth(
        list(inside.values()), refused, Counter({key: number for key, number in open_tasks.items() if key in inside})
    )
