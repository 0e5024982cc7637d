"""The pages of the tasks, by links and forms alone, as in a browser without JavaScript."""

from collections import Counter
from dataclasses import replace

import pytest
from sqlalchemy import func, select

from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, Tree, TreeMessage
from palm_rlhf.feedback.web.task_pages import moved
from tests.feedback.web.conftest import add_tree

KINDS = {
    "Write a prompt": "write_prompt",
    "Label a prompt": "label_prompt",
    "Reply as the user": "reply_as_user",
    "Reply as the assistant": "reply_as_assistant",
    "Label a reply": "label_reply",
    "Rank replies": "rank_replies",
}


def count(site, table):
    with site.store.reading() as session:
        return session.scalar(select(func.count()).select_from(table))


def do(browser, number):
    """Do the task that is shown; the text of a message has this number."""
    kind = KINDS[browser.heading]
    if kind in ("write_prompt", "reply_as_user", "reply_as_assistant"):
        browser.press("Send", text=f"text {number}\nof {kind}")
    elif kind == "rank_replies":
        order = [field["value"] for field in browser.form("Send").find_all("input", {"name": "order"})]
        browser.press(f"down {order[0]}").press("Send")
    else:
        browser.press("Send", spam="0", lang_mismatch="0", quality="0.75", violence="1")
    assert browser.status == 200
    return kind


def test_people_grow_a_tree_by_links_and_forms_alone_until_it_is_finished(site, join):
    people, done = [join(name) for name in ("Ada", "Bo", "Cy")], Counter()
    for _ in range(20):
        for browser in people:
            if browser.open("/").page.find("button", {"data-key": "n"}):
                browser.press("Next task")
                while browser.heading in KINDS and sum(done.values()) < 60:
                    done[do(browser, sum(done.values()))] += 1
                    assert "Thank you!" in browser.page.get_text()
                    with site.store.reading() as session:
                        if session.scalars(select(Tree.state)).first() == "ready_for_export":
                            break
        if count(site, ReplyRanking):
            break
    assert set(done) == set(KINDS.values())
    with site.store.reading() as session:
        assert "ready_for_export" in session.scalars(select(Tree.state)).all()
        texts = session.scalars(select(TreeMessage.text)).all()
        assert len(texts) == sum(done[kind] for kind in ("write_prompt", "reply_as_user", "reply_as_assistant"))
        assert all(text.startswith("text ") and "\r" not in text for text in texts)
        for labels in session.scalars(select(MessageReview.labels)):
            assert (labels["spam"], labels["quality"], labels["violence"], labels["pii"]) == (0, 0.75, 1, 0)
            assert "humor" not in labels
        for ranking in session.scalars(select(ReplyRanking)):
            first, second, *rest = ranking.shown
            assert ranking.best_first == [second, first, *rest]
        assert Counter(session.scalars(select(Task.kind).where(Task.outcome == "done"))) == done


def test_a_form_that_is_sent_twice_is_kept_once_and_goes_on_both_times(site, join):
    ada = join("Ada").open("/").press("write_prompt")
    path, token = ada.path, ada.page.find("input", {"name": "token"})["value"]
    for _ in range(2):
        ada.send(path, [("token", token), ("text", "Why is the sky blue?")])
        assert (ada.status, "Thank you!" in ada.page.get_text()) == (200, True)
    assert count(site, TreeMessage) == 1
    assert "You have done this task already." in ada.open(path).page.get_text()


def test_an_error_stands_by_its_field_and_nothing_typed_is_lost(site, join):
    site.settings = replace(site.settings, max_message_length=10)
    ada = join("Ada").open("/").press("write_prompt").press("Send", text="<b>eleven & more")
    assert ada.status == 413
    area = ada.page.find("textarea")
    assert area.get_text().strip() == "<b>eleven & more"
    assert area["aria-invalid"] == "true"
    assert "10" in ada.page.find(id=area["aria-describedby"]).get_text()
    assert ada.press("Send", text="   ").status == 400
    assert count(site, TreeMessage) == 0


def test_a_question_without_an_answer_is_asked_again_and_the_other_answers_stay(site, join):
    add_tree(site, "What is love?", state="initial_prompt_review", accepted=None)
    ada = join("Ada").open("/").press("label_prompt").press("Send", spam="0", humor="1", pii="1")
    assert ada.status == 422
    asked = [fieldset.legend.get_text() for fieldset in ada.page.find_all("fieldset", {"aria-invalid": "true"})]
    assert asked == ["Is it written in a language other than English?"]
    assert {(field["name"], field["value"]) for field in ada.page.find_all("input", checked=True)} == {
        ("spam", "0"),
        ("humor", "1"),
        ("pii", "1"),
    }
    assert count(site, MessageReview) == 0
    ada.press("Send", lang_mismatch="1")
    with site.store.reading() as session:
        (labels,) = session.scalars(select(MessageReview.labels))
    assert {name: value for name, value in labels.items() if value} == {"lang_mismatch": 1, "humor": 1, "pii": 1}


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "{{ 7*7 }} %(name)s", "</textarea><img src=x>"])
def test_texts_of_people_are_shown_as_text(site, join, text):
    add_tree(site, text)
    page = join("Ada<i>").open("/").press("reply_as_assistant").page
    assert [each.get_text() for each in page.find_all(class_="text")] == [text]
    assert all(each["dir"] == "auto" for each in page.find_all(class_="text"))
    assert not page.main.find_all(["script", "img"])


def test_a_task_of_somebody_else_is_neither_shown_nor_taken(site, join):
    ada, bo = join("Ada").open("/").press("write_prompt"), join("Bo").open("/")
    token = bo.page.find("input", {"name": "token"})["value"]
    assert bo.open(ada.path).status == 404
    for path in (ada.path, f"{ada.path}/skip"):
        assert bo.send(path, [("token", token), ("text", "mine")]).status == 404
    assert count(site, TreeMessage) == 0


def test_skipping_goes_on_and_a_chosen_kind_stays_chosen(site, join):
    add_tree(site, "One?", state="initial_prompt_review", accepted=None)
    add_tree(site, "Two?", state="initial_prompt_review", accepted=None)
    add_tree(site, "Grown?")
    ada = join("Ada").open("/").press("label_prompt")
    first = ada.page.find(class_="marked").find(class_="text").get_text()
    ada.press("Skip")
    second = ada.page.find(class_="marked").find(class_="text").get_text()
    assert {first, second} == {"One?", "Two?"}
    ada.press("Send", spam="1", lang_mismatch="0")
    assert ada.path == "/"  # no more prompts to label, though there is a reply to write
    assert "With it the message is refused." in ada.page.get_text()
    assert not ada.page.find("button", value="reply_as_assistant").has_attr("disabled")


def test_the_replies_to_rank_are_moved_by_their_buttons(site, join):
    _, *replies = add_tree(site, "Best?", "a", "b", "c", state="ranking")
    ada = join("Ada").open("/").press("rank_replies")
    shown = [field["value"] for field in ada.page.find_all("input", {"name": "order"})]
    assert sorted(shown) == sorted(replies)
    ada.press(f"up {shown[2]}").press(f"up {shown[2]}").press(f"up {shown[2]}")
    assert count(site, ReplyRanking) == 0
    ada.press("Send")
    with site.store.reading() as session:
        (ranking,) = session.scalars(select(ReplyRanking))
    assert ranking.shown == shown
    assert ranking.best_first == [shown[2], shown[0], shown[1]]


def test_moves_that_lead_nowhere_change_nothing():
    assert moved("abc", "up a") == moved("abc", "down c") == moved("abc", "up x") == moved("abc", "") == tuple("abc")
    assert moved("abc", "down a") == moved("abc", "up b") == tuple("bac")


def test_the_first_page_counts_tasks_progress_and_the_visitors_own_part(site, join):
    add_tree(site, "Grown?")
    ada = join("Ada")
    ada.open("/").press("reply_as_assistant").press("Send", text="Yes.")
    page = ada.open("/").page
    numbers = {
        button["value"]: int(button.find(class_="number").get_text())
        for button in page.find_all("button", {"name": "kind"})
    }
    assert numbers == {**dict.fromkeys(KINDS.values(), 0)}  # one open tree at most, and nobody answers twice
    bars = {bar["aria-label"]: (bar["value"], bar["max"]) for bar in page.find_all("progress")}
    assert bars["Conversations that grow"] == ("1", "1")
    figures = [figure.get_text(" ", strip=True) for figure in page.find_all(class_="figures")[-1].find_all("div")]
    assert figures == ["0 prompts", "1 replies", "0 reviews", "0 rankings"]
    assert "waits for other people" in page.get_text()


def test_the_language_of_the_tasks_is_the_persons_choice(site, join):
    ada = join("Ada", language=None).open("/")
    assert ada.page.find("button", {"aria-pressed": "true"})["value"] == "en"
    ada.press("zh").press("write_prompt").press("Send", text="请介绍一下西湖。")
    with site.store.reading() as session:
        assert session.scalars(select(TreeMessage.language)).all() == ["zh"]
    assert ada.page.html["lang"] == "en"
