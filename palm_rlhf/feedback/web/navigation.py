"""The links at the top of every page."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.routing import NoMatchFound

from palm_rlhf.feedback.web.catalogues import N_


@dataclass(frozen=True)
class NavigationLink:
    """A link to a page."""

    path: str
    label: str
    is_current: bool


PAGES = (  # the name of a page's route, its label, and the least role that sees the link
    ("home", N_("Tasks"), "contributor"),
    ("compare", N_("Compare"), "contributor"),
    ("mine", N_("Mine"), "contributor"),
    ("leaderboard", N_("Leaderboard"), "contributor"),
    ("statistics", N_("Statistics"), "contributor"),
    ("rounds", N_("Rounds"), "contributor"),
    ("moderator", N_("Moderate"), "moderator"),
    ("people", N_("People"), "admin"),
    ("account", N_("Account"), "contributor"),
)


def is_known(request: Request, name: str) -> bool:
    """Return whether the site has a route of this name, without parameters."""
    try:
        request.url_for(name)
    except NoMatchFound:
        return False
    return True


def links_for(request: Request, visitor: Any) -> Iterator[NavigationLink]:
    """Yield the links that a visitor sees; none before a login. The current page's is that of the longest path."""
    if visitor is None:
        return
    seen = [(name, label) for name, label, role in PAGES if visitor.has_role(role) and is_known(request, name)]
    paths = {name: request.url_for(name).path for name, _ in seen}
    here = request.url.path
    inside = [path for name, path in paths.items() if here == path or (name != "home" and here.startswith(path + "/"))]
    for name, label in seen:
        yield NavigationLink(paths[name], label, paths[name] in inside)
