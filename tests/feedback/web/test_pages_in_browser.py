"""The pages of the tasks in a real browser, of the size of a phone: by keys alone, by the mouse, and in Arabic."""

from dataclasses import replace

import pytest
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from sqlalchemy import select

from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, TreeMessage
from tests.feedback.web.conftest import SMALL, add_tree

KINDS = {"write_prompt", "label_prompt", "reply_as_user", "reply_as_assistant", "label_reply", "rank_replies"}
ARABIC = "ما هي عاصمة فرنسا؟"


def find(screen, selector):
    return screen.find_element(By.CSS_SELECTOR, selector)


def wait(screen, condition):
    screen.implicitly_wait(0)
    return WebDriverWait(screen, 20, poll_frequency=0.02).until(condition)


def press(screen, *keys, control=False):
    """Press keys, wherever the focus is."""
    actions = ActionChains(screen, duration=0)
    actions = actions.key_down(Keys.CONTROL).send_keys(*keys).key_up(Keys.CONTROL) if control else actions
    (actions if control else actions.send_keys(*keys)).perform()


def read(site, query):
    with site.store.reading() as session:
        return session.execute(query).all()


def task_of(screen):
    """The id of the task that is shown, or an empty text."""
    forms = screen.find_elements(By.CSS_SELECTOR, "form.task")
    return forms[0].get_attribute("action").rpartition("/")[2] if forms else ""


def is_ready(screen):
    """A task's page is set up: the focus is in its form."""
    return screen.execute_script("return document.activeElement.closest('form.task') !== null")


def has_no_draft(screen):
    """Nothing is kept of tasks that are done."""
    return screen.execute_script("return localStorage.length") == 0


def is_clean(screen):
    """Nothing in the console, no violation of the policy among it, and no page wider than the screen."""
    log = screen.get_log("browser")
    return log == [] and screen.execute_script("return document.documentElement.scrollWidth <= innerWidth"), log


def test_each_task_is_done_by_keys_alone(site, screen):
    site.settings = replace(SMALL, max_open_trees=6)
    add_tree(site, "Is it good?", state="initial_prompt_review", accepted=None)
    add_tree(site, "A reply?", "**Mine**, and\n\n- a list", accepted=(True, None))
    add_tree(site, "And then?", "Answered.")
    ranked = add_tree(site, "Which?", "first", "second", "third", state="ranking")
    page = screen("Ada")
    press(page, "n")
    wait(page, is_ready)
    done, shown, typed = {}, {}, {}
    while set(done.values()) != KINDS:
        task = task_of(page)
        ((kind,),) = read(site, select(Task.kind).where(Task.id == task))
        done[task] = kind
        wait(page, is_ready)
        if "label" in kind:
            press(page, "n", "n", "4")
            wait(page, lambda page: page.switch_to.active_element.get_attribute("name") not in ("spam", "quality"))
        elif kind == "rank_replies":
            shown[task] = [each.get_attribute("value") for each in page.find_elements(By.NAME, "order")]
            press(page, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
            assert find(page, "#announcement").get_property("textContent") == "Reply A is now number 3 of 3"
        else:
            typed[task] = f"{kind} {len(done)}, nobody skips by the letter s"
            press(page, typed[task])
        assert is_clean(page) == (True, [])
        press(page, Keys.ENTER, control=True)
        wait(page, lambda page, task=task: page.find_elements(By.CSS_SELECTOR, f'[data-done="{task}"]'))
    assert set(done.values()) == KINDS
    assert {kind for (kind,) in read(site, select(Task.kind).where(Task.outcome == "done"))} == KINDS
    texts = read(site, select(TreeMessage.task_id, TreeMessage.text).where(TreeMessage.task_id.is_not(None)))
    assert dict(map(tuple, texts)) == typed
    for (labels,) in read(site, select(MessageReview.labels)):
        assert (labels["spam"], labels["lang_mismatch"], labels["quality"]) == (0, 0, 0.75)
    ((task, order, parent),) = read(site, select(ReplyRanking.task_id, ReplyRanking.best_first, ReplyRanking.parent_id))
    assert parent == ranked[0]
    assert order == [shown[task][1], shown[task][2], shown[task][0]]
    wait(page, has_no_draft)


def test_replies_are_dragged_and_a_double_click_counts_once(site, screen):
    add_tree(site, ARABIC, "Paris.", "It is **Paris**, on the Seine.\n\nSo I think.", state="ranking")
    page = screen("Ada")
    find(page, "[value=rank_replies]").click()
    wait(page, is_ready)
    first, second = page.find_elements(By.CSS_SELECTOR, ".ranking li")
    order = [each.find_element(By.NAME, "order").get_attribute("value") for each in (first, second)]
    heads = [each.find_element(By.CSS_SELECTOR, ".card-head .name") for each in (first, second)]
    actions = ActionChains(page, duration=50).click_and_hold(heads[0]).move_by_offset(0, 10)
    actions.move_to_element_with_offset(heads[1], 0, 20).move_by_offset(0, 20).pause(0.3).release().perform()
    wait(page, lambda page: page.find_elements(By.CSS_SELECTOR, ".ranking li")[0].get_attribute("data-name") == "B")
    bubble = find(page, ".message.user .text")
    assert bubble.text == ARABIC
    assert page.execute_script("return getComputedStyle(arguments[0]).direction", bubble) == "rtl"
    assert find(page, ".ranking strong").text == "Paris"
    assert is_clean(page) == (True, [])
    ActionChains(page).double_click(find(page, "[data-sends]")).perform()
    wait(page, lambda page: page.find_elements(By.CSS_SELECTOR, "[data-done]"))
    assert read(site, select(ReplyRanking.best_first)) == [(order[::-1],)]
    assert is_clean(page) == (True, [])


def test_a_draft_outlives_a_reload_and_an_error_keeps_the_text(site, screen):
    site.settings = replace(SMALL, max_message_length=12)
    page = screen("Ada")
    find(page, "[value=write_prompt]").click()
    wait(page, is_ready)
    press(page, "thirteen 😀 so")
    assert "1 characters too many" in find(page, "#count").text
    page.refresh()
    assert wait(page, lambda page: find(page, "textarea").get_attribute("value")) == "thirteen 😀 so"
    find(page, "[data-sends]").click()
    wait(page, lambda page: page.find_elements(By.CSS_SELECTOR, "[aria-invalid=true]"))
    wait(page, lambda page: page.switch_to.active_element.tag_name == "textarea")
    area = page.switch_to.active_element
    assert area.get_attribute("value") == "thirteen 😀 so"
    assert "13" in find(page, "#refusal").text
    area.send_keys(Keys.BACKSPACE)
    find(page, "[data-sends]").click()
    wait(page, lambda page: page.find_elements(By.CSS_SELECTOR, "[data-done]"))
    assert read(site, select(TreeMessage.text)) == [("thirteen 😀 s",)]
    wait(page, has_no_draft)


@pytest.mark.parametrize("language", ["ar", "en"])
def test_the_page_is_mirrored_in_arabic_and_the_theme_is_kept(screen, address, language):
    page = screen("Ada")
    find(page, ".menu summary").click()
    find(page, f".menu [hreflang={language}]").click()
    brand = wait(page, lambda page: find(page, f"html[lang={language}] .brand")).rect
    assert (brand["x"] > 195) == (language == "ar")
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.execute_script(ground)
    find(page, ".theme-switch").click()
    dark = page.execute_script(ground)
    assert dark != light
    page.get(address)
    assert page.execute_script(ground) == dark
    find(page, ".theme-switch").click()
    assert page.execute_script(ground) == light
    assert is_clean(page) == (True, [])
