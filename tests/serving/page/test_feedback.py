"""The chat page of a server with feedback: thumbs, better answers and two answers side by side, kept by the server."""

import json

import pytest
from selenium.webdriver.common.keys import Keys
from sqlalchemy import select

from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, Correction, Reaction
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from tests.feedback.chat_servers import chat_server, random_model
from tests.serving.page.conftest import HOSTILE


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "feedback.db") as store:
        yield store


def standing(store, table):
    with store.reading() as session:
        return session.scalars(select(table).where(not_withdrawn(table))).all()


def say(page, words):
    """Waits for an announcement."""
    page.until(f"document.querySelector('#status').textContent.includes({json.dumps(words)})")


def pressed(page):
    return page.js("return [...document.querySelectorAll('.thumb[aria-pressed=true]')].map(b => b.dataset.value)")


def test_thumbs_and_better_answers_are_kept_shown_and_taken_back(store, scripted, open_page):
    with chat_server(store, scripted) as (url, _):
        page = open_page(url)
        page.until("!document.querySelector('#compare').hidden")
        assert page.ask("attack").startswith(HOSTILE)
        page.click(".last .thumb[data-value='1']")
        page.until("document.querySelector('.thumb[aria-pressed=true]')")
        page.click(".last .thumb[data-value='-1']")  # another opinion takes the place of the first
        page.until("document.querySelector('.thumb[data-value=\"-1\"][aria-pressed=true]')")
        (reaction,), (answer,) = standing(store, Reaction), standing(store, Answer)
        assert (reaction.value, reaction.answer_id) == (-1, answer.id)
        page.click(".last .better")
        assert page.find("#better textarea").get_attribute("value").startswith(HOSTILE)
        page.press(Keys.CONTROL + "a", Keys.NULL, f"Better **so** {HOSTILE}", Keys.CONTROL + Keys.ENTER, Keys.NULL)
        page.until("!document.querySelector('.assistant .correction').hidden")
        (correction,) = standing(store, Correction)
        assert correction.text == f"Better **so** {HOSTILE}"
        page.browser.refresh()
        page.until("document.querySelector('.thumb[aria-pressed=true]')")
        assert pressed(page) == ["-1"] and not page.find(".assistant .better").is_displayed()
        assert page.texts(".better-text strong") == ["so"] and HOSTILE in page.find(".assistant .better-text").text
        assert page.js("return document.querySelectorAll('#thread img, #thread script').length") == 0
        page.click(".thumb[aria-pressed=true]")
        page.until("!document.querySelector('.thumb[aria-pressed=true]')")
        page.click(".assistant .correction .take-back")
        page.until("document.querySelector('.assistant .correction').hidden")
        assert standing(store, Reaction) == standing(store, Correction) == []
        page.ask("Hello")
        assert len(standing(store, Answer)) == 2
        assert page.find("#feedback-pages a").get_attribute("href") == f"{url}/feedback/"


def test_two_answers_come_side_by_side_and_are_judged_by_keys(store, open_page):
    with chat_server(store, random_model()) as (url, _):
        page = open_page(url)
        page.until("!document.querySelector('#compare').hidden")
        page.click("#settings-button")
        page.find("[name=maxTokens]").send_keys("30")
        page.find("[name=seed]").send_keys("1", Keys.ENTER)
        page.find("#input").send_keys("Hello", Keys.CONTROL + Keys.ENTER)
        page.wait()
        page.until("document.activeElement.dataset.verdict === 'left'")
        answers = {answer.id: answer for answer in standing(store, Answer)}
        sides = page.js(
            "return JSON.parse(sessionStorage['palm-rlhf.state']).conversations[0].messages[1].comparison.sides"
        )
        assert [answers[side["answer"]].text for side in sides] == [side["content"] for side in sides]
        assert page.find(".question").is_displayed() and not page.find(".given").is_displayed()
        page.press("2")
        page.until("!document.querySelector('.given').hidden")
        (vote,) = standing(store, ComparisonVote)
        assert vote.verdict == "right" and page.js("return document.activeElement.id") == "input"
        page.press("and on", Keys.ENTER)
        page.wait()
        assert page.asked()[-1]["messages"][1] == {"role": "assistant", "content": sides[1]["content"]}
        assert page.js("return [...document.querySelectorAll('.side')].map(s => s.checkVisibility())") == [False, True]
        page.browser.refresh()
        page.until("!document.querySelector('.given').hidden")
        assert "right answer better" in page.find(".given").text
        page.click(".given .take-back")
        page.until("!document.querySelector('.question').hidden")
        assert standing(store, ComparisonVote) == []
        page.click("[data-verdict=tie]")
        page.until("!document.querySelector('.given').hidden")
        assert [vote.verdict for vote in standing(store, ComparisonVote)] == ["tie"]


def test_equal_answers_are_one_and_a_cut_reply_goes_on(store, scripted, open_page):
    with chat_server(store, scripted) as (url, _):
        page = open_page(url)
        page.until("!document.querySelector('#compare').hidden")
        page.click("#settings-button")
        page.find("[name=maxTokens]").send_keys("2", Keys.ENTER)
        assert page.ask("Hello") == "Hi there,"
        page.click("#settings-button")
        page.find("[name=maxTokens]").send_keys(Keys.BACKSPACE, Keys.ENTER)
        page.click(".last .continue")
        page.wait()
        assert page.said()[-1][1] == "Hi there, how are you?"
        page.click(".last .thumb[data-value='1']")
        page.until("document.querySelector('.thumb[aria-pressed=true]')")
        (reaction,) = standing(store, Reaction)
        (judged,) = [answer for answer in standing(store, Answer) if answer.id == reaction.answer_id]
        assert (judged.text, len(judged.prompt)) == ("Hi **there**, how are you?", 1)
        page.click("#compare")  # nothing is written: the last message is answered anew
        page.wait()
        say(page, "came out the same")
        assert page.said()[-1][1] == "Hi there, how are you?" and page.texts(".comparison") == []


def test_whoever_has_not_logged_in_chats_as_ever(store, scripted, open_page):
    with chat_server(store, scripted, is_local=False) as (url, _):
        page = open_page(url)
        assert page.ask("Hello") == "Hi there, how are you?"
        assert page.find("#feedback-pages").text == "Log in to give feedback"
        assert not page.find("#compare").is_displayed() and not page.find(".last .thumb").is_displayed()
    assert standing(store, Answer) == []
