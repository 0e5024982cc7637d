"""The contents of a task's page."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from palm_rlhf.feedback.store.tree_tables import Task, TreeMessage
from palm_rlhf.feedback.trees.labels import REQUIRED, labels_of
from palm_rlhf.feedback.trees.offers import LABEL_KINDS


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
    thread: tuple[ShownMessage, ...]
    message: ShownMessage | None
    replies: tuple[ShownMessage, ...]
    labels: tuple[str, ...]
    required_labels: tuple[str, ...]


def task_view(session: Session, task: Task) -> TaskView:
    """Return the contents of a task's page."""
    thread = [_shown(message) for message in path_to(session, task.message_id)]
    is_labelled = task.kind in LABEL_KINDS
    message = thread.pop() if is_labelled else None
    return TaskView(
        task_id=task.id,
        kind=task.kind,
        language=task.language,
        expires_at=task.expires_at,
        thread=tuple(thread),
        message=message,
        replies=tuple(_shown(session.get_one(TreeMessage, reply)) for reply in task.shown or ()),
        labels=() if message is None else labels_of(message.role),
        required_labels=REQUIRED if is_labelled else (),
    )


def path_to(session: Session, message_id: str | None) -> list[TreeMessage]:
    """Return the messages from the prompt to a message; none for None."""
    path: list[TreeMessage] = []
    while message_id is not None:
        path.insert(0, session.get_one(TreeMessage, message_id))
        message_id = path[0].parent_id
    return path


def _shown(message: TreeMessage) -> ShownMessage:
    return ShownMessage(message.id, message.role, message.text, message.language)
