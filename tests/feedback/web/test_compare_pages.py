"""The pages of comparisons and of one's own contributions, in a browser without JavaScript."""

import pytest
from sqlalchemy import select

from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, ShownComparison
from palm_rlhf.feedback.store.learning_tables import Withdrawal
from palm_rlhf.feedback.store.tree_tables import Tree, TreeMessage
from tests.feedback.comparing import add_answers, add_models, add_round, add_vote

HOSTILE = "<img src=x onerror='document.title=1'>"


@pytest.fixture
def pool(store):
    """Two prompts with two answers each."""
    with store.writing() as session:
        add_models(session)
        round_ = add_round(session, 1)
        for prompt in (f"One {HOSTILE}", "Two"):
            add_answers(session, round_, prompt, [f"good {HOSTILE}", "bad"])


def rows(store, table):
    with store.reading() as session:
        return session.scalars(select(table).order_by(table.created_at)).all()


def sides(browser):
    return [side.get_text(strip=True) for side in browser.page.select(".side .text")]


def test_pairs_are_compared_until_there_is_none(store, pool, join):
    ada = join("Ada").open("/compare")
    assert ada.page.select("main img, main script") == []
    seen = set()
    for _ in range(2):
        assert sorted(sides(ada)) == ["bad", f"good {HOSTILE}"]
        assert "old" not in ada.page.main.get_text()  # the name of the model
        seen.add(ada.page.select_one(".user .text").get_text())
        texts = sides(ada)
        ada.press("Left" if texts[0].startswith("good") else "Right")
        assert (ada.status, ada.path) == (200, "/compare")
        vote = rows(store, ComparisonVote)[-1]
        assert (vote.person_id, texts[0 if vote.verdict == "left" else 1][:4]) == (ada.person.id, "good")
    assert seen == {f"One {HOSTILE}", "Two"}
    assert "no pair" in ada.page.get_text() and "compared 2 pairs" in ada.page.get_text()
    bob = join("Bob").open("/compare")
    assert "compared 0 pairs; all people together: 2" in bob.page.get_text() and len(sides(bob)) == 2


def test_the_last_vote_is_taken_back_where_it_was_given(store, pool, join):
    ada = join("Ada").open("/compare")
    before = sides(ada)
    ada.press("Tie").press("Take it back")
    assert ada.path.startswith("/compare/") and sides(ada) == before
    ada.press("Both are bad")
    assert [vote.verdict for vote in rows(store, ComparisonVote)] == ["tie", "both_bad"]
    (withdrawal,) = rows_of_withdrawals(store)
    assert withdrawal.row_id == rows(store, ComparisonVote)[0].id


def rows_of_withdrawals(store):
    with store.reading() as session:
        return session.scalars(select(Withdrawal)).all()


def test_replayed_forged_and_strange_votes_are_refused(store, pool, join):
    ada, bob = join("Ada").open("/compare"), join("Bob")
    form = ada.page.select_one("form.comparison")
    token = form.select_one("[name=token]")["value"]
    action = form["action"]
    assert bob.open("/mine").status == 200
    own = bob.page.select_one("[name=token]")
    own = own["value"] if own else bob.open("/compare").page.select_one("[name=token]")["value"]
    assert bob.send(action, [("token", own), ("verdict", "left")]).status == 403
    assert bob.send(action, [("token", token), ("verdict", "left")]).status == 403
    assert bob.open(action).status == 404
    assert ada.send(action, [("verdict", "left")]).status == 403
    assert ada.send(action, [("token", token), ("verdict", "neither")]).status == 422
    assert ada.send(action, [("token", token)]).status == 422
    assert rows(store, ComparisonVote) == []
    assert ada.send(action, [("token", token), ("verdict", "left")]).status == 200
    assert ada.send(action, [("token", token), ("verdict", "left")]).status == 409
    (vote,) = rows(store, ComparisonVote)
    assert bob.send(f"/votes/{vote.id}/undo", [("token", own)]).status == 403
    assert bob.send(f"/mine/votes/{vote.id}/withdraw", [("token", own)]).status == 403
    assert rows_of_withdrawals(store) == []


def test_what_one_has_given_is_listed_and_taken_back_where_that_is_allowed(store, pool, join):
    ada, bob = join("Ada"), join("Bob")
    with store.writing() as session:
        tree = Tree(language="en", state="growing")
        session.add(tree)
        session.flush()

        def message(person, text, parent=None, role="prompter"):
            row = TreeMessage(
                tree_id=tree.id, parent_id=parent and parent.id, role=role, text=text, language="en", depth=0
            )
            row.person_id = person.person.id
            session.add(row)
            session.flush()
            return row

        prompt = message(ada, HOSTILE)
        message(bob, "an answer", prompt, "assistant")
        answers = session.scalars(
            select(Answer).where(Answer.prompt_key == session.scalar(select(Answer.prompt_key)))
        ).all()
        for _ in range(21):
            comparison = ShownComparison(
                prompt_key=answers[0].prompt_key,
                left_id=answers[0].id,
                right_id=answers[1].id,
                person_id=ada.person.id,
                chosen_by="random",
                purpose="training",
            )
            session.add(comparison)
            session.flush()
            add_vote(session, comparison)
    ada.open("/mine")
    newest = ada.page.select_one(".contribution")
    assert newest.h2.get_text(strip=True) == "Prompt" and HOSTILE in newest.get_text()
    assert "others have answered this message" in newest.get_text() and newest.form is None
    assert len(ada.page.select(".contribution")) == 20 and ada.page.select("main img") == []
    token = ada.page.select_one("[name=token]")["value"]
    assert ada.send(f"/mine/messages/{prompt.id}/withdraw", [("token", token)]).status == 409
    ada.open("/mine?page=2")
    assert len(ada.page.select(".contribution")) == 2
    ada.press("Take it back")
    assert (ada.path, len(ada.page.select(".withdrawn"))) == ("/mine", 1)
    assert len(rows_of_withdrawals(store)) == 1
    assert ada.send("/mine/people/x/withdraw", [("token", token)]).status == 404
    assert "Nothing yet" in join("Carl").open("/mine").page.get_text()
    bob.open("/mine").press("Take it back")
    assert len(bob.page.select(".withdrawn")) == 1
