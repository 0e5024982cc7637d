"""A feedback site, people with sessions in it, a browser without JavaScript, and a real one."""

import threading
import time
from dataclasses import dataclass

import pytest
import uvicorn
from bs4 import BeautifulSoup
from fastapi import Response
from fastapi.testclient import TestClient

from palm_rlhf.feedback.people.accounts import open_session
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.store.tree_tables import Tree, TreeEvent, TreeMessage
from palm_rlhf.feedback.web.feedback_app import create_feedback_app
from palm_rlhf.feedback.web.session_cookies import add_cookie
from palm_rlhf.feedback.web.site import Site

SMALL = CollectionSettings(
    max_open_trees=1, max_tree_size=5, max_depth=2, num_model_replies=0, num_reviews=1, num_rankings=1
)


@dataclass
class PlainBrowser:
    """A browser without JavaScript: it shows pages, and sends forms with all that they hold."""

    client: TestClient
    person: Participant
    page: BeautifulSoup | None = None
    status: int = 0
    path: str = ""

    def open(self, path):
        return self._show(self.client.get(path))

    def form(self, button):
        """The form of the button with this text."""
        return self.button(button).find_parent("form")

    def button(self, text):
        found = [each for each in self.page.find_all("button") if text in each.get_text() + each.get("value", "")]
        assert found, (text, self.page.get_text())
        return found[0]

    def press(self, text, /, **fields):
        """Send the form of a button, as it is but for the fields given."""
        button = self.button(text)
        form = button.find_parent("form")
        entries = []
        for field in form.find_all(["input", "textarea"]):
            if field.name == "textarea":
                entries.append((field["name"], field.get_text().removeprefix("\n").replace("\n", "\r\n")))
            elif field.get("type") not in ("radio", "checkbox") or field.has_attr("checked"):
                entries.append((field["name"], field.get("value", "")))
        entries = [entry for entry in entries if entry[0] not in fields] + list(fields.items())
        if button.get("name"):
            entries.append((button["name"], button["value"]))
        return self.send(button.get("formaction") or form["action"], entries)

    def send(self, action, entries):
        data = {}
        for name, value in entries:
            data.setdefault(name, []).append(value)
        return self._show(self.client.post(action, data=data))

    def _show(self, response):
        self.status, self.path = response.status_code, response.url.path
        self.page = BeautifulSoup(response.text, "html.parser")
        return self

    @property
    def heading(self):
        return self.page.h1.get_text()


def add_tree(site, *texts, state="growing", accepted=True):
    """Add a tree of a prompt and replies of the assistant to it, which are nobody's; return the ids of its messages."""
    with site.store.writing() as session:
        tree = Tree(language="en", state=state)
        session.add(tree)
        session.flush()
        session.add(TreeEvent(tree_id=tree.id, state=state))
        ids = []
        for text in texts:
            message = TreeMessage(
                tree_id=tree.id,
                parent_id=ids[0] if ids else None,
                role="assistant" if ids else "prompter",
                text=text,
                language="en",
                depth=1 if ids else 0,
                accepted=accepted if isinstance(accepted, bool | None) else accepted[len(ids)],
            )
            session.add(message)
            session.flush()
            ids.append(message.id)
        return ids


@pytest.fixture
def site(store):
    """A site whose trees are small, so that few people finish one."""
    return Site(store, SMALL)


@pytest.fixture
def join(site):
    """`join("Ada")` is a browser in which a new person has logged in."""

    def enter(name, role="contributor", language="en"):
        response = Response()
        with site.store.writing() as session:
            person = Participant(name=name, role=role, language=language)
            session.add(person)
            session.flush()
            login = open_session(session, person, utc_now())
        add_cookie(site, response.headers, "session", login.id, is_https=False)
        client = TestClient(create_feedback_app(site), base_url="http://127.0.0.1", headers={"Accept": "text/html"})
        name, _, value = response.headers["set-cookie"].partition(";")[0].partition("=")
        client.cookies.set(name, value)
        return PlainBrowser(client, person)

    return enter


@pytest.fixture
def address(site):
    """The address of the site, which is served until the test ends."""
    config = uvicorn.Config(create_feedback_app(site), port=0, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def screen(browser, address, join):
    """`screen("Ada")` is the real browser, as a phone in which a new person has logged in."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )

    def enter(name):
        browser.get(f"{address}/static/feedback.css")
        browser.delete_all_cookies()
        for cookie in join(name).client.cookies.jar:
            browser.add_cookie({"name": cookie.name, "value": cookie.value})
        browser.get_log("browser")
        browser.get(address)
        return browser

    yield enter
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.delete_all_cookies()
    browser.get("about:blank")
