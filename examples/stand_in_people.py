"""Stand-in people of examples/human_loop.py: they join by invitations, and vote in headless browsers, by selenium."""

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from palm_rlhf.feedback.people.accounts import person_of_name
from palm_rlhf.feedback.people.invitations import invite
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.table_base import utc_now

NOISE = 0.1  # the share of verdicts that are the opposite of a person's taste
IDLE_SECONDS = 0.5  # between looks at whether votes are wanted
LONGEST_WAIT = 60.0  # seconds for the page after a vote
PASSWORD = "only a stand-in"
# The comparison on the page: its address, and the texts of the left and of the right answer.
COMPARISON = """
const form = document.querySelector("form.comparison");
return form && [form.action, ...Array.from(form.querySelectorAll(".side .text"), (text) => text.textContent)];
"""


class Taste:
    """The hidden taste of the stand-in people: whole sentences, and of two of them the friendlier one.

    Friendliness is the sentiment by VADER (Hutto and Gilbert 2014), from -1 to 1.
    """

    def __init__(self, seed: int):
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ImportError(f"{error}; the taste comes with: pip install palm-rlhf[examples]") from error
        self.vader, self.random = SentimentIntensityAnalyzer(), random.Random(seed)

    def liking(self, answer: str) -> tuple[bool, float]:
        """Return how much an answer is liked; the larger one of two is of the better answer."""
        return answer.rstrip().endswith((".", "!", "?")), self.vader.polarity_scores(answer)["compound"]

    def verdict(self, left: str, right: str) -> str:
        """Return left, right or tie; one in ten verdicts is the opposite one."""
        likes_left, likes_right = self.liking(left), self.liking(right)
        if likes_left == likes_right:
            return "tie"
        errs = self.random.random() < NOISE
        return "left" if (likes_left > likes_right) != errs else "right"


class StandIn:
    """A person with a browser of its own, who votes while votes are wanted."""

    def __init__(self, url: str, invitation: str, name: str, seed: int, wanted: Callable[[], bool]):
        """Open a browser, and join by an invitation."""
        self.url, self.name, self.taste, self.wanted = url, name, Taste(seed), wanted
        self.stop = threading.Event()
        self.error: Exception | None = None
        self.driver = open_browser()
        self.driver.get(f"{url}join/{invitation}")
        for field, text in (("name", name), ("password", PASSWORD), ("again", PASSWORD)):
            self.driver.find_element("name", field).send_keys(text)
        self.driver.find_element("css selector", 'form[action$="/join"] button').click()
        wait_for(lambda: "/join" not in self.driver.current_url, self.driver)
        self.driver.get(f"{url}compare")
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        """Vote until it is stopped."""
        try:
            while not self.stop.is_set():
                if self.wanted():
                    if self.vote():
                        continue
                    self.driver.get(f"{self.url}compare")
                self.stop.wait(IDLE_SECONDS)
        except Exception as error:
            self.error = error

    def vote(self) -> bool:
        """Judge the pair on the page; return whether there was one."""
        shown = self.driver.execute_script(COMPARISON)
        if shown is None:
            return False
        address, left, right = shown
        verdict = self.taste.verdict(left, right)
        self.driver.find_element("css selector", f"form.comparison [name=verdict][value={verdict}]").click()
        wait_for(lambda: (self.driver.execute_script(COMPARISON) or [None])[0] != address, self.driver)
        return True

    def end(self) -> None:
        """Stop voting."""
        self.stop.set()
        if self.thread.is_alive():
            self.thread.join()

    def picture(self, page: str, file: Path) -> None:
        """Save a picture of a page, down to its end."""
        self.driver.get(f"{self.url}{page}")
        height = self.driver.execute_script("return document.documentElement.scrollHeight")
        self.driver.set_window_size(1000, max(700, min(height + 150, 2500)))
        self.driver.save_screenshot(str(file))


def wait_for(is_so: Callable[[], bool], driver: Any) -> None:
    """Wait until something is so. Raises TimeoutError with the text of the page if that takes too long."""
    deadline = time.monotonic() + LONGEST_WAIT
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(driver.find_element("tag name", "body").text)
        time.sleep(0.01)


def open_browser() -> Any:
    """Open headless Chromium. Raises ImportError without selenium, and RuntimeError without a browser."""
    try:
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
    except ImportError as error:
        raise ImportError(f"{error}; --simulate drives browsers by it: pip install palm-rlhf[examples]") from error
    options = webdriver.ChromeOptions()
    if found := next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None):
        options.binary_location = found
    for flag in ("headless=new", "disable-gpu", "disable-dev-shm-usage", "window-size=1200,800"):
        options.add_argument(f"--{flag}")
    if getattr(os, "geteuid", lambda: 1)() == 0:
        options.add_argument("--no-sandbox")  # Chromium has none for root
    try:
        return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    except WebDriverException as error:
        raise RuntimeError(
            f"{error.msg}: --simulate needs Chromium and its driver, apt-get install chromium chromium-driver"
        ) from error


@contextmanager
def people_in_browsers(
    url: str, store: Store, number: int, seed: int, wanted: Callable[[], bool], pictures: Path
) -> Iterator[Callable[[], None]]:
    """Let stand-in people vote for the length of a block; yield a function that raises an error of theirs.

    The first of them becomes the admin, who invites the others, and saves a picture of the page of the rounds at the
    end. In a database that they have joined before, they join again under new names.
    """
    people: list[StandIn] = []

    def check() -> None:
        for person in people:
            if person.error is not None:
                raise RuntimeError(f"{person.name} cannot go on voting: {person.error}") from person.error

    try:
        inviter = None
        for place in range(number):
            with store.writing() as session:
                inviter = inviter or next(filter(None, (person_of_name(session, name_of(i)) for i in range(99))), None)
                name = next(name_of(i) for i in range(99) if person_of_name(session, name_of(i)) is None)
                secret = invite(session, "contributor" if inviter else "admin", utc_now(), created_by=inviter)
            people.append(StandIn(url, secret, name, 100 * seed + place, wanted))
        for person in people:
            person.thread.start()
        yield check
        for person in people:
            person.end()
        people[0].picture("rounds", pictures / "rounds.png")
    finally:
        for person in people:
            person.end()
            person.driver.quit()


def name_of(place: int) -> str:
    """Return the name of a stand-in person."""
    return f"Stand-in {1 + place}"
