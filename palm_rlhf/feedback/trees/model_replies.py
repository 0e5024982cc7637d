"""Replies of the model in trees, which people rank among their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from palm_rlhf.data.formats.oasst_messages import OASST_ROLES
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.tree_tables import Tree, TreeMessage
from palm_rlhf.feedback.trees.completion import advance
from palm_rlhf.feedback.trees.growth import growing_trees
from palm_rlhf.feedback.trees.submissions import is_repeated
from palm_rlhf.feedback.trees.task_view import path_to


@dataclass(frozen=True)
class ReplyWanted:
    """A message of a user that wants `number` replies of the model.

    `conversation` holds the messages up to it, `[{"role", "content"}, ...]`, and `num_tries` the model's replies to it
    so far: the seed of the next one can count on from there.
    """

    message_id: str
    conversation: list[dict[str, str]]
    number: int
    num_tries: int


def messages_wanting_model_replies(
    session: Session, settings: CollectionSettings, *, now: datetime
) -> list[ReplyWanted]:
    """Return the messages of growing trees that want replies of the model, the oldest trees first."""
    return [
        ReplyWanted(
            parent.id,
            [{"role": OASST_ROLES[part.role], "content": part.text} for part in path_to(session, parent.id)],
            number,
            growth.num_model_tries(parent),
        )
        for growth in growing_trees(session, now)
        for parent, number in growth.model_replies_wanted(settings)
    ]


def add_model_reply(
    session: Session,
    message_id: str,
    text: str,
    *,
    model_id: str,
    sampling: Mapping[str, Any],
    settings: CollectionSettings,
    now: datetime,
) -> TreeMessage | None:
    """Keep a reply of the model to a message; None if the message wants none any more.

    The reply is accepted without reviews, as replies of models are in Open-Assistant's files, unless it is blank or the
    same as a reply that is there: then it is refused at once, and counts as a try.

    Args:
        session: A session of `Store.writing`.
        message_id: The message that is answered.
        text: The reply.
        model_id: The id of the model, a `KnownModel`.
        sampling: The options by which the reply was sampled.
        settings: The settings of the collection.
        now: The current time.
    """
    parent = session.get_one(TreeMessage, message_id)
    growth = growing_trees(session, now, tree_id=parent.tree_id)
    wanted = [message.id for shape in growth for message, _ in shape.model_replies_wanted(settings)]
    if message_id not in wanted:
        return None
    text = text.replace("\0", "").strip()
    reply = TreeMessage(
        tree_id=parent.tree_id,
        parent_id=parent.id,
        role="assistant",
        text=text,
        language=parent.language,
        depth=parent.depth + 1,
        model_id=model_id,
        sampling=dict(sampling),
        accepted=bool(text) and not is_repeated(session, text, parent, parent.language),
        created_at=now,
    )
    session.add(reply)
    session.flush()
    advance(session, session.get_one(Tree, parent.tree_id), settings, now)
    return reply
