"""The pages of moderators."""

import pytest
from sqlalchemy import select

from palm_rlhf.feedback.store.learning_tables import Withdrawal
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.store.tree_tables import Tree, TreeEvent, TreeMessage
from tests.feedback.test_coverage import add_review, add_tree
from tests.feedback.web.test_number_pages import words


@pytest.fixture
def flagged(site, join):
    """A moderator, somebody else, and the messages of a tree of which one was marked."""
    mod, ann = join("Mod", "moderator"), join("Ann")
    with site.store.writing() as session:
        messages = add_tree(session, "growing", [True, True], author=ann.person, at=utc_now())
        messages[1].text = "<img src=x onerror=alert(1)>"
        session.add(TreeEvent(tree_id=messages[0].tree_id, state="growing", at=utc_now()))
        add_review(session, messages[1], mod.person, hate_speech=1)
    return mod, ann, messages


def test_a_flagged_message_leads_to_its_tree(flagged):
    mod, _, (prompt, reply, _) = flagged
    (section,) = mod.open("/moderator").page.select("[data-message]")
    assert section["data-message"] == reply.id and "Hate speech: 1" in section.get_text(" ")
    assert "<img src=x onerror=alert(1)>" in section.get_text() and not section.select("img")
    mod.open(section.select_one("a[href*=moderator]")["href"].partition("#")[0])
    assert mod.path == f"/moderator/trees/{prompt.tree_id}" and mod.page.select_one(f"#message-{reply.id}")
    assert len(mod.page.select("li[id^=message-]")) == 3


def test_a_tree_is_halted_and_opened_again_with_reasons_that_are_kept(flagged, site):
    mod, _, (prompt, *_) = flagged
    mod.open(f"/moderator/trees/{prompt.tree_id}")
    mod.press("Halt the tree", reason="a quarrel")
    assert mod.page.select_one("[data-state]")["data-state"] == "halted_by_moderator"
    assert "a quarrel" in words(mod)
    mod.press("Open it again", reason="settled")
    assert mod.page.select_one("[data-state]")["data-state"] == "growing"
    with site.store.reading() as session:
        events = session.scalars(select(TreeEvent).order_by(TreeEvent.at)).all()
    assert [(event.state, event.reason, event.person_id) for event in events[1:]] == [
        ("halted_by_moderator", "a quarrel", mod.person.id),
        ("growing", "settled", mod.person.id),
    ]
    trees = mod.open("/moderator/trees?state=growing")
    assert [link["href"] for link in trees.page.select("tbody a")] == [f"/moderator/trees/{prompt.tree_id}"]
    assert mod.open("/moderator/trees?state=ranking").page.select("tbody a") == []


def test_a_withdrawn_message_is_a_row_with_its_reason(flagged, site):
    mod, _, (prompt, reply, _) = flagged
    mod.open(f"/moderator/trees/{prompt.tree_id}")
    form = mod.page.select_one(f"#message-{reply.id} form")
    fields = {field["name"]: field.get("value", "") for field in form.find_all("input")}
    mod.send(form["action"], [*{**fields, "reason": " "}.items()])
    assert mod.status == 400 and "reason" in words(mod)
    mod.send(form["action"], [*{**fields, "reason": "hateful"}.items()])
    assert "withdrawn" in mod.page.select_one(f"#message-{reply.id}").get_text()
    with site.store.reading() as session:
        (row,) = session.scalars(select(Withdrawal)).all()
        assert (row.table, row.row_id, row.person_id, row.reason) == ("messages", reply.id, mod.person.id, "hateful")
        assert session.get(TreeMessage, reply.id).text.startswith("<img")  # the row itself stays
    assert not mod.open("/moderator").page.select("[data-message]")


def test_only_moderators_moderate(flagged, site):
    mod, ann, (prompt, reply, _) = flagged
    token = mod.open("/moderator/trees/" + prompt.tree_id).page.select_one("input[name=token]")["value"]
    for path in ("/moderator", "/moderator/trees", "/moderator/checks", f"/moderator/trees/{prompt.tree_id}"):
        assert ann.open(path).status == 403
        assert ann.open("/").page.select_one("a[href='/moderator']") is None
    for path in (f"/moderator/trees/{prompt.tree_id}/halt", f"/moderator/messages/{reply.id}/withdraw"):
        own = ann.open("/").page.select_one("input[name=token]")["value"]
        assert ann.send(path, [("token", own), ("reason", "x")]).status == 403
        assert mod.send(path, [("reason", "x")]).status == 403  # without the form's token
        assert (
            mod.send(
                path.replace(prompt.tree_id, "none").replace(reply.id, "none"), [("token", token), ("reason", "x")]
            ).status
            == 404
        )
    with site.store.reading() as session:
        assert session.get(Tree, prompt.tree_id).state == "growing" and not session.scalars(select(Withdrawal)).all()
    assert mod.open("/moderator/trees?state=none").status == 404 and mod.open("/moderator/trees/none").status == 404
