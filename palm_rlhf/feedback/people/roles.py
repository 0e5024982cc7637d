"""The roles of people, each of which may do everything that those before it may."""

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import Participant

ROLES = ("contributor", "moderator", "admin")


def has_role(person: Participant, role: str) -> bool:
    """Return whether a person may do what `role` may do."""
    return ROLES.index(person.role) >= ROLES.index(role)


def check_role(role: str) -> None:
    """Raise FeedbackError for a role that there is not."""
    if role not in ROLES:
        message = "got the role {role!a:.40}, expected one of {roles}"
        raise FeedbackError(message, role=role, roles=", ".join(ROLES))
