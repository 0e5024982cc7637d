"""Browsers of a feedback site without a screen: they keep cookies, and send forms with their tokens."""

import re
from contextlib import contextmanager

from fastapi.testclient import TestClient

from palm_rlhf.feedback.people.accounts import add_person, open_session
from palm_rlhf.feedback.people.passwords import Passwords
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.feedback_app import create_feedback_app
from palm_rlhf.feedback.web.session_cookies import cookie_name, form_token
from palm_rlhf.feedback.web.site import Site

ADDRESS = "http://127.0.0.1"
QUICK = Passwords(time_cost=1, memory_kib=8, parallelism=1)  # hashes that cost nothing
PASSWORD = "correct horse 7"
PAGE = {"accept": "text/html"}


def make_site(store, **options) -> Site:
    return Site(store, passwords=QUICK, **options)


def join(site: Site, name: str, role: str = "contributor", password: str = PASSWORD):
    """A person with a password."""
    with site.store.writing() as session:
        person = add_person(session, name, role, utc_now())
        person.password_hash = site.passwords.hash(password)
    return person


class Visit(TestClient):
    """One browser."""

    def __init__(self, site: Site, address: str = ADDRESS, **options):
        super().__init__(create_feedback_app(site), base_url=address, follow_redirects=False, **options)
        self.site = site

    def page(self, path: str, **options):
        return self.get(path, headers=PAGE, **options)

    def token_of(self, path: str) -> str:
        """The token of the forms of a page."""
        found = re.search(r'name="token" value="(\w+)"', self.page(path).text)
        assert found, f"{path} has no form"
        return found[1]

    def submit(self, path: str, page: str, token: str | None = None, **fields):
        """Send a form that stands on `page`."""
        data = {"token": self.token_of(page) if token is None else token, **fields}
        return self.post(path, data=data, headers=PAGE)

    def log_in(self, name: str, password: str = PASSWORD, **fields):
        return self.submit("/login", "/login", name=name, password=password, **fields)


@contextmanager
def visit(site: Site, name: str | None = None, **options):
    """A browser, in which a person has logged in."""
    browser = Visit(site, **options)
    if name is not None:
        assert browser.log_in(name).status_code == 303
    yield browser
    browser.close()


def enter(browser: Visit, person) -> str:
    """Give a browser a new session of a person, without a login; return the token of its forms."""
    with browser.site.store.writing() as session:
        login = open_session(session, person, utc_now())
    name = cookie_name(browser.site, "session", is_https=False)
    browser.cookies.set(name, browser.site.serializer("session").dumps(login.id))
    return form_token(browser.site, "session", login.id)


def routes_of(app) -> list:
    """The routes of a site with its chat, those of routers included."""

    def walk(routes):
        for route in routes:
            if hasattr(route, "dependant"):
                yield route
            else:  # newer versions of FastAPI keep a router that is included as one entry
                yield from walk(getattr(getattr(route, "original_router", route), "routes", []) or [])

    return list(walk(app.router.routes))
