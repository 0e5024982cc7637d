"""Who may use each route of the site, by a table: a route that is not in it fails a test."""

import re

import pytest

from palm_rlhf.feedback.chat.chat_routes import add_chat
from palm_rlhf.feedback.people.roles import ROLES
from palm_rlhf.feedback.web.feedback_app import create_feedback_app
from palm_rlhf.feedback.web.site import Site
from palm_rlhf.feedback.web.visitors import NeedsRole, checked_form, checked_guest_form, guest_of, visitor_of
from tests.feedback.visiting import Visit, enter, join, make_site, routes_of

GUEST, CONTRIBUTOR, MODERATOR, ADMIN = "guest", *ROLES
TABLE = {
    GUEST: {"GET /login", "POST /login", "GET /join/{secret}", "POST /join"},
    CONTRIBUTOR: {
        "GET /",
        "POST /language",
        "POST /logout",
        "GET /account",
        "POST /account/name",
        "POST /account/language",
        "POST /account/password",
        "POST /account/sessions/end",
        "GET /account/data",
        "POST /account/delete",
        "POST /tasks",
        "GET /tasks/{task_id}",
        "POST /tasks/{task_id}",
        "POST /tasks/{task_id}/skip",
        "GET /compare",
        "GET /compare/{comparison_id}",
        "POST /compare/{comparison_id}",
        "POST /votes/{vote_id}/undo",
        "GET /mine",
        "POST /mine/{table}/{row_id}/withdraw",
        "GET /leaderboard",
        "GET /statistics",
        "GET /rounds",
        "GET /chat/visitor",
        "POST /chat/reply",
        "POST /chat/compare",
        "POST /chat/given",
        "POST /chat/reactions",
        "POST /chat/corrections",
        "POST /chat/votes",
        "POST /chat/withdrawals",
    },
    MODERATOR: {
        "GET /moderator",
        "GET /moderator/trees",
        "GET /moderator/checks",
        "GET /moderator/trees/{tree_id}",
        "POST /moderator/trees/{tree_id}/halt",
        "POST /moderator/trees/{tree_id}/reopen",
        "POST /moderator/messages/{message_id}/withdraw",
    },
    ADMIN: {
        "GET /people",
        "POST /people/invite",
        "POST /people/invitations/{invitation_id}/end",
        "POST /people/{person_id}/role",
        "GET /people/{person_id}/delete",
        "POST /people/{person_id}/delete",
    },
}


@pytest.fixture(scope="module")
def routes():
    app = create_feedback_app(Site(None))
    add_chat(app, None)
    return {f"{method} {route.path}": route for route in routes_of(app) for method in route.methods}


def calls(dependant):
    for each in dependant.dependencies:
        yield each.call
        yield from calls(each)


def test_each_route_has_a_role(routes):
    assert set(routes) == set().union(*TABLE.values())
    for role, names in TABLE.items():
        for name in names:
            found = set(calls(routes[name].dependant))
            needed = {call.role for call in found if isinstance(call, NeedsRole)}
            assert needed == ({role} if role in (MODERATOR, ADMIN) else set()), name
            assert (guest_of if role == GUEST else visitor_of) in found, name
            if not name.startswith("GET "):  # whatever changes something checks the form's token
                assert (checked_guest_form if role == GUEST else checked_form) in found, name


def test_routes_are_refused_to_lower_roles_and_answered_to_their_own(store, routes):
    site = make_site(store)
    browsers = {role: Visit(site, raise_server_exceptions=False) for role in (None, *ROLES)}
    people = {role: join(site, role, role) for role in ROLES}
    tokens = {role: enter(browsers[role], people[role]) for role in ROLES}
    for browser in browsers.values():
        add_chat(browser.app, None)
    for role, names in TABLE.items():
        for name in sorted(names - {"POST /chat/reply", "POST /chat/compare"}):  # for which a model would have to load
            method, path = name.split()
            path = re.sub(r"\{\w+\}", "none", path)
            for visitor, browser in browsers.items():
                if method == "POST" and visitor == role:
                    for wrong in ("", tokens["admin" if role == CONTRIBUTOR else CONTRIBUTOR]):
                        refused = browser.request(method, path, headers={"x-form-token": wrong})
                        assert refused.status_code == 403, (name, visitor)
                status = browser.request(method, path, headers={"x-form-token": tokens.get(visitor, "")}).status_code
                if role == GUEST:
                    expected = status == 403 if method == "POST" else status in (200, 410)
                elif visitor is None:
                    expected = status == 401
                elif ROLES.index(visitor) < ROLES.index(role):
                    expected = status == 403
                else:
                    expected = status not in (401, 403, 500)
                assert expected, (name, visitor, status)
                if visitor is not None and path in ("/logout", "/account/sessions/end"):
                    tokens[visitor] = enter(browser, people[visitor])


def test_a_new_route_without_a_role_is_found(routes):
    """The walk sees routes that are added later, and dependencies below others."""
    app = create_feedback_app(make_site(None))

    @app.post("/open")
    def everybodys():
        return {}

    assert {f"{method} {route.path}" for route in routes_of(app) for method in route.methods} - set(routes) == {
        "POST /open"
    }
