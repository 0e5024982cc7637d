"""The states of a message tree, by the names that Open-Assistant's files have; `exported` is ours."""

from datetime import datetime

from sqlalchemy import update
from sqlalchemy.orm import Session

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.tree_tables import Task, Tree, TreeEvent

PROMPT_REVIEW = "initial_prompt_review"
GROWING = "growing"
RANKING = "ranking"
SCORED = "ready_for_export"  # the replies have their ranks
EXPORTED = "exported"
LOW_GRADE = "aborted_low_grade"  # the reviews did not accept the prompt
HALTED = "halted_by_moderator"
STATES = (PROMPT_REVIEW, GROWING, RANKING, SCORED, EXPORTED, LOW_GRADE, HALTED)
OPEN_STATES = (PROMPT_REVIEW, GROWING, RANKING)
MODERATORS = ("moderator", "admin")


def enter(
    session: Session, tree: Tree, state: str, now: datetime, *, reason: str | None = None, person_id: str | None = None
) -> None:
    """Bring a tree into a state, with the event that says when, by whom (None: by the rules) and why.

    Tasks that are still open were for the state before, and are cancelled.
    """
    tree.state = state
    session.add(TreeEvent(tree_id=tree.id, state=state, reason=reason, person_id=person_id, at=now))
    cancelled = update(Task).where(Task.tree_id == tree.id, Task.outcome.is_(None))
    session.execute(cancelled.values(outcome="cancelled", closed_at=now))
    session.flush()


def halt(session: Session, tree_id: str, person: Participant, reason: str, now: datetime) -> Tree:
    """Stop a tree on a moderator's word: nobody is handed a task of it any more, and open tasks are cancelled.

    Raises FeedbackError for anyone else, an unknown tree, one that has ended, or a blank reason.
    """
    if person.role not in MODERATORS:
        raise FeedbackError(f"got the role {person.role}, expected a moderator or an admin, to halt a tree", 403)
    tree = session.get(Tree, tree_id)
    if tree is None:
        raise FeedbackError(f"got {tree_id!r}, expected the id of a tree", 404)
    if tree.state in (LOW_GRADE, HALTED):
        raise FeedbackError(f"the tree has ended already: {tree.state}", 409)
    if not reason.strip():
        raise FeedbackError("got no reason, expected one: it is kept with the tree")
    enter(session, tree, HALTED, now, reason=reason.strip(), person_id=person.id)
    return tree


def mark_exported(session: Session, tree_ids: list[str], now: datetime) -> None:
    """Note that scored trees were written to a file; other trees, and those exported before, keep their state."""
    for tree_id in tree_ids:
        tree = session.get(Tree, tree_id)
        if tree is not None and tree.state == SCORED:
            enter(session, tree, EXPORTED, now)
