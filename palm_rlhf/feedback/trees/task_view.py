"""The contents of a task's page."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from palm_rlhf.feedback.store.tree_tables import Task, TreeMessage
from palm_rlhf.feedback.trees.labels import REQUIRED, labels_of


@dataclass(frozen=True)
class ShownMessage:
    """A message as it is shown: not who or which model wrote it."""

    id: str
    role: str  # prompter or assistant
    text: str
    language: str


@dataclass(frozen=True)
class TaskView:
    """What a task's page shows.

    `thread` is the conversation so far: up to the message to answer, before the message to label, or up to the message
    whose `replies` are ranked, which come in the order in which they are shown. `labels` are the names that are asked.
    """

    task_id: str
    kind: str
    language: str
    expires_at: datetime
    thread: tuple[ShownMessage, ...] = ()
    message: ShownMessage | None = None
    replies: tuple[ShownMessage, ...] = ()
    labels: tuple[str, ...] = ()
    required_labels: tuple[str, ...] = ()


def task_view(session: Session, task: Task) -> TaskView:
    """Return the contents of a task's page."""
    path = _path(session, task.message_id)
    view = TaskView(task.id, task.kind, task.language, task.expires_at, tuple(map(_shown, path)))
    if task.kind in ("label_prompt", "label_reply"):
        labels = labels_of(path[-1].role)
        return TaskView(
            task.id, task.kind, task.language, task.expires_at, view.thread[:-1], view.thread[-1], (), labels, REQUIRED
        )
    if task.kind == "rank_replies":
        replies = tuple(_shown(session.get_one(TreeMessage, reply)) for reply in task.shown or ())
        return TaskView(task.id, task.kind, task.language, task.expires_at, view.thread, None, replies)
    return view


def _shown(message: TreeMessage) -> ShownMessage:
    return ShownMessage(message.id, message.role, message.text, message.language)


def _path(session: Session, message_id: str | None) -> list[TreeMessage]:
    """Return the messages from the prompt to a message."""
    path: list[TreeMessage] = []
    while message_id is not None:
        path.insert(0, session.get_one(TreeMessage, message_id))
        message_id = path[0].parent_id
    return path
