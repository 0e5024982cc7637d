"""The numbers of a collection: trees by state, messages, and the contributions of people."""

from datetime import timedelta

from palm_rlhf.feedback.store.answer_tables import KnownModel
from palm_rlhf.feedback.store.withdrawals import withdraw
from palm_rlhf.feedback.trees.model_replies import add_model_reply
from palm_rlhf.feedback.trees.progress import contributions, progress
from tests.feedback.collection import SPAM, START, Collection


def collected(store):
    """Two trees of English and one of Chinese, on three days."""
    collection = Collection(store, "ann", "bob", "cy", num_reviews=1, num_model_replies=1, max_open_trees=3)
    good, bad = collection.prompt("ann"), collection.prompt("ann")
    collection.review(good, "bob")
    collection.review(bad, "bob", labels=SPAM)
    collection.wait(days=3)
    collection.reply("bob", good)
    with store.writing() as session:
        session.add(KnownModel(id="m", name="model"))
        session.flush()
        add_model_reply(
            session, good.id, "hm", model_id="m", sampling={}, settings=collection.settings, now=collection.now
        )
    collection.wait(days=6)
    collection.write("cy", collection.take("cy", "write_prompt", "zh"))
    return collection


def counted(store, window, now):
    with store.reading() as session:
        return [
            (each.name, each.prompts, each.replies, each.reviews, each.rankings, each.total)
            for each in contributions(session, window, now)
        ]


def test_trees_are_counted_by_state_and_language(store):
    collection = collected(store)
    with store.reading() as session:
        both = progress(session, collection.settings, now=collection.now)
        chinese = progress(session, collection.settings, language="zh", now=collection.now)
    assert set(both.trees) == {
        *("initial_prompt_review", "growing", "ranking", "ready_for_export", "exported"),
        *("aborted_low_grade", "halted_by_moderator"),
    }
    assert {state: number for state, number in both.trees.items() if number} == {
        "initial_prompt_review": 1,
        "growing": 1,
        "aborted_low_grade": 1,
    }
    numbers = (both.messages_of_people, both.messages_of_models, both.reviews, both.rankings, both.waiting_for_model)
    assert numbers == (4, 1, 2, 0, 0)
    assert (chinese.messages_of_people, chinese.messages_of_models, chinese.reviews) == (1, 0, 0)
    assert sum(chinese.trees.values()) == chinese.trees["initial_prompt_review"] == 1


def test_replies_that_the_model_owes_are_counted(store):
    collection = Collection(store, "ann", "bob", num_reviews=1, num_model_replies=2)
    collection.review(collection.prompt("ann"), "bob")
    with store.reading() as session:
        assert progress(session, collection.settings, now=collection.now).waiting_for_model == 2


def test_contributions_are_counted_in_windows_of_time(store):
    collection = collected(store)
    now = collection.now
    assert counted(store, "all", now) == [("bob", 0, 1, 2, 0, 3), ("ann", 2, 0, 0, 0, 2), ("cy", 1, 0, 0, 0, 1)]
    assert counted(store, "week", now) == [("bob", 0, 1, 0, 0, 1), ("cy", 1, 0, 0, 0, 1)]
    assert counted(store, "day", now) == [("cy", 1, 0, 0, 0, 1)]
    assert counted(store, "week", START + timedelta(days=7)) == [("bob", 0, 1, 0, 0, 1), ("cy", 1, 0, 0, 0, 1)]
    assert counted(store, "day", now + timedelta(days=1)) == []


def test_what_was_withdrawn_and_people_who_left_do_not_count(store):
    collection = collected(store)
    with store.writing() as session:
        for message in collection.messages():
            if message.person_id == collection.people["cy"].id:
                withdraw(session, message, message.person_id, now=collection.now)
        person = session.merge(collection.people["ann"])
        person.deleted_at = collection.now
    assert counted(store, "all", collection.now) == [("bob", 0, 1, 2, 0, 3)]
