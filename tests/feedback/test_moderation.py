"""Messages that people flagged, and trees that are halted and opened again."""

from datetime import timedelta

import pytest
from sqlalchemy import select

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.tree_tables import Tree, TreeEvent
from palm_rlhf.feedback.trees.moderation import flagged_messages, reopen
from palm_rlhf.feedback.trees.states import enter, halt
from tests.feedback.comparing import NOW, add_person
from tests.feedback.test_coverage import add_review, add_tree, withdraw

SETTINGS = CollectionSettings(num_model_replies=0)


def test_refused_and_flagged_messages_are_found_the_worst_first(store):
    with store.writing() as session:
        ann, bob, cem = (add_person(session, name) for name in ("Ann", "Bob", "Cem"))
        (fine,) = add_tree(session, "initial_prompt_review", author=ann)
        (rude,) = add_tree(session, "initial_prompt_review", author=ann)
        (spam,) = add_tree(session, "aborted_low_grade")
        (gone,) = add_tree(session, "growing", author=ann)
        add_review(session, fine, bob, toxicity=0.75)
        add_review(session, rude, bob, hate_speech=1, pii=1)
        add_review(session, rude, cem, hate_speech=1)
        add_review(session, spam, bob, spam=1)
        add_review(session, spam, cem)
        add_review(session, gone, bob, spam=1)
        withdraw(session, gone)
        withdraw(session, add_review(session, fine, cem, spam=1))
        found = flagged_messages(session, SETTINGS)
    assert [(each.message.id, each.author, each.state) for each in found] == [
        (spam.id, None, "aborted_low_grade"),
        (rude.id, "Ann", "initial_prompt_review"),
    ]
    assert [(each.flags, each.num_reviews, each.acceptance) for each in found] == [
        ({"spam": 1}, 2, 0.5),
        ({"hate_speech": 2, "pii": 1}, 2, 1.0),
    ]


def test_a_halted_tree_is_opened_again_in_the_state_that_it_had(store):
    with store.writing() as session:
        ann, mod = add_person(session, "Ann"), add_person(session, "Mod", "moderator")
        (prompt,) = add_tree(session, "growing", author=ann)
        prompt.accepted = True
        tree = session.get(Tree, prompt.tree_id)
        enter(session, tree, "initial_prompt_review", NOW - timedelta(hours=2))
        enter(session, tree, "growing", NOW - timedelta(hours=1))
        halt(session, tree.id, mod, "a quarrel", NOW)
        for person, reason in ((ann, "please"), (mod, " ")):
            with pytest.raises(FeedbackError):
                reopen(session, tree.id, person, reason, SETTINGS, NOW)
        later = NOW + timedelta(hours=1)
        assert reopen(session, tree.id, mod, " it was settled ", SETTINGS, later).state == "growing"
        event = session.scalars(select(TreeEvent).order_by(TreeEvent.at.desc())).first()
        assert (event.state, event.reason, event.person_id, event.at) == ("growing", "it was settled", mod.id, later)
        with pytest.raises(FeedbackError, match="not halted"):
            reopen(session, tree.id, mod, "again", SETTINGS, later)
        halt(session, tree.id, mod, "again", later)
        withdraw(session, prompt)
        with pytest.raises(FeedbackError, match="withdrawn"):
            reopen(session, tree.id, mod, "again", SETTINGS, later)
        with pytest.raises(FeedbackError, match="id of a tree"):
            reopen(session, "?", mod, "again", SETTINGS, later)


def test_a_tree_that_was_decided_while_it_was_halted_goes_on(store):
    with store.writing() as session:
        mod = add_person(session, "Mod", "admin")
        (prompt,) = add_tree(session, "initial_prompt_review")
        enter(session, session.get(Tree, prompt.tree_id), "initial_prompt_review", NOW - timedelta(hours=1))
        halt(session, prompt.tree_id, mod, "to look", NOW)
        prompt.accepted = True
        assert reopen(session, prompt.tree_id, mod, "fine", SETTINGS, NOW + timedelta(hours=1)).state == "growing"
